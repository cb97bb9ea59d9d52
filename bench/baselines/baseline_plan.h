// One attention call of a baseline over all its units: items, queries, states, outputs; and the
// same in float64. For .cu files only.
#ifndef VATTN_BENCH_BASELINES_BASELINE_PLAN_H_
#define VATTN_BENCH_BASELINES_BASELINE_PLAN_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "bench/baselines/baseline_attention.h"
#include "bench/cuda/cuda_memory.h"

namespace vattn::bench {

class AttendPlan {
 public:
  // Items of a unit next to each other, units in order, each with at least one item. Queries are
  // DataWord(seed, ...).
  AttendPlan(const std::vector<AttendItem>& items, int32_t units, int32_t group, int32_t head_dim,
             uint64_t seed);

  // Enqueues attention of items [begin, end).
  void Attend(int32_t begin, int32_t end, cudaStream_t stream) const;
  // Enqueues what makes the items' states into outputs.
  void Merge(cudaStream_t stream) const;
  int32_t num_items() const { return static_cast<int32_t>(items_.size()); }

  // Rows of a unit on the host, [tokens] pointers to K then V.
  using UnitRows = std::function<std::vector<const uint16_t*>(int32_t unit)>;
  // The largest |out - expected| / |expected| of a unit and query head, expected being attention in
  // float64. REQUIRES that the enqueued work has ended.
  double RelativeError(const UnitRows& rows) const;

 private:
  const int32_t units_, group_, head_dim_;
  const uint64_t seed_;
  const bool indirect_;
  DeviceArray<AttendItem> items_;
  DeviceArray<int32_t> first_;
  DeviceArray<uint64_t> q_;
  DeviceArray<float> state_, out_;
};

// Tokens of an item so that so many rows in all keep the whole device busy.
int32_t ItemTokens(int64_t rows);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_BASELINES_BASELINE_PLAN_H_
