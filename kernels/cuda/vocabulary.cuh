// The device vocabulary: elements of rows, reductions, and addresses of tokens.
#ifndef VATTN_KERNELS_CUDA_VOCABULARY_CUH_
#define VATTN_KERNELS_CUDA_VOCABULARY_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>

#include "kernels/cuda/params.h"

namespace vattn::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

template <DType kType>
struct Element;

template <>
struct Element<DType::kF32> {
  static constexpr int kBytes = 4, kPer16 = 4;
  static __device__ void Unpack(const uint4& w, float* x) {
    x[0] = __uint_as_float(w.x), x[1] = __uint_as_float(w.y);
    x[2] = __uint_as_float(w.z), x[3] = __uint_as_float(w.w);
  }
  static __device__ float2 Pair(const void* at) { return *static_cast<const float2*>(at); }
  static __device__ float One(const void* at) { return *static_cast<const float*>(at); }
};

template <>
struct Element<DType::kF16> {
  static constexpr int kBytes = 2, kPer16 = 8;
  static __device__ float2 Word(unsigned w) {
    return __half22float2(*reinterpret_cast<const __half2*>(&w));
  }
  static __device__ void Unpack(const uint4& w, float* x) {
    const unsigned words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 p = Word(words[i]);
      x[2 * i] = p.x, x[2 * i + 1] = p.y;
    }
  }
  static __device__ float2 Pair(const void* at) { return Word(*static_cast<const unsigned*>(at)); }
  static __device__ float One(const void* at) {
    return __half2float(*static_cast<const __half*>(at));
  }
};

template <>
struct Element<DType::kBF16> {
  static constexpr int kBytes = 2, kPer16 = 8;
  static __device__ float2 Word(unsigned w) {
    return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
  }
  static __device__ void Unpack(const uint4& w, float* x) {
    const unsigned words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 p = Word(words[i]);
      x[2 * i] = p.x, x[2 * i + 1] = p.y;
    }
  }
  static __device__ float2 Pair(const void* at) { return Word(*static_cast<const unsigned*>(at)); }
  static __device__ float One(const void* at) {
    return __bfloat162float(*static_cast<const __nv_bfloat16*>(at));
  }
};

// One element of an output in a dtype chosen at run time.
inline __device__ void StoreOutput(void* out, int64_t at, int32_t dtype, float value) {
  switch (static_cast<DType>(dtype)) {
    case DType::kF32:
      static_cast<float*>(out)[at] = value;
      break;
    case DType::kF16:
      static_cast<__half*>(out)[at] = __float2half_rn(value);
      break;
    case DType::kBF16:
      static_cast<__nv_bfloat16*>(out)[at] = __float2bfloat16_rn(value);
      break;
  }
}

template <class T>
__device__ T WarpSum(T x) {
#pragma unroll
  for (int o = kWarp / 2; o > 0; o /= 2) x += __shfl_xor_sync(kAllLanes, x, o);
  return x;
}

inline __device__ float WarpMax(float x) {
#pragma unroll
  for (int o = kWarp / 2; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, o));
  return x;
}

// Writes the time of a point to the timeline. One thread calls it, of the first group's first thread
// block.
inline __device__ void StampTime(const StepParams& p, TimelinePoint point) {
  if (p.call.timeline == nullptr) return;
  unsigned long long now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  p.call.timeline[static_cast<int>(point)] = now;
}

// Loads global memory that another thread block of the same kernel writes, past the L1 cache.
template <class T>
__device__ T LoadL2(const T* at) {
  return __ldcg(at);
}

inline __device__ const std::byte* HostRow(const Storage& s, const int32_t* blocks, int64_t token) {
  return s.base + blocks[token / kBlockTokens] * s.block.bytes +
         token % kBlockTokens * s.row.row_bytes;
}

// The row of a token that is in no list: sinks and ring on the device, the rest in the host pool.
inline __device__ const std::byte* RowAddress(const DeviceStorage& s, const DeviceGroup& group,
                                              int64_t token) {
  const int64_t row_bytes = s.host.row.row_bytes;
  if (token < s.sinks) return group.fixed + token * row_bytes;
  if (token >= group.ring_begin) return group.fixed + (s.sinks + token % s.ring_tokens) * row_bytes;
  return HostRow(s.host, group.blocks, token);
}

// The segments of a group's index: how many there are, the tables of one, and the segment that block
// `block` of the sequence lies in.
inline __device__ int IndexSegments(const DeviceGroup& g) {
  return vattn::NumSegments(g.num_segments);
}
inline __device__ const IndexTables& TablesOf(const DeviceGroup& g, int segment) {
  return g.num_segments > 0 ? g.segments[segment].tables : g.index;
}
inline __device__ int SegmentAt(const DeviceGroup& g, int64_t block) {
  int k = 0;  // the last one that starts there or before
#pragma unroll 1
  for (int step = kMaxSegments / 2; step > 0; step /= 2) {
    if (k + step < g.num_segments && g.segments[k + step].first_block <= block) k += step;
  }
  return k;
}
// The end of the segment, or `end` where that comes first.
inline __device__ int64_t SegmentEnd(const DeviceGroup& g, int segment, int64_t end) {
  return segment + 1 < g.num_segments ? min(end, g.segments[segment + 1].first_block) : end;
}

// What the step has for this call: nothing if it was begun for another number of query tokens than
// the call, as one in a replayed graph, was made for.
inline __device__ int NumGroups(const StepParams& p) {
  return p.header->num_tokens == p.num_tokens ? p.header->num_groups : 0;
}
inline __device__ int64_t ScanBlocks(const StepParams& p) {
  return p.header->num_tokens == p.num_tokens ? p.header->scan_blocks : 0;
}

// The place of a head among the arrays of a call, and where the tokens end that it sees.
inline __device__ int64_t HeadPlace(const StepParams& p, const DeviceGroup& g, int head) {
  const int heads = p.group_heads / p.num_tokens;
  const int64_t token = int64_t{g.slot} * p.num_tokens + head / heads;
  return (token * p.kv_heads + g.kv_head) * heads + head % heads;
}
inline __device__ int64_t VisibleEnd(const StepParams& p, const DeviceGroup& g, int head) {
  return g.tokens - p.num_tokens + 1 + head / (p.group_heads / p.num_tokens);
}
// What logits are relative to before the first row: with several query tokens finite, because there
// may be no row that a head sees.
inline __device__ float LeastLogit(const StepParams& p) {
  return p.num_tokens > 1 ? -FLT_MAX : -INFINITY;
}

// The group that a block belongs to, by its number among the StepHeader::scan_blocks of the scan.
inline __device__ int GroupOf(const StepParams& p, int64_t block) {
  int g = 0;  // the last one that starts there or before
  for (int step = 1 << 20; step > 0; step /= 2) {
    if (g + step < NumGroups(p) && p.groups[g + step].first_block <= block) g += step;
  }
  return g;
}

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_VOCABULARY_CUH_
