// Host bytes: what the counters say and what the process really holds.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <string>

#include "tests/api/attention_model.h"
#include "tests/memory/sanitizers.h"

#define SKIP_WITH_SANITIZER() \
  if (kAddressSanitizer || kThreadSanitizer) GTEST_SKIP() << "sanitizers hold memory of their own"

namespace vattn::test {
namespace {

constexpr double kMiB = 1 << 20;

double ResidentBytes() {
  std::ifstream file("/proc/self/statm");
  double all = 0, resident = 0;
  file >> all >> resident;
  return resident * static_cast<double>(sysconf(_SC_PAGESIZE));
}

struct Use {
  double table_share;      // table_bytes over bytes of rows and codes
  double host_share;       // host_bytes_used over the same
  double sequence_growth;  // resident bytes of prompt and index, over the same
  double step_growth;      // further resident bytes of batch and steps, over the same
};

// 32K tokens in one layer, then decode steps.
Use Measure(float hot_share) {
  const Shape shape = {8, 2, 128, 128, false, VATTN_BF16};
  constexpr int64_t kTokens = 32768 - 64, kChunk = 512, kSteps = 32;
  vattn_options options = OptionsFor(shape);
  options.hot_share = hot_share;
  options.huge_pages = 0;
  std::mt19937_64 engine(1);
  Rows rows;
  rows.AddGaussian(shape, engine, kChunk);
  // What the process takes once, to make an index too, not a sequence
  for (int i = 0; i < 2; ++i) {
    const Runtime other(options);
    Sequence small(other);
    for (int64_t tokens = 0; tokens + kChunk < kTokens; tokens += kChunk)
      AppendRows(small, shape, 0, rows);
    small.BuildIndex();
  }
  const Runtime runtime(options);
  Sequence sequence(runtime);
  const double before = ResidentBytes();
  for (int64_t tokens = 0; tokens < kTokens; tokens += kChunk) {
    rows.Truncate(shape, std::min(kChunk, kTokens - tokens));
    for (float& k : rows.k) k = -k;
    AppendRows(sequence, shape, 0, rows);
  }
  sequence.BuildIndex();
  const double with_sequence = ResidentBytes();
  Batch batch(runtime, 1);
  batch.Set(0, sequence);
  for (int step = 0; step < kSteps; ++step) {
    Call call(shape, 1, 0);
    call.Fill(engine, 1, 2);
    batch.BeginStep(1);
    batch.Attend(call.Params());
  }
  const double with_steps = ResidentBytes();
  const vattn_stats stats = runtime.Stats();
  const double bytes = (kTokens + kSteps) * 2. * (512 + 32);
  return {static_cast<double>(stats.table_bytes) / bytes,
          static_cast<double>(stats.host_bytes_used) / bytes, (with_sequence - before) / bytes,
          (with_steps - with_sequence) / bytes};
}

void Report(const char* name, const Use& use) {
  std::printf(
      "%s: of rows and codes: tables %.2f %%, pool %.2f %%, resident %.2f %%, resident for steps "
      "%.2f %%\n",
      name, 100 * use.table_share, 100 * use.host_share, 100 * use.sequence_growth,
      100 * use.step_growth);
}

TEST(MemoryUseTest, RowsCodesAndLittleElse) {
  SKIP_WITH_SANITIZER();
  for (const float hot_share : {0.f, .05f}) {
    const Use use = Measure(hot_share);
    Report(hot_share == 0 ? "hot_share 0" : "hot_share .05", use);
    EXPECT_LE(use.table_share, .03);  // of two segments
    EXPECT_LE(use.host_share, 1.01);  // whole blocks
    EXPECT_GE(use.sequence_growth, .9);
    // Learning takes 3 MB a thread, which the allocator keeps: the same whatever the number of
    // tokens.
    EXPECT_LE(use.sequence_growth, 1.2);
    EXPECT_LE(use.step_growth, .2);  // working memory of a batch, whatever the number of layers
  }
}

TEST(MemoryUseTest, PoolIsTouchedAsItIsUsed) {
  SKIP_WITH_SANITIZER();
  const Shape shape = {8, 2, 128, 128, false, VATTN_BF16};
  vattn_options options = OptionsFor(shape);
  options.host_bytes = uint64_t{4} << 30;
  { const Runtime once(options); }
  const double before = ResidentBytes();
  const Runtime runtime(options);
  EXPECT_LE(ResidentBytes() - before, 3 * kMiB);
  std::mt19937_64 engine(1);
  Rows rows;
  rows.AddGaussian(shape, engine, 256);
  Sequence sequence(runtime, 0, 1 << 20);  // a reservation is a promise, not memory
  EXPECT_LE(ResidentBytes() - before, 4 * kMiB);
  EXPECT_GE(runtime.Stats().host_bytes_used, (uint64_t{1} << 20) * 2 * (512 + 32));
  AppendRows(sequence, shape, 0, rows);
  EXPECT_LE(ResidentBytes() - before, 12 * kMiB);  // two blocks, in huge pages
}

TEST(MemoryUseTest, PrefaultTakesThePoolAtOnce) {
  SKIP_WITH_SANITIZER();
  vattn_options options = OptionsFor({8, 2, 128, 128, false, VATTN_BF16});
  options.host_bytes = 64 << 20;
  options.prefault = 1;
  const double before = ResidentBytes();
  const Runtime runtime(options);
  EXPECT_GE(ResidentBytes() - before, 60 * kMiB);
}

}  // namespace
}  // namespace vattn::test
