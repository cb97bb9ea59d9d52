// Tail terms against a float64 reference: unbiased, certified, and exact once everything is drawn.
#include "bench/inside/tail_terms.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "api/vattn.h"
#include "bench/cli/progress.h"
#include "bench/cli/statistics.h"
#include "bench/inside/tail_tables.h"
#include "bench/inside/tails_measure.h"
#include "bench/replay/replay.h"
#include "kernels/sampling.h"
#include "runtime/quantiles.h"

namespace vattn::bench {
namespace {

constexpr int64_t kTokens = 2000, kFixed = 20, kDim = 16;
constexpr int64_t kCluster = 25;
constexpr double kRows = 100;

// A head whose scores an index predicts with a noise of .5; neighbours have similar values.
struct Problem {
  Problem() {
    std::mt19937_64 random(7);
    std::normal_distribution<double> normal;
    keys.resize(kTokens * kDim);
    values.resize(kTokens * kDim);
    q.resize(kDim);
    for (float& x : q) x = static_cast<float>(normal(random));
    for (float& x : keys) x = static_cast<float>(normal(random));
    std::vector<double> around(kDim);
    for (int64_t i = 0; i < kTokens; ++i) {
      if (i % kCluster == 0) {
        for (double& a : around) a = normal(random);
      }
      for (int64_t j = 0; j < kDim; ++j)
        values[i * kDim + j] = static_cast<float>(around[j] + .5 * normal(random));
    }
    head = {.n = kTokens,
            .dim = kDim,
            .values = values.data(),
            .e = {},
            .numerator = std::vector<double>(kDim)};
    for (int64_t i = 0; i < kTokens; ++i) {
      double score = 0;
      for (int64_t j = 0; j < kDim; ++j) score += .4 * q[j] * keys[i * kDim + j];
      head.e.push_back(std::exp(score));
      guess.push_back(std::exp(score + .5 * normal(random)));
    }
    for (int64_t t = 0; t < kFixed; ++t) {
      head.denominator += 1;
      for (double& x : head.numerator) x += normal(random);
      head.value_norm2 += kDim;
    }
    weight = DrawWeights(guess, kRows);
    own.resize(kTokens);
    std::iota(own.begin(), own.end(), 0);
    rounded = values;
    for (float& x : rounded) x = std::round(x);
    mean = MeanTable(values.data(), kDim, Pages(kTokens, kTokens));
    pages = MeanTable(values.data(), kDim, Pages(kTokens, 16));
    clusters = MeanTable(values.data(), kDim, Pages(kTokens, kCluster));
  }

  std::vector<float> keys, values, rounded, q;
  TailHead head;
  std::vector<double> guess, weight;
  std::vector<int32_t> own;
  TailTable mean, pages, clusters;
};

const Problem& The() {
  static const Problem problem;
  return problem;
}

StandIn Make(const std::string& name) {
  const Problem& p = The();
  const auto of = [&](const TailTable& table) {
    return StandIn{p.guess, table.rows.data(), table.entry.data()};
  };
  if (name == "mean") return of(p.mean);
  if (name == "pages") return of(p.pages);
  if (name == "clusters") return of(p.clusters);
  if (name == "codes") return {p.guess, p.rounded.data(), p.own.data()};
  if (name == "linear") {
    return {LinearGuess(p.q.data(), p.keys.data(), kDim, p.guess, p.weight), p.values.data(),
            p.own.data()};
  }
  return {};
}

// Promise (.3, .1) with the library's quantiles.
struct Promised {
  Promised() : table(new float[kMaxLooks][kQuantileBins + 1]) {
    promise.epsilon = .3f;
    FillQuantiles(Bound::kSharp, promise.delta, promise.max_looks, promise.pilot, table.get());
    promise.quantile = table.get();
  }
  std::unique_ptr<float[][kQuantileBins + 1]> table;
  Promise promise;
};

class TailTermsTest : public testing::TestWithParam<const char*> {
 protected:
  TailTermsTest()
      : stand_in_(Make(GetParam())), estimator_(The().head, stand_in_), weight_(Weight()) {}

  // Of the product form by cluster means of the predictions, which never look at a token's own
  // score.
  static std::vector<double> Weight() {
    if (GetParam() != std::string("product")) return The().weight;
    std::vector<double> coarse(kTokens);
    for (int64_t c = 0; c < kTokens; c += kCluster) {
      const double sum = std::accumulate(&The().guess[c], &The().guess[c] + kCluster, 0.);
      std::fill_n(&coarse[c], kCluster, sum / kCluster);
    }
    return DrawWeights(coarse, 6 * kRows);  // enough for a certificate
  }
  TailDraw Draw(std::mt19937_64* random) const {
    std::uniform_real_distribution<double> uniform;
    return DrawTail(weight_, [&] { return uniform(*random); });
  }
  double Error(const TailAnswer& answer) const {
    double distance2 = 0;
    for (int64_t j = 0; j < kDim; ++j)
      distance2 += std::pow(answer.output[j] - estimator_.exact()[j], 2);
    return std::sqrt(distance2) / estimator_.ExactRef(promised_.promise);
  }

