#include "kernels/cpu/sample.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "kernels/cpu/decode.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/scan.h"
#include "kernels/cpu/workers.h"
#include "kernels/sampling.h"
#include "tests/kernels/group_fixture.h"

namespace vattn::cpu {
namespace {

// Gains and floors of every head, in the unit of the estimates.
struct Weights {
  Weights(const GroupFixture& f, double level) {
    for (int g = 0; g < f.shape.group_heads; ++g) {
      float most = -INFINITY;
      for (int64_t b = 0; b < NumBlocks(f.group); ++b) {
        most = std::max(most, f.group.scratch.shift[b * f.shape.group_heads + g]);
      }
      log_gain.push_back(-most + .1f * static_cast<float>(g));
      floor.push_back(static_cast<float>(level * (g % 3)));
    }
  }
  Inclusion At(float scale) const {
    return {.log_gain = log_gain.data(), .floor = floor.data(), .scale = scale};
  }

  std::vector<float> log_gain, floor;
};

// gain e^ of a token and head, and the token's weight, by the definition.
double Part(const GroupFixture& f, const Weights& w, int head, int64_t token) {
  const int64_t block = token / kBlockTokens - FirstBlock(f.group);
  return EstimateOf(f.group, token, head) *
         std::exp(static_cast<double>(w.log_gain[head]) +
                  f.group.scratch.shift[block * f.shape.group_heads + head]);
}

double Weight(const GroupFixture& f, const Weights& w, int64_t token) {
  double sum = 0;
  for (int g = 0; g < f.shape.group_heads; ++g) {
    if (EstimateOf(f.group, token, g) == 0) continue;
    const double x = Part(f, w, g, token) + w.floor[g];
    sum += x * x;
  }
  return std::sqrt(sum);
}

// Marked tokens are drawn with probability 1 in the first draw, and in no other.
TEST(MarkedTest, AreDrawnOnce) {
  GroupFixture f({.group_heads = 4}, 5);
  f.BuildIndex();
  const std::vector<int64_t> marked = {17, 300, 301, 1000};
  for (const int64_t token : marked) {
    const CodeLayout& code = f.storage.code;
    std::byte* codes = f.Block(token) + f.storage.block.codes;
    for (int w = 0; w < code.words(); ++w) {
      const int64_t tile = token % kBlockTokens / kTileTokens, in = token % kTileTokens;
      std::memset(codes + ((tile * code.words() + w) * kTileTokens + in) * 4, 0, 4);
    }
  }
  for (const int64_t target : SimdTargets()) {
    UseSimdTarget(target);
    f.Scan();
    const Weights weights(f, 0);
    const float scale = 1e-4f;
    const int64_t first = DrawTokens(f.group, weights.At(scale), 0, {.refresh = 1}, 0, {});
    const uint32_t* tokens = f.group.scratch.token;
    for (const int64_t token : marked) {
      EXPECT_EQ(std::count(tokens, tokens + first, token), 1);
      EXPECT_EQ(EstimateOf(f.group, token, 0), -0x1p-24f);
    }
    for (int64_t i = 0; i < first; ++i) {
      const bool is = std::count(marked.begin(), marked.end(), tokens[i]) > 0;
      EXPECT_EQ(is, scale * f.group.scratch.weight[i] >= 1) << tokens[i];
    }
    float variance[4];
    EXPECT_NEAR(PredictVariance(f.group, weights.At(1e-9f), 1, 0, variance, {}), 4, 1e-3);
    const int64_t second = DrawTokens(f.group, weights.At(1), scale, {.refresh = 1}, first, {});
    for (const int64_t token : marked)
      EXPECT_EQ(std::count(tokens + first, tokens + second, token), 0);
  }
  UseSimdTarget(0);
}

class SampleTest : public testing::TestWithParam<std::tuple<int, int64_t>> {
 protected:
  SampleTest() : f_(Shape(), 5) {}
  void SetUp() override {
    UseSimdTarget(std::get<1>(GetParam()));
    f_.BuildIndex();
    f_.Scan();
  }
  void TearDown() override { UseSimdTarget(0); }
  static GroupShape Shape() {
    return {.group_heads = std::get<0>(GetParam()),
            .tokens = 5300,
            .middle_begin = 16,
            .middle_end = 5120};
  }
  std::vector<uint32_t> Tokens(int64_t count) const {
    return {f_.group.scratch.token, f_.group.scratch.token + count};
  }

