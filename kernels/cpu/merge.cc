#include "kernels/cpu/merge.h"

#include <algorithm>
#include <limits>

#include "kernels/cpu/rows.h"

namespace vattn::cpu {

float MergeRecords(const float* records, int64_t stride, int ranks, int dim_v, float* output,
                   JointSums& sums) {
  sums = {};
  sums.lse = JointLse(records, stride, ranks);
  std::fill_n(output, dim_v, 0.f);
  for (int r = 0; r < ranks; ++r) {
    const float* at = records + r * stride;
    const float weight = std::exp(at[kPartialLse] - sums.lse);
    for (int j = 0; j < dim_v; ++j) output[j] += weight * at[kPartialScalars + j];
  }
  for (int r = 0; r < ranks; ++r) {
    const float* at = records + r * stride;
    const float *own = at + kPartialScalars, *moment = own + dim_v;
    PartialDots dots;
    for (int j = 0; j < dim_v; ++j) {
      const float d = output[j] - own[j];
      dots.d2 += d * d;
      dots.db += d * moment[j];
      dots.b2 += moment[j] * moment[j];
    }
    AddPartial(at, dots, sums);
  }
  float norm2 = 0;
  for (int j = 0; j < dim_v; ++j) norm2 += output[j] * output[j];
  return norm2;
}

void Merge(const MergeParams& p) {
  int32_t again = 0;
  for (int64_t i = 0; i < p.heads; ++i) {
    const float* records = p.records + i * PartialFloats(p.dim_v);
    const auto [fit, forecast] = StateOfRecords(records, p.stride, p.ranks);
    if (!fit || forecast) {
      again = fit && again >= 0 ? again + 1 : -1;
      continue;
    }
    float output[kMaxDim];
    JointSums sums;
    HeadState state;
    HeadWork work;
    const float norm2 = MergeRecords(records, p.stride, p.ranks, p.dim_v, output, sums);
    JudgeJoint(p.promise, static_cast<int>(records[kPartialLook]), sums, records[kPartialMemory],
               norm2, state, work);
    const Verdict verdict = JointVerdict(sums, work.bound <= p.promise.epsilon);
    if (verdict == Verdict::kBestEffort && again >= 0) ++again;
    const DType dtype = static_cast<DType>(p.out_dtype);
    StoreRow(output, p.dim_v, dtype,
             static_cast<uint8_t*>(p.out) + i * p.dim_v * ElementBytes(dtype));
    if (p.lse != nullptr) p.lse[i] = sums.lse;
    if (p.verdict != nullptr) p.verdict[i] = static_cast<int32_t>(verdict);
    if (p.error != nullptr) p.error[i] = sums.all_whole ? 0 : sums.unsure ? HUGE_VALF : work.bound;
  }
  if (p.again != nullptr) *p.again = again;
}

}  // namespace vattn::cpu
