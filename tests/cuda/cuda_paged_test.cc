// vattn_paged on a device beside the same pool on the CPU: the same rows, requests and queries, the same
// random numbers. Captured steps are replayed by the engine of paged_engine_test.
#include <gtest/gtest.h>

#include <cmath>

#include "tests/api/paged_pool.h"
#include "tests/cuda/cuda_calls.h"

namespace vattn::test {
namespace {

vattn_options On(int32_t backend, const Shape& shape, int32_t policy) {
  vattn_options options = OptionsFor(shape);
  options.backend = backend;
  options.policy = policy;
  options.epsilon = .2f;
  return options;
}

struct Twin {
  const char* name;
  int block_tokens;
  bool packed;
  int32_t dtype, policy;
  int dim = 64;
};

class CudaPagedTest : public testing::TestWithParam<Twin> {};

TEST_P(CudaPagedTest, AnswersAsTheCpu) {
  SKIP_WITHOUT_DEVICE();
  const Twin& twin = GetParam();
  const Shape shape{8, 2, twin.dim, twin.dim, false, twin.dtype};
  const PoolLayout layout{"", shape, twin.block_tokens, twin.packed};
  const int64_t blocks = 14000 / twin.block_tokens;
  Pool on_cpu(layout, On(VATTN_BACKEND_CPU, shape, twin.policy), blocks);
  Pool on_cuda(layout, On(VATTN_BACKEND_CUDA, shape, twin.policy), blocks);
  Request a[2] = {Request::In(2), Request::In(2)}, b[2] = {Request::In(5), Request::In(5)};
  Pool* const pools[2] = {&on_cpu, &on_cuda};
  for (int p = 0; p < 2; ++p) {
    pools[p]->Grow(a[p], 5000, p == 0);
    pools[p]->Grow(b[p], 3100, p == 1);
  }
  int64_t selected[2] = {}, heads = 0, apart = 0, verdicts = 0;
  for (int step = 0; step < 8; ++step) {
    const int tokens = step % 2 == 0 ? 1 : 3;
    PagedCall calls[2];
    for (int p = 0; p < 2; ++p) {
      pools[p]->Grow(a[p], tokens), pools[p]->Grow(b[p], tokens);
      calls[p] = pools[p]->Step({&a[p], &b[p]}, {tokens, tokens}, 2);
    }
    ASSERT_EQ(calls[0].q, calls[1].q) << "the pools are not twins";
    for (size_t g = 0; g < calls[0].selected.size(); ++g) {
      EXPECT_EQ(calls[0].middle[g], calls[1].middle[g]);
      for (int p = 0; p < 2; ++p) selected[p] += calls[p].selected[g];
      EXPECT_LE(calls[1].fetched[g], calls[1].selected[g]);
    }
    for (size_t i = 0; i < calls[0].lse.size(); ++i, ++heads) {
      verdicts += calls[0].verdict[i] != calls[1].verdict[i];
      apart += std::abs(calls[0].lse[i] - calls[1].lse[i]) > 1e-3;
    }
  }
  EXPECT_GT(selected[0], 0);
  // Rounding moves rows that lie at the border of a draw, and few verdicts.
  EXPECT_NEAR(static_cast<double>(selected[1]), static_cast<double>(selected[0]),
              .01 * static_cast<double>(selected[0]));
  EXPECT_LE(verdicts, 1 + heads / 50);
  EXPECT_LE(apart, 1 + heads / 10);
}

INSTANTIATE_TEST_SUITE_P(
    Pools, CudaPagedTest,
    testing::Values(Twin{"blocks_of_16", 16, false, VATTN_F32, VATTN_POLICY_VERIFIED},
                    Twin{"blocks_of_48_packed", 48, true, VATTN_F16, VATTN_POLICY_VERIFIED},
                    Twin{"blocks_of_256", 256, false, VATTN_F32, VATTN_POLICY_VERIFIED},
                    Twin{"wide_rows", 64, false, VATTN_BF16, VATTN_POLICY_VERIFIED, 128},
                    Twin{"topk", 32, false, VATTN_F32, VATTN_POLICY_TOPK},
                    Twin{"topk_uniform", 16, true, VATTN_F32, VATTN_POLICY_TOPK_UNIFORM},
                    Twin{"dense", 16, false, VATTN_F16, VATTN_POLICY_DENSE}),
    [](const auto& info) { return std::string(info.param.name); });

// Rows that were fetched once are in the hot set, until their slots are written again.
TEST(CudaPagedHotSetTest, HoldsRowsUntilTheirSlotsAreWritten) {
  SKIP_WITHOUT_DEVICE();
  const Shape shape{8, 2, 64, 64, false, VATTN_F32};
  Pool pool({"", shape, 16, false}, On(VATTN_BACKEND_CUDA, shape, VATTN_POLICY_VERIFIED), 400);
  Request r;
  pool.Grow(r, 5000);
  const auto fetched = [&](bool rewrite) {
    if (rewrite) pool.Write(r, 0, true);
    pool.Grow(r, 1);
    const PagedCall call = pool.Step({&r}, {1}, 1);
    return std::pair{call.fetched[0] + call.fetched[1], call.selected[0] + call.selected[1]};
  };
  fetched(false);
  fetched(false);
  const auto [few, of] = fetched(false);
  EXPECT_LT(few, of / 2) << "of " << of;
  const auto [all, selected] = fetched(true);
  EXPECT_EQ(all, selected);
}

}  // namespace
}  // namespace vattn::test
