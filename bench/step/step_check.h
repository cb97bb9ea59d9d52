// Answers of decode steps against exact attention in float64 over the same rows.
#ifndef VATTN_BENCH_STEP_STEP_CHECK_H_
#define VATTN_BENCH_STEP_STEP_CHECK_H_

#include <cstdint>
#include <vector>

#include "bench/trace/decode_data.h"

namespace vattn::bench {

// What one query head was told in one step.
struct HeadAnswer {
  int64_t step = 0;        // it sees shape.tokens + step + 1 tokens
  int32_t verdict = 0;     // vattn_verdict
  std::vector<float> q;    // [head_dim] as the runtime got it: rounded, unscaled
  std::vector<float> out;  // [head_dim]
};

// Relative errors by what the verdict says of them.
struct AnswerErrors {
  std::vector<double> verified;  // VERIFIED: over epsilon in a share delta of them at most
  std::vector<double> exact;     // EXACT and DENSE: nothing but rounding

  int64_t VerifiedOver(double epsilon) const;  // NaN counts
  double WorstExact() const;                   // NaN if one is; 0 for none
};

// Adds the errors of the answers of query heads that read one KV head, relative to |o| or, with
// VATTN_NORM_VALUE, to max(|o|, norm_floor * rms|v|). The rows are made again, rounded to the
// shape's type, on `threads` threads.
void CheckAnswers(const DecodeShape& shape, const DecodeData& data, const HeadPlace& kv_head,
                  const std::vector<HeadAnswer>& answers, int32_t norm, double norm_floor,
                  int threads, AnswerErrors* errors);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_STEP_STEP_CHECK_H_
