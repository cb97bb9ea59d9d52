// Scores of IndexKind::kExact: q.k of every middle token from its key, by a warp a token. Keys of
// the host tier are read over PCIe in every call: a yardstick, not a way to save bytes. Sums have
// another order than those of the CPU.
#include <cmath>

#include "kernels/cuda/stages.h"
#include "kernels/cuda/vocabulary.cuh"

namespace vattn::cuda {
namespace {

constexpr int kExactThreads = 256;
constexpr int kMostHeld = kMaxDim * 4 / 16 / kWarp;  // 16-byte parts of a key, in a lane

// s of one token for every head: out [heads][256].
template <DType kType>
__device__ void ScoreToken(const std::byte* key, const float* queries, int heads, int dim,
                           float* out) {
  using E = Element<kType>;
  const int lane = threadIdx.x % kWarp, parts = dim / E::kPer16;
  uint4 held[kMostHeld];
#pragma unroll
  for (int i = 0; i < kMostHeld; ++i) {
    const int part = i * kWarp + lane;
    if (part < parts) held[i] = *reinterpret_cast<const uint4*>(key + part * 16);
  }
  for (int h = 0; h < heads; ++h) {
    const float* query = queries + static_cast<int64_t>(h) * dim;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kMostHeld; ++i) {
      const int part = i * kWarp + lane;
      if (part >= parts) break;
      float x[E::kPer16];
      E::Unpack(held[i], x);
#pragma unroll
      for (int j = 0; j < E::kPer16; j += 4) {
        const float4 q = *reinterpret_cast<const float4*>(query + part * E::kPer16 + j);
        sum = fmaf(x[j], q.x, sum);
        sum = fmaf(x[j + 1], q.y, sum);
        sum = fmaf(x[j + 2], q.z, sum);
        sum = fmaf(x[j + 3], q.w, sum);
      }
    }
    sum = WarpSum(sum);
    if (lane == 0) out[h * kBlockTokens] = sum;
  }
}

template <DType kType>
__global__ void __launch_bounds__(kExactThreads) ExactKernel(const __grid_constant__ StepParams p) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, heads = p.group_heads;
  if (blockIdx.x == 0 && threadIdx.x == 0) StampTime(p, TimelinePoint::kPrepared);
  for (int64_t item = blockIdx.x; item < ScanBlocks(p); item += gridDim.x) {
    const DeviceGroup& group = p.groups[GroupOf(p, item)];
    const int64_t b = item - group.first_block, first = (FirstBlock(group) + b) * kBlockTokens;
    float* out = group.scratch.score + b * heads * kBlockTokens;
    for (int t = warp; t < kBlockTokens; t += kExactThreads / kWarp) {
      const int64_t token = first + t;
      if (token >= group.middle_begin && token < group.middle_end) {
        ScoreToken<kType>(
            reinterpret_cast<const std::byte*>(KeyAddress(RowAddress(p.storage, group, token))),
            group.scratch.query, heads, p.storage.host.row.dim_k, out + t);
      } else {
        for (int h = lane; h < heads; h += kWarp) out[h * kBlockTokens + t] = -INFINITY;
      }
    }
  }
}

template <DType kType>
int Launch(const StepParams& p, int multiprocessors, Stream stream) {
  constexpr int kBlocks = 4;  // of a multiprocessor
  ExactKernel<kType>
      <<<kBlocks * multiprocessors, kExactThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(
          p);
  return cudaGetLastError();
}

}  // namespace

int ScoreRows(const StepParams& p, int multiprocessors, Stream stream) {
  return DispatchDType(p.storage.host.row.dtype,
                       [&]<DType kType>() { return Launch<kType>(p, multiprocessors, stream); });
}

}  // namespace vattn::cuda
