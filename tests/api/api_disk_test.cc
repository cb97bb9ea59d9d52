// Stored prefixes and spilled sequences through the C API: attention afterwards is exact, on every
// backend.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "tests/api/attention_model.h"
#include "tests/api/owned_prefix.h"

namespace vattn::test {
namespace {

const Shape kShape = {8, 2, 64, 64, false, VATTN_BF16};

class ApiDiskTest : public testing::Test {
 protected:
  ApiDiskTest()
      : folder_(testing::TempDir() + "api_disk_test." + std::to_string(getpid())),
        options_(OptionsFor(kShape)) {
    options_.policy = VATTN_POLICY_DENSE;
    options_.exact_below = 256;
    options_.disk_path = folder_.c_str();
  }
  ~ApiDiskTest() override { std::filesystem::remove_all(folder_); }

  // A step in a batch of its own is exact attention over rows.
  void ExpectStep(const Runtime& runtime, Sequence& sequence, Rows& rows) {
    Batch batch(runtime, 1);
    batch.Set(0, sequence);
    batch.BeginStep(1);
    Call call(kShape, 1, 0);
    call.Fill(engine_, 1, 2);
    batch.Attend(call.Params());
    call.AddTo(rows, 0);
    ExpectExact(call, 0, rows);
  }

  std::mt19937_64 engine_{5};
  const std::string folder_;
  vattn_options options_;
};

TEST_F(ApiDiskTest, SequencesBeginFromStoredPrefixes) {
  std::vector<int32_t> tokens(1500);
  std::iota(tokens.begin(), tokens.end(), 0);
  const std::string salt = "model and tenant";
  Rows rows;
  rows.AddGaussian(kShape, engine_, 1500);
  {
    const Runtime runtime(options_);
    Sequence sequence(runtime);
    AppendRows(sequence, kShape, 0, rows);
    Rows longer = rows;
    ExpectStep(runtime, sequence, longer);  // its index is fixed and its middle coded
    sequence.SavePrefix(OwnedPrefix(salt, tokens));
    ExpectStep(runtime, sequence, longer);
    EXPECT_EQ(runtime.Stats().disk_prefixes_saved, 1u);
  }
  Runtime runtime(options_);
  tokens[1100] = -1;
  int64_t shared = 0;
  Sequence begun = Sequence::Begin(runtime, OwnedPrefix(salt, tokens), &shared, 9);
  ASSERT_EQ(shared, 1100);
  ASSERT_EQ(begun.Length(0), 1100);
  rows.Truncate(kShape, 1100);
  rows.AddGaussian(kShape, engine_, 300);
  AppendRows(begun, kShape, 0, rows, 1100);
  for (int step = 0; step < 3; ++step) ExpectStep(runtime, begun, rows);
  EXPECT_NE(PrometheusText(runtime).find("\nvattn_prefix_hits 1\n"), std::string::npos);
  EXPECT_EQ(runtime.ForgetPrefixes("another tenant"), 0);
  EXPECT_EQ(runtime.ForgetPrefixes(salt), 1);
  vattn_sequence* none = nullptr;
  const OwnedPrefix prefix(salt, tokens);
  EXPECT_EQ(vattn_prefix_restore(runtime.get(), &prefix, 0, &shared, &none), VATTN_NOT_FOUND);
}

// Eight sequences in a pool for three.
TEST_F(ApiDiskTest, SpilledSequencesAnswerExactly) {
  {
    const Runtime probe(options_);
    Sequence sequence(probe);
    Rows rows;
    rows.AddGaussian(kShape, engine_, 1000);
    AppendRows(sequence, kShape, 0, rows);
    options_.host_bytes = probe.Stats().host_bytes_used * 7 / 2;
  }
  options_.spill = 1;
  const Runtime runtime(options_);
  std::vector<std::unique_ptr<Sequence>> sequences;
  std::vector<Rows> rows(8);
  for (Rows& each : rows) {
    sequences.push_back(std::make_unique<Sequence>(runtime));
    each.AddGaussian(kShape, engine_, 900);
    AppendRows(*sequences.back(), kShape, 0, each);
  }
  for (int i = 0; i < 24; ++i) {
    const size_t which = engine_() % 8;
    ExpectStep(runtime, *sequences[which], rows[which]);
  }
  const vattn_stats stats = runtime.Stats();
  EXPECT_GE(stats.spills, 10u);
  EXPECT_EQ(stats.full_refusals, 0u);
  EXPECT_GT(stats.disk_bytes_used, 0u);
  sequences.clear();
  EXPECT_EQ(runtime.Stats().disk_bytes_used, 0u);
}

}  // namespace
}  // namespace vattn::test