  GroupFixture f_;
};

TEST_P(SampleTest, PredictsVarianceAndSize) {
  for (const double floor : {0., 1e-3}) {
    const Weights w(f_, floor);
    for (const auto& [scale, stride, phase] : std::vector<std::tuple<float, int, int>>{
             {1.f, 1, 0}, {.1f, 1, 0}, {8.f, 1, 0}, {.5f, 2, 0}, {.5f, 2, 1}, {.5f, 4, 3}}) {
      std::vector<double> variance(f_.shape.group_heads);
      double expected = 0;
      for (int64_t t = 16; t < 5120; ++t) {
        const int64_t block = t / kBlockTokens, tile = t % kBlockTokens / kTileTokens;
        if (tile % stride != (phase + block) % stride) continue;
        const double weight = Weight(f_, w, t), pi = std::min(1., scale * weight);
        expected += pi * stride;
        for (int g = 0; g < f_.shape.group_heads; ++g) {
          const double x = Part(f_, w, g, t);
          if (pi < 1) variance[g] += stride * x * x * (1 / (scale * weight) - 1);
        }
      }
      std::vector<float> got(f_.shape.group_heads);
      const float size = PredictVariance(f_.group, w.At(scale), stride, phase, got.data(), {});
      EXPECT_NEAR(size, expected, 1e-4 * expected);
      for (int g = 0; g < f_.shape.group_heads; ++g)
        EXPECT_NEAR(got[g], variance[g], 2e-4 * variance[g] + 1e-12) << g;
    }
  }
}

TEST_P(SampleTest, DrawsInTokenOrderWithWeights) {
  const Weights w(f_, 1e-3);
  f_.group.step = 9;
  const float scale = .7f;
  const int64_t count = DrawTokens(f_.group, w.At(scale), 0, {.refresh = 64}, 0, {});
  ASSERT_GT(count, 20);
  const std::vector<uint32_t> drawn = Tokens(count);
  EXPECT_TRUE(std::is_sorted(drawn.begin(), drawn.end()));
  const std::set<uint32_t> set(drawn.begin(), drawn.end());
  EXPECT_EQ(set.size(), drawn.size());
  for (int64_t i = 0; i < count; ++i) {
    const double weight = Weight(f_, w, drawn[i]);
    ASSERT_NEAR(f_.group.scratch.weight[i], weight, 1e-5 * weight);
  }
  for (int64_t t = 0; t < f_.shape.tokens; ++t) {
    const bool in = set.count(static_cast<uint32_t>(t)) > 0;
    if (t < 16 || t >= 5120) {
      ASSERT_FALSE(in) << t;
      continue;
    }
    const double pi = scale * Weight(f_, w, t),
                 u = TokenUniform(f_.group.key, static_cast<uint32_t>(t), 9, 64);
    ASSERT_TRUE(in == (u < pi) || std::abs(u - pi) <= 1e-5 * pi) << t;
  }
}

// A look adds tokens to those of the looks before: together they are the draw of the last scale.
TEST_P(SampleTest, LooksAreNested) {
  const Weights w(f_, 1e-3);
  for (const uint32_t redraw : {0u, 2u}) {
    const Randomness randomness{.refresh = 64, .redraw = redraw};
    const int64_t whole = DrawTokens(f_.group, w.At(2.f), 0, randomness, 0, {});
    const std::vector<uint32_t> expected = Tokens(whole);
    int64_t count = 0;
    float previous = 0;
    for (const float scale : {.3f, .31f, 1.1f, 2.f}) {
      const int64_t before = count;
      count = DrawTokens(f_.group, w.At(scale), previous, randomness, before, {});
      EXPECT_TRUE(std::is_sorted(f_.group.scratch.token + before, f_.group.scratch.token + count));
      previous = scale;
    }
    std::vector<uint32_t> looks = Tokens(count);
    std::sort(looks.begin(), looks.end());
    EXPECT_EQ(looks, expected);
  }
}

// Looks that draw from candidates find what looks over all tokens find, also when the candidates of
// a segment are too many to be kept, and when a scale is past those kept.
TEST_P(SampleTest, CandidatesChangeNothing) {
  const Weights w(f_, 1e-3);
  for (const std::vector<float>& scales : std::vector<std::vector<float>>{
           {.3f, .31f, .5f, .9f, 2.f, 2.1f}, {50.f, 70.f, 1e3f, 1e6f}, {1e-6f, .5f}}) {
    std::vector<uint32_t> tokens[2];
    std::vector<float> weights[2];
    std::fill(f_.group.scratch.logit, f_.group.scratch.logit + 5120, -7.f);
    for (const bool keep : {false, true}) {
      int64_t count = 0;
      float previous = 0, kept = 0;
      for (const float scale : scales) {
        count = DrawTokens(f_.group, w.At(scale), previous, {.refresh = 64}, count, {},
                           keep ? &kept : nullptr);
        EXPECT_TRUE(!keep || kept >= scale);
        previous = scale;
      }
      tokens[keep] = Tokens(count);
      weights[keep] = {f_.group.scratch.weight, f_.group.scratch.weight + count};
    }
    EXPECT_EQ(tokens[true], tokens[false]);
    EXPECT_EQ(weights[true], weights[false]);
    EXPECT_GT(tokens[true].size(), 10u);
    EXPECT_EQ(std::count(f_.group.scratch.logit, f_.group.scratch.logit + 5120, -7.f), 5120)
        << "written past the sparse arrays";
  }
}

TEST_P(SampleTest, ThreadsDoNotMatter) {
  const Weights w(f_, 1e-3);
  std::vector<float> variance(f_.shape.group_heads), other(f_.shape.group_heads);
  const float size = PredictVariance(f_.group, w.At(1.f), 1, 0, variance.data(), {});
  const std::vector<uint32_t> drawn = Tokens(DrawTokens(f_.group, w.At(1.f), 0, {}, 0, {}));
  for (const int threads : {1, 2}) {
    Workers workers(threads);
    EXPECT_EQ(PredictVariance(f_.group, w.At(1.f), 1, 0, other.data(), &workers), size);
    EXPECT_EQ(other, variance);
    EXPECT_EQ(Tokens(DrawTokens(f_.group, w.At(1.f), 0, {}, 0, &workers)), drawn);
  }
}

TEST_P(SampleTest, FixedTokensLeaveTheScan) {
  const Weights w(f_, 1e-3);
  const int64_t count = DrawTokens(f_.group, w.At(.5f), 0, {}, 0, {});
  const std::vector<uint32_t> fixed = Tokens(count);
  std::vector<double> mass(NumBlocks(f_.group) * f_.shape.group_heads);
  for (size_t i = 0; i < mass.size(); ++i) mass[i] = f_.group.scratch.mass[i];
  for (const uint32_t t : fixed) {
    for (int g = 0; g < f_.shape.group_heads; ++g) {
      mass[(t / kBlockTokens) * f_.shape.group_heads + g] -= EstimateOf(f_.group, t, g);
    }
  }
  FixDrawn(f_.group, count);
  for (size_t i = 0; i < mass.size(); ++i) EXPECT_NEAR(f_.group.scratch.mass[i], mass[i], 1e-4);
  for (int64_t i = 0; i < count; ++i) EXPECT_EQ(f_.group.scratch.weight[i], INFINITY);
  const int64_t all = DrawTokens(f_.group, w.At(1e6f), 0, {.redraw = 1}, count, {});
  std::vector<uint32_t> tokens = Tokens(all);
  EXPECT_TRUE(std::equal(fixed.begin(), fixed.end(), tokens.begin()));
  std::sort(tokens.begin(), tokens.end());
  EXPECT_EQ(std::unique(tokens.begin(), tokens.end()), tokens.end())
      << "a fixed token was drawn again";
}

INSTANTIATE_TEST_SUITE_P(Groups, SampleTest,
                         testing::Combine(testing::Values(1, 2, 3, 4, 6, 8, 16),
                                          testing::ValuesIn(SimdTargets())));

// A plan is for the scale of values that this step sees, however large the last step's reference
// was: a sink without a value that takes 98 % of the attention leaves a fiftieth of the mean |v|^2.
TEST(PlanTest, ASinkWithoutAValueLowersTheTarget) {
  std::vector<float> quantile((kQuantileBins + 1) * kMaxLooks, 1.5f);
  Promise promise;
  promise.quantile = reinterpret_cast<const float(*)[kQuantileBins + 1]>(quantile.data());
  IndexTables index;
  index.value_norm2 = 4, index.value_spread = 4;
  const auto target = [&](float fixed_norm2, bool started) {
    HeadState state;
    HeadWork work;
    work.mass = .02f, work.denominator = 1, work.fixed_norm2 = fixed_norm2;
    if (started) state = {.rho = 1, .spread = 4, .ref = 1, .cos2 = .1f, .z = 1.5f, .started = 1};
    PlanHead(/*value_codes=*/false, promise, index, OutlookOf(index, 1000, work), state, work);
    return work.target;
  };
  const auto expected = [&](float ref) {
    return std::pow(kMargin * promise.epsilon * ref / 1.5f, 2.f);
  };
  // First steps: norm_floor rms|v|, and room for what history does not know yet.
  EXPECT_NEAR(target(0, false) * kFirstRho / expected(.5f * std::sqrt(.08f)), 1, 1e-5);
  EXPECT_NEAR(target(3.92f, false) * kFirstRho / expected(.5f * 2), 1, 1e-5);
  // Later ones: the last reference, at most 0.7 rms|v|.
  EXPECT_NEAR(target(0, true) / expected(.7f * std::sqrt(.08f)), 1, 1e-5);
  EXPECT_NEAR(target(3.92f, true) / expected(1), 1, 1e-5);
  // Values beyond fp32's squares change nothing.
  EXPECT_NEAR(target(HUGE_VALF, true) / expected(1), 1, 1e-5);
}

// rho settles where one step in ten has a larger ratio, a pilot's where one in two has: here ratios
// are exponential, whose quantiles are ln 10 and ln 2.
TEST(PlanTest, LearnsTheRatioThatOneStepInTenExceeds) {
  std::vector<float> quantile((kQuantileBins + 1) * kMaxLooks, 1.5f);
  for (const bool pilot : {false, true}) {
    Promise promise;
    promise.quantile = reinterpret_cast<const float(*)[kQuantileBins + 1]>(quantile.data());
    promise.pilot = pilot;
    std::mt19937_64 random(7);
    std::exponential_distribution<double> ratio;
    HeadState state{.rho = kFirstRho, .z = 1.5f};
    HeadWork work;
    work.predicted = 1;
    int above = 0;
    constexpr int kSteps = 20000;
    for (int i = 0; i < kSteps; ++i) {
      work.variance = static_cast<float>(ratio(random));
      above += work.variance > state.rho;
      LearnHead(promise, IndexTables{}, work, state);
    }
    EXPECT_NEAR(above / double{kSteps}, pilot ? .5 : .1, .01);
    // NaN and infinity move it as far as any other ratio.
    for (const float odd : {NAN, INFINITY}) {
      work.variance = odd;
      LearnHead(promise, IndexTables{}, work, state);
      EXPECT_TRUE(state.rho >= kLeastRho && state.rho <= kMostRho);
    }
  }
}

// Each block's heavy token lies in a tile that the sample of the plan leaves out: the blocks'
// largest e^ tell. Where they count for nothing, the last pass finds 16 times the variance asked
// for, or more.
TEST(PlanTest, SeesHeavyTokensOutsideItsTiles) {
  GroupFixture f(
      {.group_heads = 2, .tokens = 65536 + 256, .middle_begin = 256, .middle_end = 65536});
  f.BuildIndex();
  f.Scan();
  Scratch& w = f.group.scratch;
  const int64_t middle = f.group.middle_end - f.group.middle_begin, blocks = NumBlocks(f.group);
  const int stride = PlanStride(middle), phase = static_cast<int>(f.group.step % stride);
  ASSERT_GT(stride, 8);
  f.promise.epsilon = .3f;
  const auto put = [&](int64_t b, int g, int64_t i, float e) {
    w.estimate[(b * 2 + g) * kBlockTokens + i] = HalfBits(e);
  };
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t heavy =
        (phase + b + stride / 2) % stride % (kBlockTokens / kTileTokens) * kTileTokens;
    for (int g = 0; g < 2; ++g) {
      for (int64_t i = 0; i < kBlockTokens; ++i) put(b, g, i, i == heavy + g ? 1.f : 1e-4f);
      w.shift[b * 2 + g] = 5;
      w.mass[b * 2 + g] = 1 + 255e-4f;
    }
  }
  float* states = w.work;
  AttendFixed(f.storage, f.group, states, {});
  SumEstimates(f.storage, f.group, states);
  const Plan plan = MakePlan(f.storage, f.promise, f.group, {});
  EXPECT_GT(plan.inclusion.scale, .6f);
  EXPECT_LT(plan.inclusion.scale, 1.5f);
  EXPECT_GT(plan.expected, 20);
}

// The share of draws that hold a token is its inclusion probability.
TEST(InclusionTest, FrequenciesAreTheProbabilities) {
  GroupFixture f({.group_heads = 2, .tokens = 500, .middle_begin = 16, .middle_end = 336});
  f.BuildIndex();
  f.Scan();
  const Weights w(f, .02);
  constexpr int kSteps = 4000;
  std::vector<int> hits(500);
  for (int step = 0; step < kSteps; ++step) {
    f.group.step = step;
    const int64_t count = DrawTokens(f.group, w.At(1.f), 0, {.refresh = 1}, 0, {});
    for (int64_t i = 0; i < count; ++i) ++hits[f.group.scratch.token[i]];
  }
  for (int64_t t = 16; t < 336; ++t) {
    const double pi = std::min(1., Weight(f, w, t));
    ASSERT_NEAR(hits[t], kSteps * pi, 6 * std::sqrt(kSteps * pi * (1 - pi)) + 1e-6) << t;
  }
}

}  // namespace
}  // namespace vattn::cpu
