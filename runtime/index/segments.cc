#include "runtime/index/segments.h"

#include <algorithm>

#include "kernels/geometry.h"
#include "kernels/params.h"

namespace vattn {
namespace {

int64_t NextBlock(int64_t token) { return (token + kBlockTokens - 1) / kBlockTokens * kBlockTokens; }

}  // namespace

CodingPlan PlanCoding(const std::vector<Segment>& segments, int64_t sinks, int64_t coded, int64_t first_own,
                      int64_t end, bool growing) {
  if (segments.empty()) return {Coding::kLearn, sinks, 0};
  const Segment& last = segments.back();
  const CodingPlan extend{Coding::kExtend, std::max(coded, sinks), last.first_block};
  // Where the tokens begin that have no learnt tables: what others hold too stays as it was coded.
  const int64_t behind = last.provisional ? last.first_block * kBlockTokens : NextBlock(last.made_from);
  const int64_t sealed = std::max(behind, first_own);
  const int64_t count = end - sealed;
  const bool appends = !last.provisional || sealed > behind;
  if (!growing || count < kCodeTokens || (appends && segments.size() >= kMaxSegments)) return extend;
  const int64_t begin = std::min(extend.begin, sealed), block = sealed / kBlockTokens;
  const int64_t enough = std::max(kLeastLearnt, static_cast<int64_t>(kGrowthShare * static_cast<double>(sealed)));
  if (count >= enough) return {Coding::kLearn, begin, block};
  if (appends || count >= 2 * (last.made_from - behind)) return {Coding::kRecentre, begin, block};
  return extend;
}

std::vector<Segment> SegmentsOf(const std::vector<Segment>& segments, int64_t coded) {
  std::vector<Segment> kept;
  for (const Segment& segment : segments) {
    if (!kept.empty() && segment.first_block * kBlockTokens >= coded) break;
    kept.push_back(segment);
    kept.back().made_from = std::min(segment.made_from, coded);
  }
  return kept;
}

}  // namespace vattn
