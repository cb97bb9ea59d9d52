// A test engine's requests over a pool a quarter of their need (paged_engine.h): every answer is
// that of float64 attention, and mistakes that engines make do not go unseen.
#include <gtest/gtest.h>

#include "tests/api/backend.h"
#include "tests/api/paged_cases.h"

namespace vattn::test {
namespace {

constexpr int64_t kSteps = 60;

class PagedEngineTest : public testing::TestWithParam<PagedCase> {
 protected:
  // What every run has to have met with.
  void ExpectBusy(const PagedRun& run) {
    EXPECT_GT(run.engine.finished, 64);
    EXPECT_GT(run.engine.preempted, 5);
    EXPECT_GT(run.engine.shared_blocks, 0);
    EXPECT_GT(run.engine.reused_blocks, 30);
    EXPECT_GT(run.engine.second_turns, 5);
    EXPECT_GT(run.engine.rejected_tokens, 100);
    EXPECT_GT(run.engine.chunks, 100);
    EXPECT_EQ(run.stats.requests_refused, 0u);
  }
};

TEST_P(PagedEngineTest, DenseAnswersAreExact) {
  const PagedRun run = RunPaged(GetParam(), VATTN_POLICY_DENSE, kSteps, 1);
  ExpectBusy(run);
  EXPECT_EQ(run.oracle.verified, 0);
}

TEST_P(PagedEngineTest, VerifiedAnswersKeepThePromise) {
  const PagedRun run = RunPaged(GetParam(), VATTN_POLICY_VERIFIED, kSteps, 2);
  ExpectBusy(run);
  // Rows are left out, or nothing was tested.
  EXPECT_GT(run.oracle.verified, run.oracle.dense);
  EXPECT_LT(run.stats.rows_selected, run.stats.rows_middle * 3 / 4);
}

TEST_P(PagedEngineTest, MistakesAreSeen) {
  for (const Fault fault : {Fault::kSkipRows, Fault::kStaleTable, Fault::kForeignPrefix}) {
    for (const int32_t policy : {VATTN_POLICY_DENSE, VATTN_POLICY_VERIFIED}) {
      SCOPED_TRACE(testing::Message()
                   << "fault " << static_cast<int>(fault) << " policy " << policy);
      EXPECT_THROW(RunPaged(GetParam(), policy, kSteps, 3, fault), WrongAnswer);
    }
  }
  // Dense attention does not read codes.
  EXPECT_THROW(RunPaged(GetParam(), VATTN_POLICY_VERIFIED, kSteps, 3, Fault::kSkipCoding),
               WrongAnswer);
}

INSTANTIATE_TEST_SUITE_P(Pools, PagedEngineTest, testing::ValuesIn(PagedCases()),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace vattn::test
