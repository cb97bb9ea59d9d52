#include "runtime/index/recent_queries.h"

#include <algorithm>

namespace vattn {

void RecentQueries::Add(const float* queries, int64_t count) {
  const int64_t place = steps_++ % kRecentQueries;
  if (static_cast<int64_t>(queries_.size()) < (place + 1) * count) {
    queries_.resize(static_cast<size_t>((place + 1) * count));
  }
  std::copy_n(queries, count, queries_.begin() + place * count);
}

void RecentQueries::MoveTo(QueryMoment& moment, int group_heads) {
  if (steps_ == 0) return;
  const int64_t kept = std::min<int64_t>(steps_, kRecentQueries);
  moment.Add(queries_.data(), kept * group_heads, steps_ * kRecentEvery);
  queries_.clear();
  steps_ = 0;
}

}  // namespace vattn
