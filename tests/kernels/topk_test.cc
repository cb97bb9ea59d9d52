#include "kernels/cpu/topk.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/cpu/decode.h"
#include "kernels/sampling.h"
#include "tests/kernels/group_fixture.h"

namespace vattn::cpu {
namespace {

// Rows of METHOD.md, "Policies", before clamping, from plain formulas: b = (z n sigma / tau)^2 with
// the finite population correction.
double Corrected(double root, double n) { return root * root / (1 + root * root / n); }

constexpr SampleMoments kMoments = {.e = .5, .e2 = .4, .ev_norm2 = .2, .ev2 = 1.1};
constexpr double kSigmaD = .3872983346207417;  // sqrt(0.4 - 0.5^2)
constexpr double kSigmaN = .9486832980505138;  // sqrt(1.1 - 0.2)

TEST(SampleBudgetTest, Denominator) {
  for (const double n : {1e3, 1e5}) {
    const double d = 40 + n * .5, root = 1.96 * n * kSigmaD / (.05 * d);
    EXPECT_EQ(
        SampleBudget(Target::kDenominator, .05f, 1.96f, static_cast<int64_t>(n), 2, kMoments, d, 7),
        static_cast<int64_t>(std::ceil(Corrected(root, n))));
  }
}

TEST(SampleBudgetTest, Numerator) {
  const double n = 50000, norm = 9000, root = 1.6449 * n * kSigmaN / (.1 * norm);
  EXPECT_NEAR(static_cast<double>(
                  SampleBudget(Target::kNumerator, .1f, 1.6449f, 50000, 2, kMoments, 1, norm)),
              Corrected(root, n), 2);
}

// The least, over splits with eps1 + eps2 (1 + eps) = eps, of the larger of both needs.
TEST(SampleBudgetTest, SdpaIsTheBestSplit) {
  for (const double epsilon : {.05, .3}) {
    for (const double norm : {4000., 40000.}) {
      const double n = 50000, d = 30000;
      double least = 1e300;
      for (int i = 1; i < 20000; ++i) {
        const double eps2 = epsilon / (1 + epsilon) * i / 20000,
                     eps1 = epsilon - eps2 * (1 + epsilon);
        least = std::min(
            least, std::max(1.96 * n * kSigmaN / (eps1 * norm), 1.96 * n * kSigmaD / (eps2 * d)));
      }
      EXPECT_NEAR(static_cast<double>(SampleBudget(Target::kSdpa, static_cast<float>(epsilon),
                                                   1.96f, 50000, 2, kMoments, d, norm)),
                  Corrected(least, n), 2 + 1e-3 * n);
    }
  }
}

TEST(SampleBudgetTest, StaysBetweenBaseAndEverything) {
  const SampleMoments constant = {.e = 1, .e2 = 1, .ev_norm2 = 1, .ev2 = 1};
  EXPECT_EQ(SampleBudget(Target::kSdpa, .1f, 1.96f, 1000, 50, constant, 1000, 1000), 50);
  EXPECT_EQ(SampleBudget(Target::kSdpa, 1e-9f, 1.96f, 1000, 50, kMoments, 500, 100), 1000);
}

void RunDecode(GroupFixture& f) {
  Decode({.storage = f.storage, .promise = f.promise, .groups = &f.group, .num_groups = 1}, {});
}

// Sinks, window and the k best of the middle by logit, ties to the lower token.
std::vector<int64_t> BestTokens(const GroupFixture& f, int64_t k,
                                const std::vector<double>& score) {
  std::vector<int64_t> middle(f.shape.middle_end - f.shape.middle_begin);
  std::iota(middle.begin(), middle.end(), f.shape.middle_begin);
  std::stable_sort(middle.begin(), middle.end(),
                   [&](int64_t a, int64_t b) { return score[a] > score[b]; });
  std::vector<int64_t> tokens(middle.begin(), middle.begin() + k);
  for (int64_t t = 0; t < f.shape.tokens; ++t) {
    if (t < f.shape.middle_begin || t >= f.shape.middle_end) tokens.push_back(t);
  }
  return tokens;
}

TEST(TopKTest, ReadsTheExactBest) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const int heads : kGroupSizes) {
      for (const float share : {0.f, .01f, .2f, 1.f}) {
        GroupFixture f({.dtype = dtype, .group_heads = heads, .tokens = 700, .middle_end = 528},
                       heads,
                       {.policy = Policy::kTopK, .index = IndexKind::kExact, .topk_share = share});
        RunDecode(f);
        const int64_t k = static_cast<int64_t>(std::ceil(share * 512));
        EXPECT_GE(f.group.selected, k);
        EXPECT_LE(f.group.selected, std::min<int64_t>(512, k * heads));
        for (int g = 0; g < heads; ++g) {
          std::vector<double> score(700);
          for (int64_t t = 0; t < 700; ++t) score[t] = f.Logit(g, t);
          const Attention exact = f.Attend(g, BestTokens(f, k, score));
          EXPECT_LE(f.OutputError(g, exact), 1e-4 * std::sqrt(exact.value_norm2));
          EXPECT_NEAR(f.lse[g], exact.lse, 1e-4);
          EXPECT_EQ(f.verdict[g], k == 512 ? Verdict::kExact : Verdict::kBestEffort);
        }
      }
    }
  }
}

