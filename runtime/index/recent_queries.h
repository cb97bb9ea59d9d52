// Queries of the last decode steps of one KV head, until its index wants to know them.
#ifndef VATTN_RUNTIME_INDEX_RECENT_QUERIES_H_
#define VATTN_RUNTIME_INDEX_RECENT_QUERIES_H_

#include <cstdint>
#include <vector>

#include "runtime/index/index.h"

namespace vattn {

constexpr int kRecentQueries = 16;  // steps whose queries are kept: one in kRecentEvery
constexpr int kRecentEvery = 16;

// The place in a ring of kRecentQueries that the queries of a step go to; -1: they are not kept.
VATTN_HD inline int RecentPlace(uint64_t step) {
  return step % kRecentEvery == 0 ? static_cast<int>(step / kRecentEvery % kRecentQueries) : -1;
}

class RecentQueries {
 public:
  // queries: those of one step, [count] elements in fp32, scaled.
  void Add(const float* queries, int64_t count);
  // Brings them into the moment, as speaking for all steps since the last call; group_heads: query heads per KV head.
  void MoveTo(QueryMoment& moment, int group_heads);
  bool empty() const { return steps_ == 0; }
  int64_t bytes() const { return static_cast<int64_t>(queries_.capacity() * sizeof(float)); }

 private:
  std::vector<float> queries_;  // [min(steps, kRecentQueries)][count], a ring
  int64_t steps_ = 0;           // added since the last MoveTo
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_INDEX_RECENT_QUERIES_H_
