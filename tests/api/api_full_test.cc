// Pools with barely enough room, and pools larger than 32 bits can count.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <memory>
#include <string>

#include "tests/api/attention_model.h"
#include "tests/api/backend.h"

namespace vattn::test {
namespace {

const Shape kShape = {2, 1, 16, 16, false, VATTN_F32};

uint64_t BlockBytes(const vattn_options& options) {
  const Runtime runtime(options);
  const Sequence sequence(runtime, 0, 1);
  return runtime.Stats().host_bytes_used;
}

vattn_code Append(Sequence& sequence, const Rows& rows) {
  vattn_append_params params = Init<vattn_append_params>();
  params.num_tokens = rows.tokens;
  params.k = rows.k.data();
  params.v = rows.v.data();
  return vattn_append(sequence.get(), &params);
}

class ApiFullTest : public testing::Test {
 protected:
  ApiFullTest() {
    options_ = OptionsFor(kShape);
    options_.backend = VATTN_BACKEND_CPU;
    block_bytes_ = BlockBytes(options_);
    options_.host_bytes = 4 * block_bytes_;
    rows_.AddGaussian(kShape, engine_, 256);
  }

  vattn_options options_;
  uint64_t block_bytes_ = 0;
  std::mt19937_64 engine_{1};
  Rows rows_;  // of a block
};

// A step that the second sequence has no room for leaves the first its reserved block.
TEST_F(ApiFullTest, ARefusedStepKeepsReservations) {
  const Runtime runtime(options_);
  Sequence first(runtime, 0, 512), second(runtime);
  ASSERT_EQ(Append(first, rows_), VATTN_OK);
  ASSERT_EQ(Append(second, rows_), VATTN_OK);
  std::unique_ptr<Sequence> third = std::make_unique<Sequence>(runtime, 0, 256);
  EXPECT_EQ(runtime.Stats().host_bytes_used, 4 * block_bytes_);
  Batch batch(runtime, 2);
  batch.Set(0, first);
  batch.Set(1, second);
  EXPECT_EQ(vattn_batch_begin_step(batch.get(), 1, nullptr), VATTN_FULL);
  third.reset();
  EXPECT_THROW(Sequence(runtime, 0, 512), Error);  // one block is free, the other still reserved
  const Sequence greedy(runtime, 0, 256);
  EXPECT_EQ(vattn_batch_begin_step(batch.get(), 1, nullptr), VATTN_FULL);
  batch.Clear(1);
  batch.BeginStep(1);
  Call call(kShape, 2, 0);
  call.Fill(engine_, 1);
  batch.Attend(call.Params());
  Rows all = rows_;
  call.AddTo(all, 0);
  ExpectExact(call, 0, all);
}

// Two that each hold half of what they need would wait for each other.
TEST_F(ApiFullTest, ARestoreTakesAllItsBlocksOrNone) {
  const std::string path =
      std::filesystem::temp_directory_path() / ("api_full_test." + std::to_string(getpid()));
  const Runtime runtime(options_);
  {
    Sequence saved(runtime);
    for (int i = 0; i < 3; ++i) ASSERT_EQ(Append(saved, rows_), VATTN_OK);
    saved.Save(path);
  }
  std::unique_ptr<Sequence> in_the_way = std::make_unique<Sequence>(runtime, 0, 512);
  vattn_sequence* made = nullptr;
  EXPECT_EQ(vattn_sequence_restore(runtime.get(), path.c_str(), &made), VATTN_FULL);
  EXPECT_EQ(made, nullptr);
  EXPECT_EQ(runtime.Stats().host_bytes_used, 2 * block_bytes_);
  in_the_way = std::make_unique<Sequence>(runtime, 0, 512);  // both halves are still to be had
  in_the_way.reset();
  EXPECT_EQ(Sequence::Restore(runtime, path).Length(0), 768);
  const vattn_stats stats = runtime.Stats();
  EXPECT_EQ(stats.saves, 1u);
  EXPECT_GT(stats.bytes_saved, 3 * block_bytes_);
  EXPECT_EQ(stats.restores, 1u);
  EXPECT_EQ(stats.bytes_restored, 3 * block_bytes_);
  std::filesystem::remove(path);
}

// Blocks of 2 MiB, one for each layer and KV head: their rows lie up to 4.5 GiB into the pool, of
// which a few pages are touched.
TEST(ApiLargeTest, RowsPastFourGigabytes) {
  const Shape shape = {2, 2, 1024, 1024, false, VATTN_F32};
  constexpr int kLayers = 1024;
  vattn_options options = OptionsFor(shape);
  options.backend = VATTN_BACKEND_CPU;
  options.num_layers = kLayers;
  options.huge_pages = 0;
  options.index_bytes = 16;
  options.host_bytes = uint64_t{5} << 30;
  vattn_runtime* made = nullptr;
  if (vattn_runtime_create(&options, &made) == VATTN_OUT_OF_MEMORY) {
    GTEST_SKIP() << vattn_last_error();
  }
  vattn_runtime_destroy(made);
  const Runtime runtime(options);
  std::mt19937_64 engine(1);
  Sequence sequence(runtime);
  std::vector<Rows> rows(kLayers);
  for (int layer = 0; layer < kLayers; ++layer) {
    rows[layer].AddGaussian(shape, engine, 1);
    AppendRows(sequence, shape, layer, rows[layer]);
  }
  EXPECT_GT(runtime.Stats().host_bytes_used, uint64_t{1} << 32);
  Batch batch(runtime, 1);
  batch.Set(0, sequence);
  batch.BeginStep(0);
  for (const int layer : {0, 511, 512, 1022, 1023}) {  // around 2 and 4 GiB
    Call call(shape, 1, layer);
    call.Fill(engine, 0);
    batch.Attend(call.Params());
    ExpectExact(call, 0, rows[layer]);
  }
}

}  // namespace
}  // namespace vattn::test
