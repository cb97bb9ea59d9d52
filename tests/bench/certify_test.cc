// The alarm version of `vattn replay --certify`: the grid of epsilon and delta on a small
// recording, few runs. It fails when the promise is refuted, not when it is not shown.
#include "bench/replay/certify.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "bench/cli/statistics.h"
#include "bench/trace/hostile_trace.h"
#include "bench/trace/trace_views.h"

namespace vattn::bench {
namespace {

TEST(ClusterUpperTest, IsTheBinomialBoundWithAnE) {
  // No failure in n clusters: e (1 - p)^n = 1 - confidence.
  EXPECT_NEAR(ClusterUpper(0, 200, .95), 1 - std::pow(.05 / std::exp(1.), 1. / 200), 1e-9);
  EXPECT_EQ(ClusterUpper(2.3, 200, .95), ClusterUpper(3, 200, .95));
  EXPECT_GT(ClusterUpper(3, 200, .95), ClopperPearsonUpper(3, 200, .95));
}

TEST(TraceViewsTest, RowsComeFromWhereTheyShould) {
  const Trace trace = ReadTrace(VATTN_TEST_DATA "/smol_fixture.safetensors");
  const std::vector<int32_t> layers = {0};
  const Trace split = SplitHeads(trace, layers);
  const int64_t group = trace.q_heads / trace.kv_heads;
  ASSERT_EQ(split.kv_heads, trace.q_heads);
  const size_t row = trace.k.Row(0, 0, 1) - trace.k.Row(0, 0, 0);
  for (int64_t head = 0; head < trace.q_heads; ++head) {
    EXPECT_EQ(std::memcmp(split.k.Row(0, head, 77), trace.k.Row(0, head / group, 77), row), 0);
    EXPECT_EQ(std::memcmp(split.q.Row(0, head, 5), trace.q.Row(0, head, 5), row), 0);
  }
  const Trace shorter = Shorten(trace, layers, 2048, 16);
  EXPECT_EQ(shorter.prompt_tokens, 2048);
  EXPECT_EQ(shorter.tokens, 2048 + trace.steps);
  const int64_t left_out = trace.prompt_tokens - 2048;
  for (const int64_t token : {0, 15, 16, 2047, 2050}) {
    const int64_t from = token < 16 ? token : token + left_out;
    EXPECT_EQ(std::memcmp(shorter.v.Row(0, 1, token), trace.v.Row(0, 1, from), row), 0) << token;
  }
}

class CertifyTest : public testing::Test {
 protected:
  void Measure(const Trace& trace, const ReplayPlan& plan, const std::vector<Cell>& cells) {
    vattn_options options;
    vattn_options_init(&options, sizeof(options));
    options.num_threads = 1;
    options.seed = 7;
    SetShape(trace, plan, &options);
    const Reference reference = ComputeReference(trace, plan.layers, plan.steps, 1);
    Progress progress;
    for (const Cell& cell : cells) {
      list_.push_back(MeasureCoverage(trace, plan, options, reference, cell, &progress));
    }
  }

  std::vector<Coverage> list_;
};

TEST_F(CertifyTest, NoCellOfTheGridIsRefuted) {
  const Trace trace = ReadTrace(VATTN_TEST_DATA "/smol_fixture.safetensors");
  ReplayPlan plan;
  plan.layers = {0};
  plan.steps = 16;
  plan.seeds = 24;
  plan.forks = true;
  std::vector<Cell> cells;
  for (const Cell& cell : CoverageGrid()) {
    if (cell.trials != Trials::kRequest) cells.push_back(cell);
  }
  Measure(trace, plan, cells);
  ASSERT_EQ(list_.size(), 12u);
  for (const Coverage& c : list_) {
    EXPECT_FALSE(c.refuted) << c.cell.epsilon << " " << c.cell.delta;
    EXPECT_GE(static_cast<double>(c.verified), .98 * static_cast<double>(c.answers));
    EXPECT_EQ(c.verified + c.dense, c.answers);
  }
}

// A request's answers get equal parts of its delta.
TEST_F(CertifyTest, ARequestSpendsItsDeltaOnEveryAnswer) {
  const std::vector<Trace> traces = HostileTraces(4);
  ReplayPlan plan;
  plan.layers = {0};
  plan.steps = 4;
  plan.seeds = 8;
  plan.forks = true;
  Measure(traces[0], plan, {{.1f, .1f, Trials::kRequest}, {.1f, .1f, Trials::kKept}});
  EXPECT_FLOAT_EQ(list_[0].answer_delta, .1f / (4 * test::kHeads));
  EXPECT_GT(list_[0].selected, list_[1].selected);
}

}  // namespace
}  // namespace vattn::bench
