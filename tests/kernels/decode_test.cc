#include "kernels/cpu/decode.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "kernels/cpu/workers.h"
#include "tests/kernels/group_fixture.h"

namespace vattn::cpu {
namespace {

void RunDecode(GroupFixture& f, Workers* workers = nullptr) {
  Decode({.storage = f.storage, .promise = f.promise, .groups = &f.group, .num_groups = 1},
         workers);
}

double Ref(const GroupFixture& f, const Attention& exact) {
  double norm2 = 0;
  for (const double x : exact.out) norm2 += x * x;
  const double floor =
      f.promise.norm == Norm::kValue ? f.promise.norm_floor * std::sqrt(exact.value_norm2) : 0;
  return std::max(std::sqrt(norm2), floor);
}

void ExpectExact(const GroupFixture& f, double tolerance = 3e-5) {
  for (int g = 0; g < f.shape.group_heads; ++g) {
    const Attention exact = f.AttendAll(g);
    EXPECT_LE(f.OutputError(g, exact), tolerance * std::sqrt(exact.value_norm2)) << "head " << g;
    EXPECT_NEAR(f.lse[g], exact.lse, tolerance);
  }
}

class DecodeTest : public testing::TestWithParam<std::tuple<DType, Dims>> {
 protected:
  GroupShape Shape(int heads, int value_bits = 0) const {
    const auto& [dtype, dims] = GetParam();
    return {.dtype = dtype,
            .dim_k = dims.k,
            .dim_v = dims.v,
            .shared_kv = dims.shared_kv,
            .group_heads = heads,
            .tokens = 900,
            .middle_end = 720,
            .value_bits = value_bits};
  }
};

TEST_P(DecodeTest, DensePolicyEqualsFloat64) {
  for (const int heads : kGroupSizes) {
    GroupFixture f(Shape(heads), heads, {.policy = Policy::kDense});
    RunDecode(f);
    ExpectExact(f);
    EXPECT_TRUE(f.group.all_read);
    EXPECT_EQ(f.group.selected, 704);
    for (const Verdict v : f.verdict) EXPECT_EQ(v, Verdict::kExact);
  }
}

// With so small an epsilon that pi = 1 everywhere, the estimate is the exact sum.
TEST_P(DecodeTest, EverythingSelectedEqualsDense) {
  for (const int bits : {0, 2, 4}) {
    GroupFixture f(
        Shape(4, bits), 2,
        {.epsilon = 1e-4f, .max_looks = 8, .min_selected = 1 << 30, .max_selected_share = 1});
    f.promise.max_selected_share = 1e30f;
    f.BuildIndex();
    RunDecode(f);
    ExpectExact(f);
    EXPECT_EQ(f.group.selected, 704);
    for (const Verdict v : f.verdict) EXPECT_EQ(v, Verdict::kVerified);
    for (const float e : f.error) EXPECT_EQ(e, 0);
  }
}

TEST_P(DecodeTest, UnverifiedHeadsAreReadWhole) {
  GroupFixture f(Shape(3), 2, {.epsilon = 1e-5f, .max_selected_share = .05f});
  f.BuildIndex();
  RunDecode(f);
  ExpectExact(f);
  EXPECT_TRUE(f.group.all_read);
  for (const Verdict v : f.verdict) EXPECT_EQ(v, Verdict::kDense);
  f.promise.on_unverified = OnUnverified::kBestEffort;
  RunDecode(f);
  EXPECT_FALSE(f.group.all_read);
  EXPECT_LE(f.group.selected, 704 / 10);
  for (const Verdict v : f.verdict) EXPECT_EQ(v, Verdict::kBestEffort);
  for (const float e : f.error) EXPECT_GT(e, f.promise.epsilon);
}

// Far fewer failures than delta among verified results, and not by reading everything.
TEST_P(DecodeTest, VerifiedResultsKeepThePromise) {
  GroupFixture f(Shape(3), 4, {.refresh = 1});
  f.BuildIndex();
  std::vector<Attention> exact;
  for (int g = 0; g < 3; ++g) exact.push_back(f.AttendAll(g));
  int verified = 0, failures = 0;
  for (int step = 0; step < 60; ++step) {
    f.group.step = step;
    RunDecode(f);
    for (int g = 0; g < 3; ++g) {
      if (f.verdict[g] != Verdict::kVerified) continue;
      ++verified;
      failures += f.OutputError(g, exact[g]) > f.promise.epsilon * Ref(f, exact[g]);
    }
  }
  EXPECT_GT(verified, 90);
  EXPECT_LE(failures, 45);  // alarm at 1e-6 for delta = 0.1 and 180 trials
}

INSTANTIATE_TEST_SUITE_P(Rows, DecodeTest,
                         testing::Combine(testing::Values(DType::kF32, DType::kF16, DType::kBF16),
                                          testing::ValuesIn(kDims)));

// Numerator and denominator of a single look with fresh random numbers and the same plan each time
// have exact attention as their mean, and V as their variance.
class UnbiasedTest : public testing::TestWithParam<int> {};

TEST_P(UnbiasedTest, MeanOverSeeds) {
  GroupFixture f(
      {.group_heads = 3, .tokens = 1300, .middle_end = 1152, .value_bits = GetParam()}, 6,
      {.on_unverified = OnUnverified::kBestEffort, .epsilon = .2f, .max_looks = 1, .refresh = 1});
  f.BuildIndex();
  constexpr int kSeeds = 1500, kParts = 9;
  std::vector<Attention> exact;
  for (int g = 0; g < 3; ++g) exact.push_back(f.AttendAll(g));
  // Denominator and eight elements of the numerator of each head, in units of exact D.
  std::vector<double> sum(3 * kParts), sum2(3 * kParts), error2(3), variance(3);
  for (int seed = 0; seed < kSeeds; ++seed) {
    f.ResetStates();
    f.group.key = MakeRandomKey(seed, 1, 0, 0);
    RunDecode(f);
    for (int g = 0; g < 3; ++g) {
      const std::vector<double> out = f.Output(g);
      const double d = std::exp(f.lse[g] - exact[g].lse);
      for (int p = 0; p < kParts; ++p) {
        const double x = p == 0 ? d - 1 : d * out[7 * p] - exact[g].out[7 * p];
        sum[g * kParts + p] += x;
        sum2[g * kParts + p] += x * x;
      }
      error2[g] += std::pow(f.OutputError(g, exact[g]), 2);
      variance[g] += f.group.scratch.head[g].variance;
    }
  }
  for (int i = 0; i < 3 * kParts; ++i) {
    const double mean = sum[i] / kSeeds, deviation = std::sqrt(sum2[i] / kSeeds - mean * mean);
    EXPECT_GT(deviation, 1e-5) << "nothing was sampled";
    EXPECT_NEAR(mean, 0, 5 * deviation / std::sqrt(kSeeds))
        << "head " << i / kParts << ", part " << i % kParts;
  }
  for (int g = 0; g < 3; ++g) EXPECT_NEAR(variance[g] / error2[g], 1, .2) << "head " << g;
}

INSTANTIATE_TEST_SUITE_P(ValueBits, UnbiasedTest, testing::Values(0, 2, 4));

// The same bits on one thread and two, over steps that carry controller state, for several groups.
TEST(DecodeThreadsTest, ResultsDoNotDependOnThreads) {
  for (const Policy policy :
       {Policy::kVerified, Policy::kTopK, Policy::kTopKUniform, Policy::kDense}) {
    for (const int bits : {0, 2}) {
      std::vector<std::vector<double>> first;
      for (const int threads : {0, 1, 2}) {
        Workers workers(std::max(threads, 1));
        GroupFixture f({.group_heads = 4, .tokens = 9000, .middle_end = 8832, .value_bits = bits},
                       3, {.policy = policy, .refresh = 8});
        f.promise.normal_quantile = 1.6449f;
        f.BuildIndex();
        std::vector<std::vector<double>> outputs;
        for (int step = 0; step < 3; ++step) {
          f.group.step = step;
          RunDecode(f, threads == 0 ? nullptr : &workers);
          for (int g = 0; g < 4; ++g) outputs.push_back(f.Output(g));
          outputs.push_back({f.lse.begin(), f.lse.end()});
          outputs.push_back({f.error.begin(), f.error.end()});
        }
        if (threads == 0) first = outputs;
        EXPECT_EQ(outputs, first) << "policy " << static_cast<int>(policy) << ", threads "
                                  << threads;
      }
    }
  }
}

// NaN in one head's query leaves the other heads right and the next step untouched.
TEST(DecodeHostileTest, NanQueryStaysInItsHead) {
  GroupFixture f({.group_heads = 3, .tokens = 1300, .middle_end = 1152});
  f.BuildIndex();
  const float before = static_cast<float>(f.Query(1, 0));
  f.SetQuery(1, 0, NAN);
  RunDecode(f);
  for (const int g : {0, 2}) {
    const Attention exact = f.AttendAll(g);
    EXPECT_LE(f.OutputError(g, exact), .2 * Ref(f, exact)) << g;
  }
  EXPECT_TRUE(std::isnan(f.Output(1)[0]));
  EXPECT_NE(f.verdict[1], Verdict::kVerified);
  f.SetQuery(1, 0, before);
  f.group.step = 1;
  RunDecode(f);
  GroupFixture fresh(f.shape);
  fresh.BuildIndex();
  fresh.group.step = 1;
  RunDecode(fresh);
  for (int g = 0; g < 3; ++g) EXPECT_EQ(f.Output(g), fresh.Output(g)) << g;
}

TEST(DecodeHostileTest, NanValueIsNotVerified) {
  GroupFixture f({.group_heads = 2, .tokens = 1300, .middle_end = 1152}, 1,
                 {.min_selected = 1 << 20, .max_selected_share = 1});
  f.BuildIndex();
  // The token of the largest score, which is drawn for certain.
  int64_t heaviest = f.shape.middle_begin;
  double most = -INFINITY;
  for (int64_t t = f.shape.middle_begin; t < f.shape.middle_end; ++t) {
    double score = 0;
    for (int c = 0; c < f.shape.dim_k; ++c) score += f.Query(0, c) * f.Key(t, c);
    if (score > most) most = score, heaviest = t;
  }
  f.SetValue(heaviest, 3, NAN);
  RunDecode(f);
  for (int g = 0; g < 2; ++g) EXPECT_NE(f.verdict[g], Verdict::kVerified);
}

TEST(SelectTest, ListsTheFirstLookWithItsProbabilities) {
  GroupFixture f({.group_heads = 4, .tokens = 3000, .middle_end = 2880});
  f.BuildIndex();
  Select({.storage = f.storage, .promise = f.promise, .groups = &f.group, .num_groups = 1}, {});
  ASSERT_GT(f.group.selected, 0);
  for (int64_t i = 0; i < f.group.selected; ++i) {
    const uint32_t token = f.group.scratch.token[i];
    ASSERT_TRUE(i == 0 || token > f.group.scratch.token[i - 1]);
    EXPECT_GE(token, 16u);
    EXPECT_LT(token, 2880u);
    EXPECT_LE(f.group.scratch.weight[i], 1);
    EXPECT_GT(f.group.scratch.weight[i], TokenUniform(f.group.key, token, 0, f.promise.refresh));
  }
}

}  // namespace
}  // namespace vattn::cpu
