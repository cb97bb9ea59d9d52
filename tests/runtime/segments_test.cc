#include "runtime/index/segments.h"

#include <gtest/gtest.h>

#include "kernels/geometry.h"
#include "kernels/params.h"

namespace vattn {
namespace {

constexpr int64_t kSinks = 16;

// Codes a sequence as it grows, as Sequence does.
struct Growth {
  std::vector<Segment> segments;
  int64_t coded = 0, first_own = 0, recoded = 0, learnt = 0, refused = 0;

  CodingPlan To(int64_t end) {
    const CodingPlan plan = PlanCoding(segments, kSinks, coded, first_own, end, true);
    recoded += std::max<int64_t>(0, coded - plan.begin);
    learnt += plan.coding == Coding::kLearn;
    refused += plan.refused;
    if (plan.coding != Coding::kExtend) {
      if (!segments.empty() && segments.back().first_block == plan.first_block) {
        segments.pop_back();
      } else if (!segments.empty()) {
        segments.back().provisional = false;
      }
      segments.push_back({plan.first_block, end, plan.coding == Coding::kRecentre});
    }
    coded = end;
    return plan;
  }
};

TEST(PlanCodingTest, TheFirstTokensAreLearntWhateverTheirNumber) {
  Growth growth;
  const CodingPlan plan = growth.To(kSinks + 64);
  EXPECT_EQ(plan.coding, Coding::kLearn);
  EXPECT_EQ(plan.begin, kSinks);
  EXPECT_EQ(plan.first_block, 0);
}

TEST(PlanCodingTest, ALongAppendIsASegmentOfItsOwn) {
  Growth growth;
  growth.To(4096);
  const CodingPlan plan = growth.To(16384);
  EXPECT_EQ(plan.coding, Coding::kLearn);
  EXPECT_EQ(plan.first_block, 4096 / kBlockTokens);
  EXPECT_EQ(plan.begin, 4096);
}

TEST(PlanCodingTest, SegmentsBeginWithBlocks) {
  Growth growth;
  growth.To(1088);  // 4.25 blocks
  EXPECT_EQ(growth.To(1088 + kCodeTokens / 2).coding, Coding::kExtend);
  // The fifth block is coded anew, from its first token on
  const CodingPlan plan = growth.To(1088 + kCodeTokens);
  EXPECT_EQ(plan.coding, Coding::kRecentre);
  EXPECT_EQ(plan.first_block, 4);
  EXPECT_EQ(plan.begin, 1024);
}

TEST(PlanCodingTest, NothingIsMadeAnewWithoutNewTokens) {
  Growth growth;
  growth.To(1088);
  EXPECT_EQ(growth.To(1088).coding, Coding::kExtend);
  growth.To(1088 + kCodeTokens);
  EXPECT_EQ(growth.To(1088 + kCodeTokens).coding, Coding::kExtend);
}

TEST(PlanCodingTest, TokensOneByOneAreLearntOnceTheyAreAQuarterOfThoseBefore) {
  Growth growth;
  growth.To(8192);
  for (int64_t end = 8256; end < 8192 + 2048; end += kCodeTokens)
    EXPECT_NE(growth.To(end).coding, Coding::kLearn) << end;
  EXPECT_EQ(growth.To(8192 + 2048).coding, Coding::kLearn);
  EXPECT_EQ(growth.segments.size(), 2u);
}

TEST(PlanCodingTest, AMillionTokensOneByOneNeedFewSegmentsAndLittleRecoding) {
  Growth growth;
  growth.To(1024);
  for (int64_t end = 1088; end <= 1 << 20; end += kCodeTokens) growth.To(end);
  EXPECT_LE(growth.segments.size(), 32u);
  EXPECT_LT(growth.segments.size(), static_cast<size_t>(kMaxSegments));
  EXPECT_LT(growth.recoded, 10 << 20);  // each token a few times
  EXPECT_EQ(growth.refused, 0);
}

TEST(PlanCodingTest, CodesThatOthersHoldStay) {
  Growth growth;
  growth.To(4096);
  growth.To(4096 + 512);
  ASSERT_TRUE(growth.segments.back().provisional);
  growth.first_own = 4096 + 512;
  const CodingPlan plan = growth.To(4096 + 512 + 2048);
  EXPECT_EQ(plan.coding, Coding::kLearn);
  EXPECT_EQ(plan.begin, 4096 + 512);
  EXPECT_EQ(growth.segments.size(), 3u);
  EXPECT_FALSE(growth.segments[1].provisional);
}

TEST(PlanCodingTest, AFullTableOfSegmentsGoesOnWithTheLast) {
  Growth growth;
  for (int i = 0; i < kMaxSegments; ++i) growth.segments.push_back({i * 8, (i + 1) * 2048, false});
  growth.coded = growth.first_own = kMaxSegments * 2048;
  const CodingPlan plan = growth.To(kMaxSegments * 2048 * 2);
  EXPECT_EQ(plan.coding, Coding::kExtend);
  EXPECT_EQ(plan.begin, kMaxSegments * 2048);
  EXPECT_TRUE(plan.refused);
}

// Turns that each go on from blocks that others hold too, and a long text after every 200 of them.
TEST(PlanCodingTest, TurnsOfForksLeaveSegmentsForLongTexts) {
  Growth growth;
  int64_t end = 2048;
  growth.To(end);
  for (int i = 0; i < 1000; ++i) {
    growth.first_own = end;
    const int64_t refused = growth.refused;
    const bool has_room = static_cast<int>(growth.segments.size()) < kMaxSegments - kSparedSegments;
    EXPECT_NE(growth.To(end += 512).coding, Coding::kLearn);
    EXPECT_EQ(growth.refused > refused, !has_room) << i;
    if (i % 200 != 199) continue;
    growth.first_own = end;
    EXPECT_EQ(growth.To(end += end / 2).coding, Coding::kLearn) << i;
  }
  EXPECT_LE(growth.segments.size(), static_cast<size_t>(kMaxSegments));
}

TEST(PlanCodingTest, OtherKindsKeepOneSegment) {
  const CodingPlan plan =
      PlanCoding({{0, 2048, false}}, kSinks, 2048, 2048, 16384, /*growing=*/false);
  EXPECT_EQ(plan.coding, Coding::kExtend);
  EXPECT_EQ(plan.begin, 2048);
}

TEST(SegmentsOfTest, ATruncationForgetsSegmentsBehindItAndWhatTheyWereMadeFrom) {
  const std::vector<Segment> all = {{0, 4096, false}, {16, 8192, false}, {32, 9000, true}};
  const std::vector<Segment> kept = SegmentsOf(all, 5120);
  ASSERT_EQ(kept.size(), 2u);
  EXPECT_EQ(kept[1].made_from, 5120);  // what is appended next is new text
  EXPECT_EQ(SegmentsOf(all, 8192 + 64).size(), 3u);
  EXPECT_EQ(SegmentsOf(all, 0).size(), 1u);
}

}  // namespace
}  // namespace vattn