TEST(TopKTest, TiesGoToTheLowerToken) {
  GroupFixture f({.group_heads = 2, .tokens = 700, .middle_end = 528}, 1,
                 {.policy = Policy::kTopK, .index = IndexKind::kExact, .topk_share = .25f});
  for (int64_t t = 0; t < 700; ++t) {
    for (int c = 0; c < 64; ++c) f.SetKey(t, c, c == 0 ? static_cast<float>(t % 3 == 0) : 0.f);
  }
  for (int g = 0; g < 2; ++g) f.SetQuery(g, 0, 8);
  RunDecode(f);
  std::vector<int64_t> expected(f.group.scratch.token, f.group.scratch.token + f.group.selected);
  std::vector<int64_t> best;
  for (int64_t t = 18; best.size() < 128; t += 3) best.push_back(t);
  EXPECT_EQ(expected, best);
}

Promise UniformPromise(float epsilon, float topk, float base) {
  return {.policy = Policy::kTopKUniform,
          .index = IndexKind::kExact,
          .epsilon = epsilon,
          .topk_share = topk,
          .base_share = base,
          .refresh = 1,
          .normal_quantile = 1.96f};
}

TEST(TopKUniformTest, AllOfTheResidualIsDense) {
  for (const float base : {.01f, 1.f}) {
    GroupFixture f({.group_heads = 3, .tokens = 700, .middle_end = 528}, 2,
                   UniformPromise(1e-6f, .05f, base));
    RunDecode(f);
    EXPECT_TRUE(f.group.all_read);
    for (int g = 0; g < 3; ++g) {
      const Attention exact = f.AttendAll(g);
      EXPECT_LE(f.OutputError(g, exact), 1e-4 * std::sqrt(exact.value_norm2));
      EXPECT_EQ(f.verdict[g], Verdict::kExact);
    }
  }
}

// With the size of the sample fixed, numerator and denominator have the exact ones as their mean.
TEST(TopKUniformTest, UnbiasedOverSeeds) {
  GroupFixture f({.group_heads = 2, .tokens = 700, .middle_end = 528}, 2,
                 UniformPromise(10, .05f, .2f));
  constexpr int kSeeds = 2000, kParts = 9;
  std::vector<double> sum(2 * kParts), sum2(2 * kParts);
  std::vector<Attention> exact = {f.AttendAll(0), f.AttendAll(1)};
  for (int seed = 0; seed < kSeeds; ++seed) {
    f.group.key = MakeRandomKey(seed, 1, 0, 0);
    RunDecode(f);
    for (int g = 0; g < 2; ++g) {
      const double d = std::exp(f.lse[g] - exact[g].lse);
      const std::vector<double> out = f.Output(g);
      for (int p = 0; p < kParts; ++p) {
        const double x = p == 0 ? d - 1 : d * out[7 * p] - exact[g].out[7 * p];
        sum[g * kParts + p] += x;
        sum2[g * kParts + p] += x * x;
      }
    }
  }
  for (int i = 0; i < 2 * kParts; ++i) {
    const double mean = sum[i] / kSeeds, deviation = std::sqrt(sum2[i] / kSeeds - mean * mean);
    EXPECT_GT(deviation, 1e-4);
    EXPECT_NEAR(mean, 0, 5 * deviation / std::sqrt(kSeeds))
        << "head " << i / kParts << ", part " << i % kParts;
  }
}

}  // namespace
}  // namespace vattn::cpu
