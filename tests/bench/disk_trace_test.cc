// Saving and restoring a sequence made of recorded attention changes no bit of any answer.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <numeric>
#include <string>

#include "bench/disk/disk.h"
#include "bench/replay/replay.h"

namespace vattn::bench {
namespace {

TEST(DiskTraceTest, AttentionAfterARestoreIsBitIdentical) {
  const Trace trace = ReadTrace(VATTN_TEST_DATA "/smol_fixture.safetensors");
  ReplayPlan plan;
  plan.layers.resize(static_cast<size_t>(trace.layers));
  std::iota(plan.layers.begin(), plan.layers.end(), 0);
  vattn_options options;
  vattn_options_init(&options, sizeof(options));
  SetShape(trace, plan, &options);
  const std::string path = testing::TempDir() + "disk_trace_test." + std::to_string(getpid());
  for (const int32_t engine : {VATTN_IO_AUTO, VATTN_IO_PREAD}) {
    options.io_engine = engine;
    const RestoredFigures figures = CompareRestored(trace, options, path);
    EXPECT_EQ(figures.answers, (trace.steps + 1) / 2 * trace.layers * trace.q_heads);
    EXPECT_EQ(figures.different, 0);
    EXPECT_TRUE(std::filesystem::remove(path));
  }
}

TEST(DiskTraceTest, MeasuresWhatItIsAskedFor) {
  DiskPlan plan;
  plan.directory = testing::TempDir();
  plan.mebibytes = 8;
  plan.block_kib = {64, 1024};
  plan.depths = {1, 4};
  plan.repetitions = 2;
  Progress progress;
  const DiskFigures figures = MeasureDisk(plan, &progress);
  EXPECT_NEAR(static_cast<double>(figures.file_bytes), 8 << 20, 5 << 20);
  ASSERT_EQ(figures.lines.size(), 4u);
  for (const DiskLine& line : figures.lines) {
    ASSERT_EQ(line.save_gbps.size(), 2u);
    ASSERT_EQ(line.restore_gbps.size(), 2u);
    EXPECT_GT(line.save_gbps[0], 0);
    EXPECT_GT(line.restore_gbps[0], 0);
  }
}

}  // namespace
}  // namespace vattn::bench
