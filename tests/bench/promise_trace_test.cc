// The promise on recorded attention: coverage, share of heads that could not be verified, rows
// taken, and how much of the allowed error is used.
#include <gtest/gtest.h>

#include <numeric>
#include <string>

#include "api/vattn.h"
#include "bench/cli/statistics.h"
#include "bench/replay/replay.h"
#include "bench/replay/report.h"
#include "bench/trace/reference.h"
#include "bench/trace/trace.h"

namespace vattn::bench {
namespace {

constexpr double kAlarm = 1e-6;
constexpr double kMostUnverified = .01;  // of heads; .001 when written
constexpr double kMostSelected = .065;   // of the middle, mean; .052
constexpr double kMostSharpness = 1.4;   // 1.23

class PromiseTraceTest : public testing::Test {
 protected:
  PromiseTraceTest() : trace_(ReadTrace(VATTN_TEST_DATA "/smol_fixture.safetensors")) {
    plan_.layers.resize(trace_.layers);
    std::iota(plan_.layers.begin(), plan_.layers.end(), 0);
    plan_.steps = trace_.steps;
    plan_.seeds = 8;
    vattn_options_init(&options_, sizeof(options_));
    SetShape(trace_, plan_, &options_);
    options_.seed = 100;
    reference_ = ComputeReference(trace_, plan_.layers, plan_.steps, 1);
  }

  Observations RunAll() {
    Progress progress;
    return Replay(trace_, plan_, options_, reference_, &progress);
  }

  // By query head: heads of a group share their draws, so only within a head are trials of one step
  // independent.
  void ExpectCoverage(const Observations& seen) {
    for (int64_t layer = 0; layer < trace_.layers; ++layer) {
      for (int64_t head = 0; head < trace_.q_heads; ++head) {
        const Part part = {layer, layer + 1, head, head + 1};
        const Figures f = Summarize(seen, part, options_.epsilon, options_.delta);
        ASSERT_GT(f.verified, 0);
        EXPECT_LE(1 - ClopperPearsonUpper(f.verified - f.failures, f.verified, 1 - kAlarm),
                  options_.delta)
            << "head " << head << ": " << f.failures << " of " << f.verified;
      }
    }
  }

  Figures All(const Observations& seen) {
    return Summarize(seen, {0, trace_.layers, 0, trace_.q_heads}, options_.epsilon, options_.delta);
  }

  Trace trace_;
  ReplayPlan plan_;
  vattn_options options_;
  Reference reference_;
};

TEST_F(PromiseTraceTest, FreshNumbersEveryStep) {
  options_.refresh = 1;
  const Observations seen = RunAll();
  ExpectCoverage(seen);
}

TEST_F(PromiseTraceTest, PermanentNumbers) {
  const Observations seen = RunAll();
  ExpectCoverage(seen);
  const Figures f = All(seen);
  EXPECT_EQ(f.heads, f.verified + f.dense);
  EXPECT_LE(static_cast<double>(f.dense), kMostUnverified * static_cast<double>(f.heads));
  EXPECT_LE(f.selected_mean, kMostSelected);
  EXPECT_LE(f.sharpness, kMostSharpness);
}

TEST_F(PromiseTraceTest, StrictPreset) {
  options_.norm = VATTN_NORM_OUTPUT;
  plan_.seeds = 4;
  const Observations seen = RunAll();
  ExpectCoverage(seen);
  const Figures f = All(seen);
  EXPECT_LE(static_cast<double>(f.dense), kMostUnverified * static_cast<double>(f.heads));
}

TEST_F(PromiseTraceTest, ValueCodes) {
  options_.value_bits = 2;
  plan_.seeds = 4;
  const Observations seen = RunAll();
  ExpectCoverage(seen);
  EXPECT_LE(All(seen).selected_mean, kMostSelected);
}

}  // namespace
}  // namespace vattn::bench
