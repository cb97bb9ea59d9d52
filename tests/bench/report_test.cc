#include "bench/replay/report.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "bench/cli/statistics.h"

namespace vattn::bench {
namespace {

TEST(StatisticsTest, ClopperPearsonKnownValues) {
  // Zero failures that certify p <= .05, .01 and .001 at 95 %.
  EXPECT_NEAR(ClopperPearsonUpper(0, 59, .95), .05, 5e-4);
  EXPECT_LE(ClopperPearsonUpper(0, 299, .95), .01);
  EXPECT_GT(ClopperPearsonUpper(0, 298, .95), .01);
  EXPECT_LE(ClopperPearsonUpper(0, 2995, .95), .001);
  EXPECT_GT(ClopperPearsonUpper(0, 2994, .95), .001);
  // Most failures that certify: 29 and 20 of 1,000 for .05, 55 of 10,000 for .01.
  EXPECT_LE(ClopperPearsonUpper(29, 1000, .999), .05);
  EXPECT_GT(ClopperPearsonUpper(30, 1000, .999), .05);
  EXPECT_LE(ClopperPearsonUpper(20, 1000, 1 - 1e-6), .05);
  EXPECT_GT(ClopperPearsonUpper(21, 1000, 1 - 1e-6), .05);
  EXPECT_LE(ClopperPearsonUpper(55, 10000, 1 - 1e-6), .01);
  EXPECT_GT(ClopperPearsonUpper(56, 10000, 1 - 1e-6), .01);
  EXPECT_EQ(ClopperPearsonUpper(5, 5, .95), 1);
  EXPECT_EQ(ClopperPearsonUpper(0, 0, .95), 1);
}

TEST(StatisticsTest, QuantileInterpolatesBetweenOrderStatistics) {
  const std::vector<double> values = {4, 1, 3, 2};
  EXPECT_EQ(Quantile(values, 0), 1);
  EXPECT_EQ(Quantile(values, 1), 4);
  EXPECT_DOUBLE_EQ(Quantile(values, .5), 2.5);
  EXPECT_DOUBLE_EQ(Quantile(values, .9), 3.7);
  EXPECT_EQ(Quantile({7}, .3), 7);
  EXPECT_TRUE(std::isnan(Quantile({}, .5)));
}

TEST(StatisticsTest, MeanAndSharpness) {
  EXPECT_EQ(Mean({1, 2, 6}), 3);
  EXPECT_TRUE(std::isnan(Mean({})));
  std::vector<double> errors;
  for (int i = 0; i <= 100; ++i) errors.push_back(i * .001);
  EXPECT_NEAR(Sharpness(errors, .1, .1), .1 / .09, 1e-12);
  EXPECT_TRUE(std::isnan(Sharpness({}, .1, .1)));
}

// One seed and layer, two groups of two query heads, three steps.
Observations MakeObservations() {
  Observations seen;
  seen.seeds = seen.layers = 1;
  seen.q_heads = 4;
  seen.kv_heads = 2;
  seen.steps = 3;
  constexpr int32_t kV = VATTN_VERDICT_VERIFIED, kE = VATTN_VERDICT_EXACT, kD = VATTN_VERDICT_DENSE,
                    kB = VATTN_VERDICT_BEST_EFFORT;
  seen.verdict = {kE, kV, kV,  //
                  kE, kV, kD,  //
                  kE, kV, kV,  //
                  kE, kB, kV};
  seen.error = {0, .04, .12,  //
                0, .06, 0,    //
                0, .02, .03,  //
                0, .90, .01};
  seen.estimate = {0, .08, .09,  //
                   0, .07, 0,    //
                   0, .05, .06,  //
                   0, .99, .09};
  seen.selected = {100, 10, 20,  //
                   100, 30, 40};
  seen.fetched = {100, 5,  0,  //
                  100, 10, 5};
  seen.looks = {0, 1, 2,  //
                0, 1, 1};
  seen.middle.assign(6, 100);
  seen.bytes_fetched = 900;
  return seen;
}

TEST(SummarizeTest, CountsVerdictsAndFailures) {
  const Figures figures = Summarize(MakeObservations(), {0, 1, 0, 4}, .1, .1);
  EXPECT_EQ(figures.heads, 12);
  EXPECT_EQ(figures.exact, 4);
  EXPECT_EQ(figures.verified, 6);
  EXPECT_EQ(figures.dense, 1);
  EXPECT_EQ(figures.best_effort, 1);
  EXPECT_EQ(figures.failures, 1);  // .12; the .90 had no promise
  EXPECT_DOUBLE_EQ(figures.upper95, ClopperPearsonUpper(1, 6, .95));
  EXPECT_NEAR(figures.error_mean, 1.18 / 12, 1e-12);
  EXPECT_EQ(figures.error_max, .9);
}

TEST(SummarizeTest, AnErrorThatIsNoNumberIsAFailure) {
  Observations seen = MakeObservations();
  seen.error[1] = NAN;
  EXPECT_EQ(Summarize(seen, {0, 1, 0, 4}, .1, .1).failures, 2);
}

TEST(SummarizeTest, SharpnessTakesTheVerifiedHeadWithTheLargestEstimate) {
  // Step 1: head 0 (.08 over .07) and head 2 (head 3 is larger, but not verified). Step 2: head 0
  // (head 1 is dense) and head 3.
  const Figures figures = Summarize(MakeObservations(), {0, 1, 0, 4}, .1, .1);
  EXPECT_DOUBLE_EQ(figures.sharpness, .1 / Quantile({.04, .02, .12, .01}, .9));
  const Figures head0 = Summarize(MakeObservations(), {0, 1, 0, 1}, .1, .1);
  EXPECT_DOUBLE_EQ(head0.sharpness, .1 / Quantile({.04, .12}, .9));
  EXPECT_TRUE(std::isnan(Summarize(MakeObservations(), {0, 1, 1, 2}, .1, .1).sharpness));
}

TEST(SummarizeTest, SharesAreOfTheMiddle) {
  Observations seen = MakeObservations();
  const Figures all = Summarize(seen, {0, 1, 0, 4}, .1, .1);
  EXPECT_DOUBLE_EQ(all.selected_mean, .5);
  EXPECT_DOUBLE_EQ(all.fetched_mean, 2.2 / 6);
  EXPECT_DOUBLE_EQ(all.hot_hit_rate, 1 - 220. / 300);
  EXPECT_DOUBLE_EQ(all.looks_mean, 5. / 6);
  const Figures second = Summarize(seen, {0, 1, 2, 3}, .1, .1);  // reads KV head 1
  EXPECT_DOUBLE_EQ(second.selected_mean, 1.7 / 3);
  seen.middle[0] = 0;  // no middle yet: no share
  EXPECT_DOUBLE_EQ(Summarize(seen, {0, 1, 0, 4}, .1, .1).selected_mean, .4);
}

TEST(ReportTest, JsonHasTheKeysAndNullsForWhatIsUnknown) {
  Trace trace;
  trace.layer_names = {"16"};
  ReplayPlan plan;
  plan.layers = {0};
  vattn_options options = {};
  options.epsilon = options.delta = .1f;
  const bench::Run run = MakeRun("verified", trace, plan, options, MakeObservations());
  const Json json = Json::parse(RunJson(run).dump());
  EXPECT_EQ(json["heads"], 12);
  EXPECT_EQ(json["verdicts"]["verified"], 6);
  EXPECT_EQ(json["verdict_shares"]["verified"], .5);
  EXPECT_EQ(json["coverage"]["failures"], 1);
  EXPECT_EQ(json["coverage"]["trials"], 6);
  EXPECT_EQ(json["fetched_bytes_per_step"], 300);
  EXPECT_TRUE(json["time"]["speedup"].is_null());
  EXPECT_EQ(json["settings"]["epsilon"], .1);  // not .10000000149
  EXPECT_EQ(json["per_layer"][0]["layer"], "16");
  EXPECT_EQ(json["per_layer"][0]["per_head"].size(), 4u);
  for (const char* key :
       {"error", "sharpness", "selected_share", "fetched_share", "hot_hit_rate", "looks", "time"}) {
    EXPECT_TRUE(json.contains(key)) << key;
  }
}

}  // namespace
}  // namespace vattn::bench
