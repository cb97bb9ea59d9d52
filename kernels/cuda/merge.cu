// Answers from the records of several ranks, a warp a head.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/merge.cuh"

namespace vattn::cuda {
namespace {

constexpr int kMergeThreads = 128, kMergeWarps = kMergeThreads / kWarp;

__global__ void __launch_bounds__(kMergeThreads)
    MergeKernel(const __grid_constant__ MergeParams p) {
  extern __shared__ float outputs[];  // [kMergeWarps][dim_v]
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float* output = outputs + warp * p.dim_v;
  for (int64_t i = int64_t{blockIdx.x} * kMergeWarps + warp; i < p.heads;
       i += int64_t{gridDim.x} * kMergeWarps) {
    const float* records = p.records + i * PartialFloats(p.dim_v);
    const auto [fit, forecast] = StateOfRecords(records, p.stride, p.ranks);
    if (!fit || forecast) {
      if (lane == 0 && p.again != nullptr) atomicAdd(p.again, fit ? 1 : -(1 << 24));
      continue;
    }
    JointSums sums;
    HeadState state;
    HeadWork work;
    const float norm2 = MergeRecords(records, p.stride, p.ranks, p.dim_v, output, sums);
    JudgeJoint(p.promise, static_cast<int>(records[kPartialLook]), sums, records[kPartialMemory],
               norm2, state, work);
    const Verdict verdict = JointVerdict(sums, work.bound <= p.promise.epsilon);
    for (int j = lane; j < p.dim_v; j += kWarp)
      StoreOutput(p.out, i * p.dim_v + j, p.out_dtype, output[j]);
    if (lane > 0) continue;
    if (verdict == Verdict::kBestEffort && p.again != nullptr) atomicAdd(p.again, 1);
    if (p.lse != nullptr) p.lse[i] = sums.lse;
    if (p.verdict != nullptr) p.verdict[i] = static_cast<int32_t>(verdict);
    if (p.error != nullptr) p.error[i] = sums.all_whole ? 0 : sums.unsure ? INFINITY : work.bound;
  }
}

}  // namespace

int Merge(const MergeParams& p, Stream stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream.handle);
  if (p.again != nullptr) {
    const cudaError_t error = cudaMemsetAsync(p.again, 0, sizeof(*p.again), s);
    if (error != cudaSuccess) return error;
  }
  const int64_t blocks = (p.heads + kMergeWarps - 1) / kMergeWarps;
  MergeKernel<<<static_cast<unsigned>(blocks < 65536 ? blocks : 65536), kMergeThreads,
                kMergeWarps * p.dim_v * sizeof(float), s>>>(p);  // on the caller's stream
  return cudaGetLastError();
}

}  // namespace vattn::cuda
