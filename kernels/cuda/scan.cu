// Scan of the index: predicted scores of every middle token for every head of its group, as fp16
// estimates relative to the largest of their block (kernels/cpu/scan.h has the definition). A warp takes
// a block of 256 tokens: a lane holds neighbouring tokens, so that one load brings a code word of each.
#include <cmath>

#include "kernels/cuda/stages.h"
#include "kernels/cuda/vocabulary.cuh"
#include "kernels/sampling.h"

namespace vattn::cuda {
namespace {

constexpr int kScanThreads = 256;
constexpr int kTokens = 4;                    // of a lane at a time
constexpr int kRunTokens = kWarp * kTokens;   // of a warp
constexpr int kRuns = kBlockTokens / kRunTokens;

struct Words {
  int words8, words4, words2;
};

// The polynomial of kernels/cpu/scan.cc, operation by operation.
__device__ float ExpNegative(float x) {
  const float y = fmaxf(__fmul_rn(x, 1.44269504f), -30.f);
  const float n = rintf(y);
  const float f = __fsub_rn(y, n);
  float p = fmaf(f, .00961813f, .05550411f);
  p = fmaf(f, p, .24022651f);
  p = fmaf(f, p, .69314718f);
  p = fmaf(f, p, 1.f);
  const float e = __int_as_float(__float_as_int(p) + (static_cast<int>(n) << 23));
  return y > -29.f ? e : 0;
}

// acc[h][t] += the dot products of one run of 4 dimensions: codes of the lane's tokens with run r.
template <int kHeads>
__device__ void DotRun(const uint32_t (&codes)[kTokens], const int32_t* run, int (&acc)[kHeads][kTokens]) {
  int32_t q[kHeads];
  if constexpr (kHeads % 4 == 0) {
#pragma unroll
    for (int h = 0; h < kHeads; h += 4) *reinterpret_cast<int4*>(q + h) = *reinterpret_cast<const int4*>(run + h);
  } else {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) q[h] = run[h];
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) acc[h][t] = __dp4a(static_cast<int>(codes[t]), q[h], acc[h][t]);
  }
}

template <int kBits, int kHeads>
__device__ void DotWord(const uint4& word, const int32_t (*run)[8], int (&acc)[kHeads][kTokens]) {
  constexpr uint32_t kMask = kBits == 8 ? 0xffffffffu : kBits == 4 ? 0x0f0f0f0fu : 0x03030303u;
  const uint32_t w[kTokens] = {word.x, word.y, word.z, word.w};
#pragma unroll
  for (int i = 0; i < 8 / kBits; ++i) {
    uint32_t codes[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) codes[t] = (w[t] >> (kBits * i)) & kMask;
    DotRun<kHeads>(codes, run[i], acc);
  }
}

// Ordered like the float it is made of.
__device__ int OrderedInt(float x) {
  const int i = __float_as_int(x);
  return i < 0 ? i ^ 0x7fffffff : i;
}
__device__ float FromOrderedInt(int i) { return __int_as_float(i < 0 ? i ^ 0x7fffffff : i); }

// A lane's scores of a block wait in shared memory until the largest is known: registers for all of them
// would leave room for few warps.
template <int kHeads>
struct BlockScores {
  float score[kRuns * kHeads * kTokens][kWarp];
  __device__ float& At(int run, int h, int t) { return score[(run * kHeads + h) * kTokens + t][threadIdx.x % kWarp]; }
};

// One block of 256 tokens for up to kHeads heads from `first` on, by one warp. k8, k4, k2 >= 0: words of
// each precision known at compile time.
template <int kHeads, int k8, int k4, int k2>
__device__ void ScanBlock(const std::byte* codes, const Words& words, const PackedQueries& q, int heads,
                          int begin, int end, BlockScores<kHeads>& scores, uint16_t* estimate, float* shift,
                          float* mass) {
  const int lane = threadIdx.x % kWarp;
  const int words8 = k8 >= 0 ? k8 : words.words8, words4 = k4 >= 0 ? k4 : words.words4;
  const int words2 = k2 >= 0 ? k2 : words.words2, all = words8 + words4 + words2;
#pragma unroll 1
  for (int run = 0; run < kRuns; ++run) {
    const int token = run * kRunTokens + lane * kTokens;
    const uint4* at = reinterpret_cast<const uint4*>(codes + (token / kTileTokens) * all * 64 + token % kTileTokens * 4);
    int acc[kHeads][kTokens] = {};
    const int32_t(*level)[8] = q.run;
    if constexpr (k4 >= 0) {
      uint4 word[k8 + k4 + k2];
#pragma unroll
      for (int w = 0; w < k8 + k4 + k2; ++w) word[w] = __ldcs(at + w * 4);
#pragma unroll
      for (int w = 0; w < k8; ++w) DotWord<8, kHeads>(word[w], level + w, acc);
#pragma unroll
      for (int w = 0; w < k4; ++w) DotWord<4, kHeads>(word[k8 + w], level + k8 + 2 * w, acc);
#pragma unroll
      for (int w = 0; w < k2; ++w) DotWord<2, kHeads>(word[k8 + k4 + w], level + k8 + 2 * k4 + 4 * w, acc);
    } else {
      for (int w = 0; w < words8; ++w, at += 4, level += 1) DotWord<8, kHeads>(__ldcs(at), level, acc);
      for (int w = 0; w < words4; ++w, at += 4, level += 2) DotWord<4, kHeads>(__ldcs(at), level, acc);
      for (int w = 0; w < words2; ++w, at += 4, level += 4) DotWord<2, kHeads>(__ldcs(at), level, acc);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const bool inside = token + t >= begin && token + t < end;
        scores.At(run, h, t) = inside ? fmaf(static_cast<float>(acc[h][t]), q.scale[h], q.offset[h]) : -INFINITY;
      }
    }
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h >= heads) break;
    float most = -INFINITY;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) most = fmaxf(most, scores.At(run, h, t));
    }
    most = FromOrderedInt(__reduce_max_sync(kAllLanes, OrderedInt(most)));
    unsigned sum = 0;  // in units of 2^-24, in which every estimate is whole
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      ushort4 half;
      unsigned short* out = &half.x;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float s = scores.At(run, h, t);
        const float e = s > -INFINITY ? fmaxf(ExpNegative(__fsub_rn(s, most)), kLeastEstimate) : 0;
        const __half rounded = __float2half_rn(e);
        out[t] = __half_as_ushort(rounded);
        sum += static_cast<unsigned>(__half2float(rounded) * 0x1p24f);
      }
      *reinterpret_cast<ushort4*>(estimate + h * kBlockTokens + run * kRunTokens + lane * kTokens) = half;
    }
    // A warp's sum may reach 2^32, so its halves are added apart.
    const unsigned low = __reduce_add_sync(kAllLanes, sum & 0xfff), high = __reduce_add_sync(kAllLanes, sum >> 12);
    if (lane == 0) {
      shift[h] = most;
      mass[h] = fmaf(static_cast<float>(high), 0x1p-12f, static_cast<float>(low) * 0x1p-24f);
    }
  }
}

