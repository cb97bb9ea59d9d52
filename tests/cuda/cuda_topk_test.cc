// The baseline policies on CUDA against the CPU backend, which is the definition. On rows whose
// scores are exact whatever the order of sums, and full of ties, both choose the very same tokens;
// on other rows a token at the border may change sides (tests/cuda/cuda_twins.h).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>

#include "tests/cuda/cuda_calls.h"
#include "tests/cuda/cuda_twins.h"

namespace vattn::test {
namespace {

struct Case {
  const char* name;
  Shape shape;
  int32_t policy;
  int32_t index = VATTN_INDEX_BALANCED;
  float topk_share = .05f, base_share = .05f, epsilon = .1f;
  int32_t target = VATTN_TARGET_SDPA;
  float hot_share = .05f;
};

vattn_options CaseOptions(const Case& c) {
  vattn_options options = OptionsFor(c.shape);
  options.policy = c.policy;
  options.index = c.index;
  options.topk_share = c.topk_share;
  options.base_share = c.base_share;
  options.epsilon = c.epsilon;
  options.target = c.target;
  options.hot_share = c.hot_share;
  options.seed = 11;
  return options;
}

constexpr Shape kMha = {2, 2, 64, 64, false, VATTN_F32};
constexpr Shape kGqa4 = {8, 2, 64, 64, false, VATTN_F16};
constexpr Shape kGqa6 = {6, 1, 256, 256, false, VATTN_BF16};
constexpr Shape kGqa16 = {16, 1, 64, 64, false, VATTN_BF16};

// Gaussian, values about 1: where they cancel a sample would have to be nearly everything.
Rows RowsAboutOne(const Shape& shape, std::mt19937_64& engine, int64_t count) {
  Rows rows = Twins::GaussianRows(shape, engine, count);
  for (float& v : rows.v) v = Round(shape.dtype, v + 1);
  return rows;
}

// Whole numbers up to 2 in the first two dimensions of keys, 0 in the others: few scores, each of
// many tokens. Values stay as they are, so that outputs tell which tokens were taken.
void MakeWhole(int dim, std::vector<float>& values) {
  for (size_t i = 0; i < values.size(); ++i) {
    const float whole = std::clamp(std::round(values[i]), -2.f, 2.f);
    values[i] = static_cast<int>(i % static_cast<size_t>(dim)) < 2 ? whole : 0;
  }
}

Rows WholeRows(const Shape& shape, std::mt19937_64& engine, int64_t count) {
  Rows rows = RowsAboutOne(shape, engine, count);
  MakeWhole(shape.dim_k, rows.k);
  return rows;
}

class CudaTiesTest : public testing::TestWithParam<Case> {};

TEST_P(CudaTiesTest, ChoosesTheSameTokens) {
  SKIP_WITHOUT_DEVICE();
  const Case& c = GetParam();
  const Shape& shape = c.shape;
  const int group = shape.q_heads / shape.kv_heads;
  Twins twins(CaseOptions(c), {shape}, {1300, -1, 5000, 200, 2000}, WholeRows);
  int64_t lists = 0, moved = 0, sparse = 0;
  for (int step = 0; step < 5; ++step) {
    SCOPED_TRACE("step " + std::to_string(step));
    auto [on_cpu, on_cuda] = twins.Calls(0, 2);
    MakeWhole(shape.dim_k, on_cpu.q);
    MakeWhole(shape.dim_k, on_cpu.k_new);
    on_cuda.q = on_cpu.q, on_cuda.k_new = on_cpu.k_new;
    twins.BeginStep();
    twins.cpu.batch.Attend(on_cpu.Params());
    twins.cuda.batch.Attend(on_cuda.Params());
    EXPECT_EQ(on_cpu.middle, on_cuda.middle);
    for (int s = 0; s < twins.slots(); ++s) {
      for (int h = 0; h < shape.q_heads && twins.Filled(s); ++h) {
        SCOPED_TRACE("slot " + std::to_string(s) + " head " + std::to_string(h));
        const int q = s * shape.q_heads + h, kv = s * shape.kv_heads + h / group;
        const bool same = on_cpu.selected[kv] == on_cuda.selected[kv];
        if (h % group == 0) ++lists, moved += !same;
        EXPECT_EQ(on_cpu.verdict[q], on_cuda.verdict[q]);
        EXPECT_EQ(on_cuda.error[q], 0);
        EXPECT_EQ(on_cpu.looks[kv], on_cuda.looks[kv]);
        EXPECT_LE(on_cuda.fetched[kv], on_cuda.selected[kv]);
        sparse += on_cuda.verdict[q] == VATTN_VERDICT_BEST_EFFORT;
        if (!same) continue;
        EXPECT_LE(Norm(on_cpu.Out(s, h), on_cuda.Out(s, h)), 1e-4 * std::sqrt(shape.dim_v));
        EXPECT_NEAR(on_cpu.lse[q], on_cuda.lse[q], 1e-4 * (1 + std::abs(on_cpu.lse[q])));
      }
    }
  }
  // A budget is a rounded sum: now and then it is one more on one side.
  std::printf("%d of %d lists differ in length\n", static_cast<int>(moved),
              static_cast<int>(lists));
  EXPECT_LE(moved, c.policy == VATTN_POLICY_TOPK ? 0 : lists / 20);
  EXPECT_EQ(sparse == 0, c.topk_share == 1);
}

INSTANTIATE_TEST_SUITE_P(
    Policies, CudaTiesTest,
    testing::Values(
        Case{"topk_mha_f32", kMha, VATTN_POLICY_TOPK, VATTN_INDEX_EXACT},
        Case{"topk_gqa_f16", kGqa4, VATTN_POLICY_TOPK, VATTN_INDEX_EXACT, .3f},
        Case{"topk_gqa_bf16", kGqa6, VATTN_POLICY_TOPK, VATTN_INDEX_EXACT, .01f},
        Case{"topk_g16_bf16_cold", kGqa16, VATTN_POLICY_TOPK, VATTN_INDEX_EXACT, .1f, .05f, .1f,
             VATTN_TARGET_SDPA, 0},
        Case{"topk_none", kGqa4, VATTN_POLICY_TOPK, VATTN_INDEX_EXACT, 0},
        Case{"topk_all", kGqa6, VATTN_POLICY_TOPK, VATTN_INDEX_EXACT, 1},
        Case{"uniform_mha_f32", kMha, VATTN_POLICY_TOPK_UNIFORM, VATTN_INDEX_EXACT},
        Case{"uniform_gqa_f16", kGqa4, VATTN_POLICY_TOPK_UNIFORM, VATTN_INDEX_EXACT, .02f, .1f, .3f,
             VATTN_TARGET_NUMERATOR},
        Case{"uniform_gqa_bf16", kGqa6, VATTN_POLICY_TOPK_UNIFORM, VATTN_INDEX_EXACT, .1f, .01f,
             .2f, VATTN_TARGET_DENOMINATOR, .5f},
        Case{"uniform_g16_bf16_cold", kGqa16, VATTN_POLICY_TOPK_UNIFORM, VATTN_INDEX_EXACT, .05f,
             .05f, .4f, VATTN_TARGET_SDPA, 0},
        // The base sample is enough; or of two tokens alone.
        Case{"uniform_base", kGqa4, VATTN_POLICY_TOPK_UNIFORM, VATTN_INDEX_EXACT, .05f, .1f, 10},
        Case{"uniform_least", kMha, VATTN_POLICY_TOPK_UNIFORM, VATTN_INDEX_EXACT, .05f, 0, 1},
        Case{"uniform_without_topk", kGqa4, VATTN_POLICY_TOPK_UNIFORM, VATTN_INDEX_EXACT, 0, .05f,
             .2f},
        Case{"uniform_topk_all", kMha, VATTN_POLICY_TOPK_UNIFORM, VATTN_INDEX_EXACT, 1}),
    [](const auto& info) { return std::string(info.param.name); });

// An epsilon that nothing but the whole residual meets is exact, on both.
TEST(CudaTopKUniformTest, AllOfTheResidualIsExact) {
  SKIP_WITHOUT_DEVICE();
  for (const float base : {.01f, 1.f}) {
    const Case c{"", kGqa4, VATTN_POLICY_TOPK_UNIFORM, VATTN_INDEX_BALANCED, .05f, base, 1e-6f};
    Twins twins(CaseOptions(c), {c.shape}, {5000, 1400});
    AnswerTally tally;
    for (int step = 0; step < 3; ++step) {
      auto [on_cpu, on_cuda] = twins.Calls(0, 2);
      twins.BeginStep();
      twins.cpu.batch.Attend(on_cpu.Params());
      twins.cuda.batch.Attend(on_cuda.Params());
      CompareAnswers(twins, on_cpu, on_cuda, tally);
      EXPECT_EQ(on_cuda.selected[0], on_cuda.middle[0]);
    }
    EXPECT_EQ(tally.exact, 3 * 2 * c.shape.q_heads);
  }
}

class CudaTopKTest : public testing::TestWithParam<Case> {};

// Codes or true scores of Gaussian rows, around the edges of blocks and of the sets.
TEST_P(CudaTopKTest, AnswersAsTheCpu) {
  SKIP_WITHOUT_DEVICE();
  const Case& c = GetParam();
  vattn_options options = CaseOptions(c);
  options.host_bytes = uint64_t{512} << 20;
  Twins twins(options, {c.shape}, {0, 17, -1, 1151, 1152, 1215, 4097, 20000}, RowsAboutOne);
  AnswerTally tally;
  for (int step = 0; step < 6; ++step) {
    SCOPED_TRACE("step " + std::to_string(step));
    auto [on_cpu, on_cuda] = twins.Calls(0, 2);
    twins.BeginStep();
    twins.cpu.batch.Attend(on_cpu.Params());
    twins.cuda.batch.Attend(on_cuda.Params());
    CompareAnswers(twins, on_cpu, on_cuda, tally);
    if (HasFailure()) return;
  }
  ExpectAlike(tally);
}

// Errors are of the order of epsilon and more: CompareAnswers allows 4 epsilon between the two.
constexpr float kLoose = .5f;

INSTANTIATE_TEST_SUITE_P(Policies, CudaTopKTest,
                         testing::Values(Case{"topk_d64_g1_f32", kMha, VATTN_POLICY_TOPK,
                                              VATTN_INDEX_BALANCED, .1f, .05f, kLoose},
                                         Case{"topk_d128_g6_bf16",
                                              {12, 2, 128, 128, false, VATTN_BF16},
                                              VATTN_POLICY_TOPK,
                                              VATTN_INDEX_BALANCED,
                                              .1f,
                                              .05f,
                                              kLoose},
                                         Case{"topk_d80_g2_f16_exact",
                                              {4, 2, 80, 80, false, VATTN_F16},
                                              VATTN_POLICY_TOPK,
                                              VATTN_INDEX_EXACT,
                                              .1f,
                                              .05f,
                                              kLoose},
                                         Case{"topk_mla_g16_bf16",
                                              {16, 1, 576, 512, true, VATTN_BF16},
                                              VATTN_POLICY_TOPK,
                                              VATTN_INDEX_BALANCED,
                                              .1f,
                                              .05f,
                                              kLoose},
                                         Case{"uniform_d64_g1_f32", kMha, VATTN_POLICY_TOPK_UNIFORM,
                                              VATTN_INDEX_BALANCED, .05f, .02f, .05f},
                                         Case{"uniform_d128_g8_f16",
                                              {16, 2, 128, 128, false, VATTN_F16},
                                              VATTN_POLICY_TOPK_UNIFORM,
                                              VATTN_INDEX_BALANCED,
                                              .05f,
                                              .01f,
                                              .1f,
                                              VATTN_TARGET_DENOMINATOR},
                                         Case{"uniform_d96_g6_f32_exact",
                                              {12, 2, 96, 96, false, VATTN_F32},
                                              VATTN_POLICY_TOPK_UNIFORM,
                                              VATTN_INDEX_EXACT,
                                              .05f,
                                              .02f,
                                              .1f},
                                         Case{"uniform_d192_128_g16_bf16",
                                              {16, 1, 192, 128, false, VATTN_BF16},
                                              VATTN_POLICY_TOPK_UNIFORM,
                                              VATTN_INDEX_BALANCED,
                                              .05f,
                                              .1f,
                                              .3f,
                                              VATTN_TARGET_SDPA,
                                              0}),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace vattn::test
