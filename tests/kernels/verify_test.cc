#include "kernels/cpu/verify.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "kernels/cpu/attend.h"
#include "kernels/cpu/estimate.h"
#include "kernels/cpu/sample.h"
#include "kernels/cpu/scan.h"
#include "kernels/sampling.h"
#include "tests/kernels/group_fixture.h"

namespace vattn::cpu {
namespace {

// A group with a draw of known probabilities, ready for its certificate.
struct DrawFixture : GroupFixture {
  explicit DrawFixture(const GroupShape& s, int count = 200, Promise p = {})
      : GroupFixture(s, 3, p) {
    BuildIndex();
    Scan();
    draw.count = count;
    draw.scale = .5f;
    for (int i = 0; i < count; ++i) {
      group.scratch.token[i] = static_cast<uint32_t>(s.middle_begin + 3 * i);
      group.scratch.weight[i] = i % 5 == 0 ? 2.5f : .05f * static_cast<float>(1 + i % 37);
    }
    ReadDraw(storage, group, draw, 0, {});
    for (int g = 0; g < s.group_heads; ++g) {
      HeadWork& head = group.scratch.head[g];
      head.shift = .5f;
      head.denominator = 5000 + static_cast<float>(g);
      head.least_ref = .8f;
      group.state[g] = {.eta2 = .3f, .cos2 = -1};
      for (int i = 0; i < count && s.value_bits > 0; ++i)
        group.scratch.predicted_e[g * group.scratch.stride + i] = PredictedE(g, i);
    }
    tail = ListTail(group, draw);
  }

  uint32_t Token(int i) const { return group.scratch.token[i]; }
  double Pi(int i) const { return std::min(1.f, draw.scale * group.scratch.weight[i]); }
  float PredictedE(int g, int i) const {
    return static_cast<float>(std::exp(Logit(g, Token(i)) - .5) * (.7 + .1 * (i % 5)));
  }

  // Residual a - b o of place i: e (v - o) - e^ (v^ - o), over D and the part of D that is not its
  // own.
  std::vector<double> Residual(int g, int i, const std::vector<float>& o) const {
    std::vector<double> r(shape.dim_v);
    const double e = std::exp(Logit(g, Token(i)) - group.scratch.head[g].shift),
                 d = group.scratch.head[g].denominator;
    const double unit = d * std::max(1 - e / (Pi(i) * d), 1e-3);
    for (int j = 0; j < shape.dim_v; ++j) {
      r[j] = e * (Value(Token(i), j) - o[j]) / unit;
      if (storage.value_bits > 0)
        r[j] -= PredictedE(g, i) * (DecodedValue(*this, Token(i), j) - o[j]) / unit;
    }
    return r;
  }

  // |residual|^2 of every place.
  std::vector<double> Norms(int g, const std::vector<float>& o) const {
    std::vector<double> norms(draw.count);
    for (int i = 0; i < draw.count; ++i) {
      for (const double x : Residual(g, i, o)) norms[i] += x * x;
    }
    return norms;
  }

  // V at `by` times the drawn probabilities: sum over the tail of |r|^2 (1 - pi') / (pi pi').
  double Variance(const std::vector<double>& norms, double by = 1) const {
    double sum = 0;
    for (int i = 0; i < draw.count; ++i) {
      const double pi = std::min(1., by * draw.scale * group.scratch.weight[i]);
      if (Pi(i) < 1) sum += norms[i] / Pi(i) * (1 - pi) / pi;
    }
    return sum;
  }

  std::vector<float> Verify(int g, int look, float offset = .1f, float unit = 1) {
    std::vector<float> o(shape.dim_v), dots(tail);
    for (int j = 0; j < shape.dim_v; ++j) o[j] = unit * (offset + .02f * static_cast<float>(j % 9));
    const Scratch& w = group.scratch;
    for (int64_t t = 0; t < tail; ++t) {
      const uint32_t token = Token(static_cast<int>(w.tail[t]));
      double sum = 0, coded = 0;
      for (int j = 0; j < shape.dim_v; ++j) {
        sum += o[j] * Value(token, j);
        if (storage.value_bits > 0) coded += o[j] * DecodedValue(*this, token, j);
      }
      dots[t] = static_cast<float>(sum);
      if (storage.value_bits > 0) w.code_dot[g * w.stride + t] = static_cast<float>(coded);
    }
    // The weights that an estimate leaves behind.
    for (int i = 0; i < draw.count; ++i) {
      const double e = std::exp(Logit(g, Token(i)) - w.head[g].shift);
      w.scaled[g * w.stride + i] = static_cast<float>(e / Pi(i));
    }
    VerifyHead(storage, promise, group, draw, tail, look, g, o.data(), dots.data());
    return o;
  }

