#include "kernels/cpu/softmax.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "tests/kernels/group_fixture.h"

namespace vattn::cpu {
namespace {

constexpr int kDim = 16;

struct State {
  State() : floats(StateFloats(kDim)) { ResetState(view(), kDim); }
  SoftmaxState view() { return {floats.data(), kDim}; }
  // Adds exp(logit) of a token whose value is `value` in every dimension.
  void Add(float logit, float value) {
    if (logit > view().max()) RescaleState(view(), kDim, logit);
    const float e = std::exp(logit - view().max());
    for (int j = 0; j < kDim; ++j) view().numerator[j] += e * value;
    view().denominator() += e;
    view().value_norm2() += e * kDim * value * value;
  }

  std::vector<float> floats;
};

void ExpectState(State& state, const std::vector<std::pair<float, float>>& tokens) {
  double most = -INFINITY, mass = 0, sum = 0, square = 0;
  for (const auto& [logit, value] : tokens) most = std::max<double>(most, logit);
  for (const auto& [logit, value] : tokens) {
    const double e = std::exp(logit - most);
    mass += e, sum += e * value, square += e * kDim * value * value;
  }
  const double unit = std::exp(state.view().max() - most);
  EXPECT_NEAR(state.view().denominator() * unit, mass, 1e-5 * mass);
  EXPECT_NEAR(state.view().numerator[3] * unit, sum, 1e-5 * (std::abs(sum) + mass));
  EXPECT_NEAR(state.view().value_norm2() * unit, square, 1e-5 * square);
}

TEST(SoftmaxStateTest, MergedPartsEqualTheWhole) {
  std::mt19937_64 random(1);
  std::normal_distribution<float> normal;
  for (const float size : {1.f, 30.f, 1e4f}) {
    std::vector<std::pair<float, float>> tokens;
    State parts[5], whole;
    for (int i = 0; i < 100; ++i) {
      tokens.emplace_back(size * normal(random), normal(random));
      parts[i % 5].Add(tokens.back().first, tokens.back().second);
    }
    for (State& part : parts) MergeState(part.view(), kDim, whole.view());
    ExpectState(whole, tokens);
  }
}

TEST(SoftmaxStateTest, EmptyStatesChangeNothing) {
  State empty, into;
  MergeState(empty.view(), kDim, into.view());
  EXPECT_EQ(into.view().denominator(), 0);
  into.Add(-3, 2);
  MergeState(empty.view(), kDim, into.view());
  ExpectState(into, {{-3, 2}});
  MergeState(into.view(), kDim, empty.view());
  ExpectState(empty, {{-3, 2}});
}

TEST(SoftmaxStateTest, RescaleKeepsWhatItStandsFor) {
  State state;
  state.Add(2, 5);
  state.Add(1, -1);
  RescaleState(state.view(), kDim, 9);
  EXPECT_EQ(state.view().max(), 9);
  ExpectState(state, {{2, 5}, {1, -1}});
}

TEST(SoftmaxRowsTest, ExpRowIsWithinAFewRoundings) {
  for (const int64_t target : SimdTargets()) {
    UseSimdTarget(target);
    std::vector<float> x(4096), out(4096);
    for (int i = 0; i < 4096; ++i) x[i] = 1234 - static_cast<float>(i) * .02f;
    ExpRow(x.data(), 4096, 1234, out.data());
    for (int i = 0; i < 4096; ++i) {
      const double expected = std::exp(static_cast<double>(x[i] - 1234));
      ASSERT_NEAR(out[i], expected, 3e-7 * expected) << x[i];
    }
    for (float& v : x) v = -1e30f;
    x[1] = -INFINITY;
    ExpRow(x.data(), 16, 5, out.data());
    for (int i = 0; i < 16; ++i) EXPECT_EQ(out[i], 0);
    x.assign(16, -2);
    ExpRow(x.data(), 1, -2, x.data());  // in place
    EXPECT_EQ(x[0], 1);
  }
  UseSimdTarget(0);
}

TEST(SoftmaxRowsTest, MaxRow) {
  EXPECT_EQ(MaxRow(std::vector<float>{-5, -7}.data(), 2), -5);
  EXPECT_EQ(MaxRow(std::vector<float>{-5}.data(), 1), -5);
  EXPECT_EQ(MaxRow(std::vector<float>{-5, 2, -INFINITY, 9}.data(), 4), 9);
}

}  // namespace
}  // namespace vattn::cpu
