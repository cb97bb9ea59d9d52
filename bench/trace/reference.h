// Exact attention in float64 for every (layer, query head, step) of a trace: what errors are
// measured against.
#ifndef VATTN_BENCH_TRACE_REFERENCE_H_
#define VATTN_BENCH_TRACE_REFERENCE_H_

#include <cstdint>
#include <span>
#include <vector>

#include "bench/trace/trace.h"

namespace vattn::bench {

struct Reference {
  int64_t q_heads = 0, steps = 0, head_dim_v = 0;
  std::vector<float> out;        // [layers, q_heads, steps, head_dim_v]
  std::vector<double> out_norm;  // [layers, q_heads, steps] |o|
  std::vector<double>
      rms_value;  // [layers, q_heads, steps] sqrt(sum p_i |v_i|^2), p over ALL tokens

  // layer counts the chosen layers.
  int64_t Index(int64_t layer, int64_t q_head, int64_t step) const {
    return (layer * q_heads + q_head) * steps + step;
  }
  // What a relative error is relative to: |o|, or max(|o|, floor * rms|v|) for VATTN_NORM_VALUE.
  double Ref(int64_t index, int32_t norm, double floor) const;
};

// layers: places in the trace. steps: the first ones, at most trace.steps. Scores are scaled by
// 1 / sqrt(head_dim_k). Sums are in double; out is rounded to float at the end.
Reference ComputeReference(const Trace& trace, std::span<const int32_t> layers, int64_t steps,
                           int num_threads);
// The same for chosen tokens of the recording, which must have queries; they take the place of
// steps.
Reference ComputeReferenceAt(const Trace& trace, std::span<const int32_t> layers,
                             std::span<const int64_t> positions, int num_threads);

// |a - o| of head_dim_v elements at index.
double DistanceToReference(const Reference& reference, int64_t index, const float* a);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_TRACE_REFERENCE_H_
