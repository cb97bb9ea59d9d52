// External scores of a recording as PillarAttn gets them (SparseSpec): every kStride steps a full
// pass leaves its exact scores, which the steps up to and including the next full pass predict
// with.
#ifndef VATTN_BENCH_TRACE_REUSED_SCORES_H_
#define VATTN_BENCH_TRACE_REUSED_SCORES_H_

#include <cstdint>
#include <span>
#include <vector>

#include "bench/trace/trace.h"

namespace vattn::bench {

class ReusedScores {
 public:
  static constexpr int64_t kStride = 8;

  // Keeps references to both.
  ReusedScores(const Trace& trace, std::span<const int32_t> layers)
      : trace_(trace), layers_(layers) {}

  // Scores for a step, [layers, q_heads, stride()], of every token that the step sees; 0 for those
  // that came after the pass they are from, which the window covers. Step 0 has those of the
  // prompt's last query, or its own where none was recorded. Valid until the next call.
  const float* At(int64_t step);
  int64_t stride() const { return trace_.tokens; }

 private:
  const Trace& trace_;
  const std::span<const int32_t> layers_;
  int64_t from_ = -2;  // the step they are of; -1: the prompt's last query
  std::vector<float> scores_;
};

}  // namespace vattn::bench

#endif  // VATTN_BENCH_TRACE_REUSED_SCORES_H_