  const Promised promised_;
  const StandIn stand_in_;
  const TailEstimator estimator_;
  const std::vector<double> weight_;
};

TEST_P(TailTermsTest, ReferenceIsPlainAttention) {
  const Problem& p = The();
  double denominator = p.head.denominator, first = p.head.numerator[0];
  for (int64_t i = 0; i < kTokens; ++i)
    denominator += p.head.e[i], first += p.head.e[i] * p.values[i * kDim];
  EXPECT_NEAR(estimator_.exact_denominator(), denominator, 1e-9 * denominator);
  EXPECT_NEAR(estimator_.exact()[0], first / denominator, 1e-12);
}

TEST_P(TailTermsTest, SumsAreUnbiased) {
  constexpr int kDraws = 3000;
  std::mt19937_64 random(1);
  std::vector<double> sum(kDim + 1), square(kDim + 1);
  for (int k = 0; k < kDraws; ++k) {
    HeadState state = {.cos2 = -1};
    const TailAnswer answer = estimator_.Estimate(Draw(&random), promised_.promise, &state);
    for (int64_t j = 0; j <= kDim; ++j) {
      const double x = j < kDim ? answer.numerator[j] : answer.denominator;
      sum[j] += x, square[j] += x * x;
    }
  }
  for (int64_t j = 0; j <= kDim; ++j) {
    const double mean = sum[j] / kDraws,
                 deviation = std::sqrt((square[j] / kDraws - mean * mean) / kDraws);
    const double exact =
        j < kDim ? estimator_.exact_numerator()[j] : estimator_.exact_denominator();
    EXPECT_GT(deviation, 0);
    EXPECT_NEAR(mean, exact, 5 * deviation) << "element " << j;
  }
}

TEST_P(TailTermsTest, CertificateCovers) {
  constexpr int kDraws = 2000;
  std::mt19937_64 random(2);
  int64_t certified = 0, off = 0;
  for (int k = 0; k < kDraws; ++k) {
    HeadState state = {.cos2 = -1};
    const TailAnswer answer = estimator_.Estimate(Draw(&random), promised_.promise, &state);
    if (!(answer.bound <= promised_.promise.epsilon)) continue;
    ++certified;
    off += Error(answer) > promised_.promise.epsilon;
  }
  ASSERT_GT(certified, kDraws / 20);
  EXPECT_LE(1 - ClopperPearsonUpper(certified - off, certified, 1 - 1e-6), promised_.promise.delta)
      << off << " of " << certified;
}

// The bound is of the size of the error: the mean of its square is near the mean square of errors
// times z^2.
TEST_P(TailTermsTest, BoundFollowsError) {
  constexpr int kDraws = 2000;
  std::mt19937_64 random(3);
  double error2 = 0, estimate2 = 0;
  for (int k = 0; k < kDraws; ++k) {
    HeadState state = {.cos2 = -1};
    const TailAnswer answer = estimator_.Estimate(Draw(&random), promised_.promise, &state);
    error2 += std::pow(Error(answer), 2);
    estimate2 += std::pow(answer.bound / answer.z, 2);
  }
  EXPECT_GT(estimate2, .6 * error2);
  EXPECT_LT(estimate2, 2.5 * error2);
}

TEST_P(TailTermsTest, FullDrawIsExact) {
  TailDraw draw;
  draw.token = The().own;
  draw.pi.assign(kTokens, 1);
  HeadState state = {.cos2 = -1};
  const TailAnswer answer = estimator_.Estimate(draw, promised_.promise, &state);
  EXPECT_EQ(answer.bound, 0);
  EXPECT_LT(Error(answer), 1e-12);
  EXPECT_NEAR(answer.denominator, estimator_.exact_denominator(), 1e-9 * answer.denominator);
}

TEST_P(TailTermsTest, NothingDrawnIsNeverCertified) {
  HeadState state = {.cos2 = -1};
  const TailAnswer answer = estimator_.Estimate({}, promised_.promise, &state);
  EXPECT_EQ(answer.bound, HUGE_VALF);
}

// Draws of the rows that are said to be needed have errors whose mean square is (epsilon / z)^2.
TEST_P(TailTermsTest, RowsNeededMeetTheVariance) {
  constexpr int kDraws = 2000;
  constexpr double kZ = 1.5;
  const double rows = estimator_.RowsNeeded(weight_, promised_.promise, kZ);
  ASSERT_GT(rows, 1);
  ASSERT_LT(rows, kTokens);
  // The same shape of weights at another scale: what RowsNeeded looks for.
  std::vector<double> weight = weight_;
  double low = 1e-6, high = 1e6;
  for (int k = 0; k < 60; ++k) {
    const double middle = std::sqrt(low * high);
    double expected = 0;
    for (const double w : weight) expected += std::min(1., middle * w);
    (expected < rows ? low : high) = middle;
  }
  for (double& w : weight) w *= high;
  std::mt19937_64 random(4);
  std::uniform_real_distribution<double> uniform;
  double error2 = 0;
  for (int k = 0; k < kDraws; ++k) {
    HeadState state = {.cos2 = -1};
    const TailDraw draw = DrawTail(weight, [&] { return uniform(random); });
    error2 += std::pow(Error(estimator_.Estimate(draw, promised_.promise, &state)), 2) / kDraws;
  }
  EXPECT_NEAR(error2 * kZ * kZ / (promised_.promise.epsilon * promised_.promise.epsilon), 1, .4);
}

INSTANTIATE_TEST_SUITE_P(Terms, TailTermsTest,
                         testing::Values("none", "mean", "codes", "pages", "clusters", "linear",
                                         "product"),
                         [](const auto& info) { return std::string(info.param); });

TEST(TailTablesTest, MeansOfPages) {
  const std::vector<float> values = {1, 2, 3, 4, 5, 6};  // three tokens of two elements
  const TailTable table = MeanTable(values.data(), 2, Pages(3, 2));
  EXPECT_EQ(table.rows, (std::vector<float>{2, 3, 5, 6}));
  EXPECT_EQ(table.entry, (std::vector<int32_t>{0, 0, 1}));
}

TEST(TailTablesTest, DrawWeightsExpectTheRows) {
  const std::vector<double> weight = DrawWeights(The().guess, kRows);
  double expected = 0;
  for (const double w : weight) expected += std::min(1., w);
  EXPECT_NEAR(expected, kRows, 1e-6 * kRows);
  EXPECT_EQ(DrawWeights({1, 2, 3}, 3), (std::vector<double>{1, 1, 1}));
}

// Values that the codes tell exactly and scores that the index tells exactly leave nothing to
// correct.
TEST(TailTablesTest, PerfectStandInHasNoError) {
  const Problem& p = The();
  const Promised promised;
  const StandIn perfect = {p.head.e, p.values.data(), p.own.data()};
  const TailEstimator estimator(p.head, perfect);
  HeadState state = {.cos2 = -1};
  std::mt19937_64 random(5);
  std::uniform_real_distribution<double> uniform;
  const TailAnswer answer = estimator.Estimate(DrawTail(p.weight, [&] { return uniform(random); }),
                                               promised.promise, &state);
  for (int64_t j = 0; j < kDim; ++j) EXPECT_NEAR(answer.output[j], estimator.exact()[j], 1e-9);
  EXPECT_LT(answer.bound, 1e-6);
}

// Real attention: terms that know more of the values err less, a draw that knows less of the scores
// errs more.
TEST(TailsMeasureTest, OrderOfTermsOnARecording) {
  const Trace trace = ReadTrace(VATTN_TEST_DATA "/smol_fixture.safetensors");
  TailPlan plan;
  plan.layers = {0};
  plan.steps = {0, 16};
  plan.draws = 4;
  plan.rows = .03;
  vattn_options_init(&plan.options, sizeof(plan.options));
  ReplayPlan shape;
  shape.layers = plan.layers;
  SetShape(trace, shape, &plan.options);
  Progress progress;
  const std::array<TailFigures, kTails> all = MeasureTails(trace, plan, &progress);
  const auto error = [&](Tail tail) { return Mean(all[tail].errors); };
  EXPECT_LT(error(kValueCodes), .75 * error(kNone));
  EXPECT_LT(error(kClusterMeans), error(kNone));
  EXPECT_GT(error(kProduct), error(kNone));
  for (const TailFigures& figures : all) {
    EXPECT_EQ(figures.errors.size(), static_cast<size_t>(trace.q_heads) * 2 * 4);
    EXPECT_EQ(figures.needed.size(), static_cast<size_t>(trace.q_heads) * 2);
    EXPECT_GT(Mean(figures.needed), 0);
    EXPECT_LT(Mean(figures.needed), 1);
    EXPECT_LE(1 - ClopperPearsonUpper(figures.certified - figures.off, figures.certified, 1 - 1e-6),
              .1);
  }
  EXPECT_LT(Mean(all[kValueCodes].needed), Mean(all[kNone].needed));
  EXPECT_EQ(all[kValueCodes].bytes, 16);
}

}  // namespace
}  // namespace vattn::bench
