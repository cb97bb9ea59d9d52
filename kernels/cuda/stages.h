// The stages of a decode step on CUDA. Decode in decode.cu launches them in this order:
//
//   Prepare     prepare.cu                     the new token's row, packed queries, sinks and window
//   ScoreRows   exact.cu                       true scores, for IndexKind::kExact
//   TakeScores  external.cu                    the caller's scores, for IndexKind::kExternal
//   Scan        scan.cu                        predicted scores or estimates
//   SumValues   values.cu                      the value codes' answer for the whole middle
//   PlanDraw    plan.cu, plan.cuh              multipliers, by a team of thread blocks a group
//   Predict     plan.cu, sample.cuh            variance and candidates under the plan
//   Answer      answer.cuh                     a team of thread blocks a group:
//                 plan.cuh, sample.cuh           scale and draw      (kernels/cpu/plan, sample)
//                 attend.cuh, rows.cuh           rows and estimate   (kernels/cpu/estimate, attend)
//                 values.cuh                     value codes         (kernels/cpu/encode)
//                 verify.cuh                     certificate, growth (kernels/cpu/verify)
//                 topk.cuh, rank.cuh             top-k policies      (kernels/cpu/topk)
//                 report.cuh                     outputs and counts
//
// A slice of a context goes through Forecast and LookOn of decode.cu in place of it: Prepare, Scan and
// WriteForecasts (ranks.cu); then, each time that ranks have exchanged their records, DecideLooks
// (ranks.cu, merge.cuh), the first time PlanDraw and Predict, and a look (ranks.cuh).
#ifndef VATTN_KERNELS_CUDA_STAGES_H_
#define VATTN_KERNELS_CUDA_STAGES_H_

#include "kernels/cuda/params.h"

namespace vattn::cuda {

// Calls f<kType>() for a dtype that is chosen at run time, and returns what it returns.
template <class F>
auto DispatchDType(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f.template operator()<DType::kF32>();
    case DType::kF16:
      return f.template operator()<DType::kF16>();
    default:
      return f.template operator()<DType::kBF16>();
  }
}

// Calls f<kType, kHeads>() for a dtype and the least number of heads that kernels are built for.
template <class F>
int DispatchRows(DType dtype, int heads, F&& f) {
  return DispatchDType(dtype, [&]<DType kType>() {
    return heads <= 4 ? f.template operator()<kType, 4>() : f.template operator()<kType, 8>();
  });
}

// The answer kernels of one dtype, each built by its own translation unit.
template <DType kType>
struct AnswerOf {
  static int Launch(const StepParams& params, const AnswerShape& shape, Stream stream);
  static AnswerShape Shape(const DeviceStorage& storage, int group_heads, int groups);
};
extern template struct AnswerOf<DType::kF32>;
extern template struct AnswerOf<DType::kF16>;
extern template struct AnswerOf<DType::kBF16>;

// The kernels that take a look at a slice of a context, the same way.
template <DType kType>
struct LookOf {
  static int Launch(const StepParams& params, const AnswerShape& shape, Stream stream);
};
extern template struct LookOf<DType::kF32>;
extern template struct LookOf<DType::kF16>;
extern template struct LookOf<DType::kBF16>;

int Prepare(const StepParams& params, Stream stream);
// True scores of the middle from its keys, for IndexKind::kExact.
int ScoreRows(const StepParams& params, int multiprocessors, Stream stream);
// The caller's scores of the middle, for IndexKind::kExternal.
int TakeScores(const StepParams& params, int multiprocessors, Stream stream);
int Scan(const StepParams& params, int multiprocessors, Stream stream);
// Multipliers of every head, by up to `team` thread blocks a group: not more than it has room for in
// GroupScratch::partial.
int PlanDraw(const StepParams& params, int team, Stream stream);
// Predicted variance and candidates of the whole middle under the plan.
int Predict(const StepParams& params, Stream stream);
// Of a slice of a context: what it expects, to its records; and what the records of all ranks lead to,
// with the answers that are there.
int WriteForecasts(const StepParams& params, Stream stream);
int DecideLooks(const StepParams& params, bool first, Stream stream);
int Answer(const StepParams& params, const AnswerShape& shape, Stream stream);

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_STAGES_H_
