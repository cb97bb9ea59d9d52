// Scores of IndexKind::kExternal: those that the caller passes, as fp32 to GroupScratch::score, a
// thread a token. Read by the lengths of the step, which a replayed graph may have outgrown: what
// lies behind the rows of the caller's array is taken for NaN.
#include <cmath>

#include "kernels/cuda/stages.h"
#include "kernels/cuda/vocabulary.cuh"
#include "kernels/sampling.h"

namespace vattn::cuda {
namespace {

// s^ as the scan goes on with it. Minus infinity would mean that a token is not in the middle, and it
// would never be drawn; nor would one with NaN, which therefore leaves nothing to plan with. In a
// ranking NaN is worst, and what codes mark as outliers comes first (kernels/cpu/scan.cc).
__device__ float Usable(float score, bool ranked) {
  if (score == -INFINITY) return -FLT_MAX;
  if (ranked) return score == kOutlierScore ? -kOutlierScore : score;
  return score == score ? score : INFINITY;
}

template <DType kType>
__global__ void __launch_bounds__(kBlockTokens)
    TakeScoresKernel(const __grid_constant__ StepParams p) {
  const int heads = p.group_heads, own = heads / p.num_tokens;  // of one query token
  const bool apart = p.call.score_heads != p.kv_heads;          // each query head has a row
  const bool ranked = p.promise.policy != Policy::kVerified;
  if (blockIdx.x == 0 && threadIdx.x == 0) StampTime(p, TimelinePoint::kPrepared);
  for (int64_t item = blockIdx.x; item < ScanBlocks(p); item += gridDim.x) {
    const DeviceGroup& group = p.groups[GroupOf(p, item)];
    const int64_t b = item - group.first_block,
                  token = (FirstBlock(group) + b) * kBlockTokens + threadIdx.x;
    float* const out = group.scratch.score + b * heads * kBlockTokens + threadIdx.x;
    const bool middle = token >= group.middle_begin && token < group.middle_end;
    for (int h = 0; h < heads; ++h) {
      float score = -INFINITY;
      if (middle) {
        const int64_t place = HeadPlace(p, group, h), row = apart ? place : place / own,
                      at = row * p.call.scores_stride + token;
        const float given = token < p.call.scores_stride
                                ? Element<kType>::One(static_cast<const std::byte*>(p.call.scores) +
                                                      at * Element<kType>::kBytes)
                                : NAN;
        score = Usable(given, ranked);
      }
      out[h * kBlockTokens] = score;
    }
  }
}

}  // namespace

int TakeScores(const StepParams& p, int multiprocessors, Stream stream) {
  constexpr int kBlocks = 8;  // of a multiprocessor
  return DispatchDType(static_cast<DType>(p.call.scores_dtype), [&]<DType kType>() {
    TakeScoresKernel<kType>
        <<<kBlocks * multiprocessors, kBlockTokens, 0, static_cast<cudaStream_t>(stream.handle)>>>(
            p);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace vattn::cuda
