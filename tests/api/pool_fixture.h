// Runtimes whose pool is counted in blocks, for tests of reservations, quotas and kept prefixes.
#ifndef VATTN_TESTS_API_POOL_FIXTURE_H_
#define VATTN_TESTS_API_POOL_FIXTURE_H_

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

// One layer, one KV head: 256 tokens are a block. The middle begins at 64 tokens.
class PoolFixture : public testing::Test {
 protected:
  PoolFixture()
      : folder_(std::filesystem::temp_directory_path() /
                (std::string("pool_fixture.") + std::to_string(getpid()))) {
    std::filesystem::create_directory(folder_);
    options_ = OptionsFor(kShape);
    options_.backend = VATTN_BACKEND_CPU;
    options_.policy = VATTN_POLICY_DENSE;
    options_.window = 32;
    options_.exact_below = 64;
    options_.huge_pages = 0;
    const Runtime probe(options_);
    const Sequence sequence(probe, 0, 1);
    block_bytes_ = probe.Stats().host_bytes_used;
  }
  ~PoolFixture() override { std::filesystem::remove_all(folder_); }

  void MakeRuntime(int64_t blocks) {
    options_.host_bytes = static_cast<uint64_t>(blocks) * block_bytes_;
    runtime_ = std::make_unique<Runtime>(options_);
  }

  int64_t InUse() const { return Blocks(runtime_->Stats().host_bytes_used); }
  int64_t Reserved() const { return Blocks(runtime_->Stats().host_bytes_reserved); }
  int64_t Free() const { return Blocks(runtime_->Stats().host_bytes_limit) - InUse(); }
  int64_t Blocks(uint64_t bytes) const { return static_cast<int64_t>(bytes / block_bytes_); }

  // Rows that both the sequence and the caller's copy get.
  vattn_code TryAppend(Sequence& sequence, Rows& rows, int64_t count) {
    Rows more = rows;
    more.AddGaussian(kShape, engine_, count);
    vattn_append_params params = Init<vattn_append_params>();
    params.num_tokens = count;
    params.k = more.k.data() + rows.k.size();
    params.v = more.v.data() + rows.v.size();
    const vattn_code code = vattn_append(sequence.get(), &params);
    if (code == VATTN_OK) rows = std::move(more);
    return code;
  }

  // Steps with a new token each, and exact answers. The code of the first step refused, else OK.
  vattn_code TrySteps(const Sequence& sequence, Rows& rows, int steps) {
    Batch batch(*runtime_, 1);
    Check(vattn_batch_set(batch.get(), 0, sequence.get()));
    for (int i = 0; i < steps; ++i) {
      const vattn_code code = vattn_batch_begin_step(batch.get(), 1, nullptr);
      if (code != VATTN_OK) return code;
      Call call(kShape, 1, 0);
      call.Fill(engine_, 1);
      batch.Attend(call.Params());
      call.AddTo(rows, 0);
      if (i == 0 || i == steps - 1) ExpectExact(call, 0, rows);
    }
    return VATTN_OK;
  }

  static std::vector<int32_t> Tokens(int64_t count, int32_t first = 0) {
    std::vector<int32_t> tokens(static_cast<size_t>(count));
    std::iota(tokens.begin(), tokens.end(), first);
    return tokens;
  }

  static void ExpectError(const std::string& part) {
    EXPECT_NE(std::string(vattn_last_error()).find(part), std::string::npos) << vattn_last_error();
  }

  static inline const Shape kShape = {2, 1, 16, 16, false, VATTN_F32};
  const std::filesystem::path folder_;
  vattn_options options_;
  uint64_t block_bytes_ = 0;
  std::mt19937_64 engine_{1};
  std::unique_ptr<Runtime> runtime_;
};

}  // namespace vattn::test

#endif  // VATTN_TESTS_API_POOL_FIXTURE_H_