template <int kHeads, int k8, int k4, int k2>
__global__ void __launch_bounds__(kScanThreads, kHeads <= 4 ? 4 : 2) ScanKernel(const __grid_constant__ DecodeParams p) {
  constexpr int kWarps = kScanThreads / kWarp;
  __shared__ __align__(16) PackedQueries packed;
  extern __shared__ __align__(16) std::byte memory[];
  const Storage& s = p.storage.host;
  const Words words{s.code.dims8 / 4, s.code.dims4 / 8, s.code.dims2 / 16};
  const int warp = threadIdx.x / kWarp;
  // Thread blocks take contiguous runs of the blocks of all groups.
  if (blockIdx.x == 0 && threadIdx.x == 0) Note(p, Mark::kPrepared);
  const int64_t all = p.header->scan_blocks;
  const int64_t from = all * blockIdx.x / gridDim.x, to = all * (blockIdx.x + 1) / gridDim.x;
  if (from >= to) return;
  int g = 0;
  for (int step = 1 << 20; step > 0; step /= 2) {
    if (g + step < p.header->num_groups && p.groups[g + step].first_block <= from) g += step;
  }
  for (int64_t at = from; at < to; ++g) {
    const DeviceGroup& group = p.groups[g];
    const int64_t end = min(to, group.first_block + NumBlocks(group));
    if (end <= at) continue;
    for (int first = 0; first < p.q_heads; first += kHeads) {
      __syncthreads();
      const PackedQueries& source = group.scratch.packed[first / 8];
      const int runs = words.words8 + 2 * words.words4 + 4 * words.words2;
      for (int i = threadIdx.x; i < runs * 8; i += kScanThreads) (&packed.run[0][0])[i] = (&source.run[0][0])[i];
      if (threadIdx.x < 8) {
        packed.scale[threadIdx.x] = source.scale[threadIdx.x];
        packed.offset[threadIdx.x] = source.offset[threadIdx.x];
      }
      __syncthreads();
      for (int64_t item = at + warp; item < end; item += kWarps) {
        const int64_t b = item - group.first_block, block = FirstBlock(group) + b, token = block * kBlockTokens;
        const std::byte* codes = p.storage.codes + group.blocks[block] * p.storage.code_block_bytes;
        const int64_t out = b * p.q_heads + first;
        ScanBlock<kHeads, k8, k4, k2>(
            codes, words, packed, min(kHeads, p.q_heads - first),
            static_cast<int>(max(group.middle_begin - token, int64_t{0})),
            static_cast<int>(min(group.middle_end - token, int64_t{kBlockTokens})),
            reinterpret_cast<BlockScores<kHeads>*>(memory)[warp], group.scratch.estimate + out * kBlockTokens, group.scratch.shift + out, group.scratch.mass + out);
      }
    }
    at = end;
  }
}

template <class Kernel>
int LaunchKernel(Kernel kernel, int bytes, const DecodeParams& p, int blocks, cudaStream_t stream) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<blocks, kScanThreads, bytes, stream>>>(p);
  return cudaGetLastError();
}

template <int kHeads>
int Launch(const DecodeParams& p, int blocks, cudaStream_t stream) {
  constexpr int kBytes = kScanThreads / kWarp * sizeof(BlockScores<kHeads>);
  const CodeLayout& c = p.storage.host.code;
  if (c.dims8 == 0 && c.dims4 == 40 && c.dims2 == 48) {
    return LaunchKernel(ScanKernel<kHeads, 0, 5, 3>, kBytes, p, blocks, stream);
  }
  return LaunchKernel(ScanKernel<kHeads, -1, -1, -1>, kBytes, p, blocks, stream);
}

}  // namespace

int Scan(const DecodeParams& p, int blocks, Stream stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream.handle);
  if (p.q_heads <= 1) return Launch<1>(p, blocks, s);
  if (p.q_heads <= 2) return Launch<2>(p, blocks, s);
  if (p.q_heads <= 4) return Launch<4>(p, blocks, s);
  if (p.q_heads == 6) return Launch<6>(p, blocks, s);
  return Launch<8>(p, blocks, s);
}

}  // namespace vattn::cuda