  Draw draw;
  int64_t tail = 0;
};

class VerifyTest : public testing::TestWithParam<std::tuple<DType, Dims, int>> {
 protected:
  GroupShape Shape(int heads) const {
    const auto& [dtype, dims, bits] = GetParam();
    return {.dtype = dtype,
            .dim_k = dims.k,
            .dim_v = dims.v,
            .shared_kv = dims.shared_kv,
            .group_heads = heads,
            .tokens = 900,
            .middle_end = 720,
            .value_bits = bits};
  }
};

// Sum of the squared terms of the variance over its square, each term times pi^power.
double ShareOfSquares(const DrawFixture& f, const std::vector<double>& norms, int power) {
  double squares = 0;
  for (int i = 0; i < f.draw.count; ++i) {
    const double pi = f.Pi(i);
    if (pi < 1) squares += std::pow(norms[i] * (1 - pi) / pi / pi, 2) * std::pow(pi, power);
  }
  return squares / std::pow(f.Variance(norms), 2);
}
double SquaresShare(const DrawFixture& f, const std::vector<double>& norms) {
  return ShareOfSquares(f, norms, 0);
}
double OwnShare(const DrawFixture& f, const std::vector<double>& norms) {
  return ShareOfSquares(f, norms, 1);
}

TEST_P(VerifyTest, VarianceRankAndBound) {
  DrawFixture f(Shape(3));
  ASSERT_EQ(f.tail, 160);
  for (int64_t t = 0; t < f.tail; ++t)
    ASSERT_LT(f.Pi(static_cast<int>(f.group.scratch.tail[t])), 1);
  for (int g = 0; g < 3; ++g) {
    const std::vector<float> o = f.Verify(g, g + 1);
    const HeadWork& head = f.group.scratch.head[g];
    const double variance = f.Variance(f.Norms(g, o));
    EXPECT_NEAR(head.variance, variance, 1e-3 * variance);
    EXPECT_GE(head.cos2, 0);
    EXPECT_LE(head.cos2, 1);
    EXPECT_NEAR(head.few, SquaresShare(f, f.Norms(g, o)), 1e-3);
    EXPECT_EQ(head.z,
              Widening(f.promise, g + 1, head.few) * QuantileAt(f.promise, g + 1, head.cos2));
    EXPECT_NEAR(head.bound, head.z * std::sqrt(variance) / head.ref, 2e-3 * head.bound);
    // What the next plan learns: the weighted distance of values and the index error.
    double mass = 0, spread = 0, relative = 0, estimate = 0;
    for (int i = 0; i < f.draw.count; ++i) {
      if (f.Pi(i) >= 1) continue;
      const double e = std::exp(f.Logit(g, f.Token(i)) - head.shift),
                   predicted_e = f.PredictedE(g, i);
      double distance2 = 0;
      for (int j = 0; j < f.shape.dim_v; ++j)
        distance2 += std::pow(f.Value(f.Token(i), j) - o[j], 2);
      mass += e / f.Pi(i);
      spread += e / f.Pi(i) * distance2;
      relative += (e - predicted_e) * (e - predicted_e) / f.Pi(i);
      estimate += predicted_e * predicted_e / f.Pi(i);
    }
    EXPECT_NEAR(f.group.state[g].spread, spread / mass, 1e-3 * spread / mass);
    if (f.storage.value_bits > 0) {
      EXPECT_NEAR(f.group.state[g].eta2, .3 + .2 * (std::clamp(relative / estimate, .01, 4.) - .3),
                  1e-3);
    }
  }
}

TEST_P(VerifyTest, GrowthMeetsTheTargetWithTheLeastFactor) {
  for (const float epsilon : {.02f, .3f}) {
    Promise promise;
    promise.epsilon = epsilon;
    DrawFixture f(Shape(2), 200, promise);
    std::vector<std::vector<double>> norms;
    for (int g = 0; g < 2; ++g) {
      norms.push_back(f.Norms(g, f.Verify(g, 1)));
      f.group.scratch.head[g].ref =
          static_cast<float>(std::sqrt(f.Variance(norms[g])) * (3 + 2 * g) / epsilon / 4);
    }
    const float factor = Growth(f.promise, f.group, f.draw, f.tail, 2);
    ASSERT_GE(factor, 1.05f);
    ASSERT_LT(factor, 64);
    bool slack = true;
    for (int g = 0; g < 2; ++g) {
      const HeadWork& head = f.group.scratch.head[g];
      const double z = Widening(f.promise, 2, head.few) * QuantileAt(f.promise, 2, head.cos2);
      const double limit = .98 * epsilon * head.ref;
      EXPECT_LE(z * std::sqrt(f.Variance(norms[g], factor)), limit * 1.002);
      slack = slack && z * std::sqrt(f.Variance(norms[g], factor * .99)) <= limit * .998;
    }
    EXPECT_FALSE(slack && factor > 1.06) << "a smaller factor would do";
  }
}

INSTANTIATE_TEST_SUITE_P(Rows, VerifyTest,
                         testing::Combine(testing::Values(DType::kF32, DType::kF16, DType::kBF16),
                                          testing::Values(Dims{64, 64, false}, Dims{80, 96, false},
                                                          Dims{128, 128, false}),
                                          testing::Values(0, 2, 4)));
INSTANTIATE_TEST_SUITE_P(Mla, VerifyTest,
                         testing::Combine(testing::Values(DType::kBF16),
                                          testing::Values(Dims{576, 512, true}),
                                          testing::Values(0, 2)));

GroupShape PlainShape() { return {.group_heads = 1, .tokens = 900, .middle_end = 720}; }

TEST(EffectiveRankTest, CollinearResidualsHaveRankOne) {
  DrawFixture f(PlainShape());
  for (int64_t t = 16; t < 720; ++t) {
    for (int j = 0; j < 64; ++j) {
      f.SetValue(
          t, j,
          .1f + .02f * static_cast<float>(j % 9) + (j == 5 ? static_cast<float>(t % 4 + 1) : 0.f));
    }
  }
  ReadDraw(f.storage, f.group, f.draw, 0, {});
  f.Verify(0, 1);
  EXPECT_NEAR(f.group.scratch.head[0].cos2, 1, 1e-3);
}

TEST(EffectiveRankTest, OrthogonalResidualsCountOnlyThemselves) {
  DrawFixture f(PlainShape(), 64);
  for (int i = 0; i < 64; ++i) {
    for (int j = 0; j < 64; ++j)
      f.SetValue(f.Token(i), j, .1f + .02f * static_cast<float>(j % 9) + (j == i ? 1.f : 0.f));
  }
  ReadDraw(f.storage, f.group, f.draw, 0, {});
  const std::vector<float> o = f.Verify(0, 1);
  EXPECT_NEAR(f.group.scratch.head[0].cos2, OwnShare(f, f.Norms(0, o)), 1e-3);
}

// Residuals of independent directions: mean squared cosine 1 / 64; smoothed, it settles near it.
TEST(EffectiveRankTest, IsotropicResidualsHaveTheRankOfTheSpace) {
  DrawFixture f(PlainShape());
  const std::vector<float> o = f.Verify(0, 1, .22f);
  const double same = OwnShare(f, f.Norms(0, o));
  EXPECT_NEAR(f.group.scratch.head[0].cos2, same + (1 - same) / 64, .03);
}

// Four values of 1e-12 multiplied, or of 1e12, are none of fp32's.
TEST(EffectiveRankTest, TheUnitOfValuesDoesNotMatter) {
  const auto cos2 = [](float unit) {
    DrawFixture f({.group_heads = 1});
    for (int64_t t = 0; t < f.shape.tokens; ++t) {
      for (int j = 0; j < f.shape.dim_v; ++j) {
        f.SetValue(t, j, unit * static_cast<float>(f.Value(t, j)));
      }
    }
    ReadDraw(f.storage, f.group, f.draw, 0, {});
    f.Verify(0, 1, /*offset=*/0, unit);
    return f.group.state[0].cos2;
  };
  const float usual = cos2(1);
  EXPECT_GT(usual, .005f);
  for (const float unit : {1e-12f, 1e12f}) EXPECT_NEAR(cos2(unit) / usual, 1, 1e-2) << unit;
}

// No error only when the whole middle was read; what no chance was taken with tells nothing of the
// rest.
TEST(CertificateTest, WithoutATailOnlyEverythingIsExact) {
  for (const int count : {703, 704}) {
    DrawFixture f(PlainShape(), 200);
    f.draw.count = count;
    for (int i = 0; i < count; ++i) {
      f.group.scratch.token[i] = static_cast<uint32_t>(16 + i);
      f.group.scratch.weight[i] = INFINITY;
    }
    ReadDraw(f.storage, f.group, f.draw, 0, {});
    f.tail = ListTail(f.group, f.draw);
    EXPECT_EQ(f.tail, 0);
    f.Verify(0, 1);
    EXPECT_EQ(f.group.scratch.head[0].bound, count == 704 ? 0 : INFINITY);
  }
}

TEST(CertificateTest, AFewSampledTokensAreNoJudge) {
  DrawFixture f(PlainShape(), 5);
  f.Verify(0, 1);
  EXPECT_EQ(f.group.scratch.head[0].bound, INFINITY);
  EXPECT_GE(Growth(f.promise, f.group, f.draw, f.tail, 2), 4);
}

// With value codes the estimate is a sum over codes, less what was read of it. Where the sum is far
// above the difference, fp32 does not hold the answer, read whole or not.
TEST(CertificateTest, WhatCancellationAteIsNotVerified) {
  for (const bool exact : {false, true}) {
    HeadState state;
    HeadWork work;
    work.denominator = work.least_ref = 1;
    const TailSums fair = {.variance = 1e-6, .squares = 1e-14, .coded = 900};
    DrawFixture f(PlainShape());
    JudgeHead(f.promise, 1, fair, .1f, 100, exact, 1, state, work);
    EXPECT_LT(work.bound, .1f);
    TailSums cancelled = fair;
    cancelled.coded = 1100;
    JudgeHead(f.promise, 1, cancelled, .1f, 100, exact, 1, state, work);
    EXPECT_EQ(work.bound, INFINITY);
  }
}

TEST(CertificateTest, NanIsNotVerified) {
  DrawFixture f(PlainShape());
  f.SetValue(f.Token(3), 7, NAN);
  ReadDraw(f.storage, f.group, f.draw, 0, {});
  f.Verify(0, 1);
  EXPECT_FALSE(f.group.scratch.head[0].bound <= 10);
}

// Student's t over the normal quantile, from tables: 0.05 two-sided is 1.95996, with 20, 10 and 5
// degrees of freedom 2.08596, 2.22814 and 2.57058.
TEST(CertificateTest, FewTermsWidenTheQuantileAsStudentsT) {
  float table[kMaxLooks][kQuantileBins + 1];
  std::fill(&table[0][0], &table[0][0] + sizeof(table) / sizeof(float), 1.95996f);
  const Promise promise = {.quantile = table};
  EXPECT_EQ(Widening(promise, 1, 0), 1);
  for (const auto& [freedom, t, tolerance] :
       {std::tuple{20.f, 2.08596f, 1e-3f}, {10.f, 2.22814f, 4e-3f}, {5.f, 2.57058f, 3e-2f}}) {
    EXPECT_NEAR(1.95996f * Widening(promise, 1, 2 / freedom), t, tolerance * t);
  }
}

TEST(CertificateTest, QuantilesAreInterpolated) {
  DrawFixture f(PlainShape());
  for (int look = 1; look <= f.promise.max_looks; ++look) {
    const float* z = f.promise.quantile[look - 1];
    EXPECT_EQ(QuantileAt(f.promise, look, 0), z[0]);
    EXPECT_EQ(QuantileAt(f.promise, look, 1), z[kQuantileBins]);
    EXPECT_EQ(QuantileAt(f.promise, look, 7), z[kQuantileBins]);
    EXPECT_EQ(QuantileAt(f.promise, look, -1), z[0]);
    for (int bin = 0; bin < kQuantileBins; ++bin) {
      EXPECT_NEAR(QuantileAt(f.promise, look, (static_cast<float>(bin) + .25f) / kQuantileBins),
                  .75 * z[bin] + .25 * z[bin + 1], 1e-5);
    }
  }
}

}  // namespace
}  // namespace vattn::cpu
