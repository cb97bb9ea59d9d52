#include "runtime/index/segments.h"

#include <algorithm>

#include "kernels/geometry.h"
#include "kernels/params.h"

namespace vattn {

int64_t WithoutTables(const Segment& last) {
  return last.provisional ? last.first_block * kBlockTokens
                          : last.made_from / kBlockTokens * kBlockTokens;
}

CodingPlan PlanCoding(const std::vector<Segment>& segments, int64_t sinks, int64_t coded,
                      int64_t first_own, int64_t end, bool growing) {
  if (segments.empty()) return {Coding::kLearn, sinks, 0};
  const Segment& last = segments.back();
  CodingPlan extend{Coding::kExtend, std::max(coded, sinks), last.first_block};
  // Where the tokens begin that have no learnt tables, from the start of their block on: what
  // others hold too stays as it was coded.
  const int64_t behind = WithoutTables(last);
  const int64_t sealed = std::max(behind, first_own);
  const int64_t count = end - sealed;
  const bool appends = !last.provisional || sealed > behind;
  if (!growing || end - last.made_from < kCodeTokens || count < kCodeTokens) return extend;
  const int64_t begin = std::min(extend.begin, sealed), block = sealed / kBlockTokens;
  const int64_t enough =
      std::max(kLeastLearnt, static_cast<int64_t>(kGrowthShare * static_cast<double>(sealed)));
  const int most = kMaxSegments - (count >= enough ? 0 : kSparedSegments);
  if (appends && static_cast<int>(segments.size()) >= most) {
    extend.refused = true;
    return extend;
  }
  if (count >= enough) return {Coding::kLearn, begin, block};
  const int64_t made = last.made_from - behind;
  const int64_t more = std::max(std::min(made, kLeastFlooded),
                                static_cast<int64_t>(kRemadeShare * static_cast<double>(made)));
  if (appends || count >= made + more) return {Coding::kRecentre, begin, block};
  return extend;
}

void TrimSegments(int64_t coded, std::vector<Segment>& segments) {
  while (segments.size() > 1 && segments.back().first_block * kBlockTokens >= coded)
    segments.pop_back();
  for (Segment& segment : segments) segment.made_from = std::min(segment.made_from, coded);
}

std::vector<Segment> SegmentsOf(const std::vector<Segment>& segments, int64_t coded) {
  std::vector<Segment> kept = segments;
  TrimSegments(coded, kept);
  return kept;
}

}  // namespace vattn
