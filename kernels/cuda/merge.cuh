// Merging the records of several ranks by a warp, as kernels/cpu/merge.cc.
#ifndef VATTN_KERNELS_CUDA_MERGE_CUH_
#define VATTN_KERNELS_CUDA_MERGE_CUH_

#include "kernels/cuda/vocabulary.cuh"
#include "kernels/merge.h"

namespace vattn::cuda {

// The joint output o' [dim_v] of one head, to memory that the lanes of a warp share by element, and the
// sums of its certificate, the same in every lane. Returns |o'|^2.
inline __device__ float MergeRecords(const float* records, int64_t stride, int ranks, int dim_v,
                                     float* output, JointSums& sums) {
  const int lane = threadIdx.x % kWarp;
  sums = {};
  sums.lse = JointLse(records, stride, ranks);
  float norm2 = 0;
  for (int j = lane; j < dim_v; j += kWarp) {
    float sum = 0;
    for (int r = 0; r < ranks; ++r) {
      const float* at = records + r * stride;
      sum = fmaf(expf(at[kPartialLse] - sums.lse), at[kPartialScalars + j], sum);
    }
    output[j] = sum;
    norm2 = fmaf(sum, sum, norm2);
  }
  for (int r = 0; r < ranks; ++r) {
    const float* at = records + r * stride;
    const float *own = at + kPartialScalars, *moment = own + dim_v;
    PartialDots dots;
    for (int j = lane; j < dim_v; j += kWarp) {
      const float d = output[j] - own[j];
      dots.d2 = fmaf(d, d, dots.d2);
      dots.db = fmaf(d, moment[j], dots.db);
      dots.b2 = fmaf(moment[j], moment[j], dots.b2);
    }
    dots.d2 = WarpSum(dots.d2), dots.db = WarpSum(dots.db), dots.b2 = WarpSum(dots.b2);
    AddPartial(at, dots, sums);
  }
  return WarpSum(norm2);
}

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_MERGE_CUH_
