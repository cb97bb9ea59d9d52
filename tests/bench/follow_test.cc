// `vattn follow`: what is appended, stepped through and judged, and that a sequence which got its
// whole prompt at once is its own yardstick.
#include "bench/replay/follow.h"

#include <gtest/gtest.h>

#include <cstring>

#include "bench/cli/failure.h"
#include "bench/cli/handles.h"
#include "bench/replay/follow_report.h"
#include "bench/replay/replay.h"
#include "bench/trace/trace_views.h"

namespace vattn::bench {
namespace {

Trace Fixture() { return ReadTrace(VATTN_TEST_DATA "/smol_fixture.safetensors"); }

TEST(FollowTest, ChunksWithStepsBetween) {
  const Trace trace = Fixture();
  const int64_t end = trace.prompt_tokens + trace.steps;
  FollowPlan plan;
  plan.prompt = trace.prompt_tokens, plan.chunk = 1000, plan.first = 500, plan.end = end;
  const std::vector<Piece> pieces = PiecesOf(trace, plan);
  int64_t at = 0;
  for (const Piece& piece : pieces) {
    EXPECT_EQ(piece.begin, at);
    EXPECT_EQ(piece.steps, piece.begin >= trace.prompt_tokens);
    at = piece.end;
  }
  EXPECT_EQ(pieces[0].end, 500);
  EXPECT_EQ(pieces[1].end, 1500);
  EXPECT_EQ(at, end);
  plan.between = 8;  // no queries were recorded there
  EXPECT_THROW(PiecesOf(trace, plan), UsageError);
  plan.between = 500;
  EXPECT_THROW(PiecesOf(trace, plan), UsageError);
}

TEST(FollowTest, JudgedAreTheLastStepsBeforeEveryMultiple) {
  FollowPlan plan;
  plan.every = 100, plan.judged = 10;
  const std::vector<Stretch> stretches =
      StretchesOf({{0, 95, false}, {95, 104, true}, {104, 250, false}, {250, 450, true}}, plan);
  const std::vector<std::pair<int64_t, int64_t>> expected = {
      {95, 100}, {100, 104}, {290, 300}, {390, 400}, {440, 450}};
  ASSERT_EQ(stretches.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(stretches[i].begin, expected[i].first);
    EXPECT_EQ(stretches[i].end, expected[i].second);
  }
}

class FollowedTest : public testing::Test {
 protected:
  Followed Run(const Trace& trace, const FollowPlan& plan) {
    vattn_options options;
    vattn_options_init(&options, sizeof(options));
    options.num_threads = 1;
    options.seed = 3;
    ReplayPlan shape;
    shape.layers = plan.layers;
    shape.forks = true;
    SetShape(trace, shape, &options);
    Progress progress;
    return Follow(trace, plan, options, &progress);
  }
};

// One chunk without settling: both sequences get the same tokens, draw the same numbers, and answer
// alike.
TEST_F(FollowedTest, AWholePromptIsItsOwnYardstick) {
  const Trace trace = Fixture();
  FollowPlan plan;
  plan.layers = {0};
  plan.prompt = plan.chunk = plan.first = trace.prompt_tokens;
  plan.end = trace.prompt_tokens + 12;
  plan.every = 1 << 20, plan.judged = 12, plan.forks = 3, plan.settling = 0;
  const Followed followed = Run(trace, plan);
  ASSERT_EQ(followed.stretches.size(), 1u);
  const Tally &kept = followed.At(kKeptGrown, 0, 0), &fresh = followed.At(kFreshGrown, 0, 0);
  const Tally& at_once = followed.At(kKeptAtOnce, 0, 0);
  for (int64_t head = 0; head < trace.q_heads; ++head) {
    EXPECT_EQ(kept.heads[head].answers, 12);
    EXPECT_EQ(fresh.heads[head].answers, 36);
    EXPECT_EQ(kept.heads[head].verified, at_once.heads[head].verified);
    EXPECT_EQ(kept.heads[head].failures, at_once.heads[head].failures);
  }
  for (int64_t head = 0; head < trace.kv_heads; ++head) {
    EXPECT_GT(kept.rows[head].selected, 0);
    EXPECT_EQ(kept.rows[head].selected, at_once.rows[head].selected);
    EXPECT_EQ(fresh.rows[head].middle, 3 * kept.rows[head].middle);
  }
  EXPECT_FALSE(followed.counters[0].empty());
  const Json json = FollowJson(followed, trace, plan, .1);
  EXPECT_EQ(json["all"]["ratio_kept"], 1.);
  EXPECT_NE(FollowTables(followed, trace, plan, .1).find("fresh random numbers"),
            std::string::npos);
}

// Forks leave the growing sequence alone.
TEST_F(FollowedTest, ForksChangeNothing) {
  const Trace trace = Fixture();
  FollowPlan plan;
  plan.layers = {0};
  plan.prompt = trace.prompt_tokens, plan.chunk = 1024, plan.first = 2048;
  plan.end = trace.prompt_tokens + 8;
  plan.every = 1 << 20, plan.judged = 8, plan.at_once = false, plan.build_each = true;
  plan.queries = AppendedQueries::kPrompt;
  plan.forks = 0;
  const Followed alone = Run(trace, plan);
  plan.forks = 2;
  const Followed with = Run(trace, plan);
  for (int64_t head = 0; head < trace.kv_heads; ++head) {
    EXPECT_EQ(alone.At(kKeptGrown, 0, 0).rows[head].selected,
              with.At(kKeptGrown, 0, 0).rows[head].selected);
    EXPECT_EQ(alone.At(kKeptGrown, 0, 0).rows[head].fetched,
              with.At(kKeptGrown, 0, 0).rows[head].fetched);
  }
}

TEST(TraceSplitTest, RowsComeFromWhereTheyShould) {
  const Trace trace = Fixture();
  const size_t row = trace.k.Row(0, 0, 1) - trace.k.Row(0, 0, 0);
  const int64_t at = trace.prompt_tokens + 5;
  const Trace split = SplitAt(trace, at, 4, 20, trace.prompt_tokens - 3);
  EXPECT_EQ(split.prompt_tokens, at);
  EXPECT_EQ(split.tokens, at + 4);
  EXPECT_EQ(split.prompt_queries, 20);
  EXPECT_EQ(std::memcmp(split.q.Row(0, 2, 3), trace.q.Row(0, 2, 8), row), 0);
  EXPECT_EQ(std::memcmp(split.q_prompt.Row(0, 1, 19),
                        trace.q_prompt.Row(0, 1, trace.prompt_queries - 4), row),
            0);
  EXPECT_EQ(std::memcmp(split.v.Row(0, 1, at + 3), trace.v.Row(0, 1, at + 3), row), 0);
  EXPECT_THROW(SplitAt(trace, trace.prompt_tokens, trace.steps + 1, 0, 0), UsageError);

  const Trace loop = RepeatStep(trace, 7, 50);
  EXPECT_EQ(loop.steps, 50);
  EXPECT_EQ(loop.prompt_tokens, trace.prompt_tokens + 7);
  EXPECT_EQ(std::memcmp(loop.q.Row(0, 0, 49), trace.q.Row(0, 0, 7), row), 0);
  EXPECT_EQ(std::memcmp(loop.k.Row(0, 1, loop.tokens - 1),
                        trace.k.Row(0, 1, trace.prompt_tokens + 7), row),
            0);
  EXPECT_THROW(RepeatStep(trace, trace.steps, 2), UsageError);
}

}  // namespace
}  // namespace vattn::bench
