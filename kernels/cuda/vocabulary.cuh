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

// 16 bytes of a caller's rows to an aligned place. Their strides are the caller's: only whole elements
// are sure to be aligned.
inline __device__ void CopyGiven(std::byte* to, const std::byte* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    return;
  }
  for (int b = 0; b < 16; b += 2)
    *reinterpret_cast<uint16_t*>(to + b) = *reinterpret_cast<const uint16_t*>(from + b);
}

// The row of a token in the library's own pool.
inline __device__ const std::byte* HostRow(const Storage& s, const int32_t* blocks, int64_t token) {
  return s.base + blocks[token / kBlockTokens] * s.block.bytes +
         token % kBlockTokens * s.row.row_bytes;
}

// The slot of a token: its place among all tokens of the pool.
inline __device__ int64_t SlotOf(const Storage& s, const DeviceGroup& group, int64_t token) {
  const TokenPlace at = PlaceOf(s.block, token);
  return int64_t{group.blocks[at.block]} * s.block.tokens + at.in_block;
}

inline __device__ int64_t HotKey(const Storage& s, const DeviceGroup& group, int64_t token) {
  return group.hot_key + SlotOf(s, group, token);
}

// An address of a row has its lowest bit set where K and V lie as in an engine's pool, which is not as
// they lie on the device. Rows are aligned to 16 bytes.
constexpr uint64_t kSplitRow = 1;
inline __device__ uint64_t PoolRow(const DeviceStorage& s, const DeviceGroup& group,
                                   int64_t token) {
  return reinterpret_cast<uint64_t>(RowAt(s.host, group.blocks, group.kv_head, token)) +
         (s.split ? kSplitRow : 0);
}
inline __device__ uint64_t KeyAddress(uint64_t row) { return row & ~kSplitRow; }
inline __device__ uint64_t ValueAddress(const DeviceStorage& s, uint64_t row) {
  return (row & kSplitRow) != 0 ? row - kSplitRow + s.pool_v_offset : row + s.host.row.v_offset;
}

// The row of a token that is in no list: sinks and ring on the device, the rest in the host pool.
inline __device__ uint64_t RowAddress(const DeviceStorage& s, const DeviceGroup& group,
                                      int64_t token) {
  const int64_t row_bytes = s.host.row.row_bytes;
  const bool ring = token >= group.ring_begin;
  if (token >= s.sinks && !ring) return PoolRow(s, group, token);
  const int64_t place = token < s.sinks ? token : s.sinks + token % s.ring_tokens;
  return reinterpret_cast<uint64_t>(group.fixed + place * row_bytes);
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

// The query token of a head, the place of a head among the arrays of a call, and where the tokens end
// that it sees.
inline __device__ int QueryToken(const StepParams& p, const DeviceGroup& g, int head) {
  return min(head / (p.group_heads / p.num_tokens), g.num_queries - 1);
}
inline __device__ int64_t HeadPlace(const StepParams& p, const DeviceGroup& g, int head) {
  const int heads = p.group_heads / p.num_tokens;
  return ((g.first_query + QueryToken(p, g, head)) * p.kv_heads + g.kv_head) * heads + head % heads;
}
inline __device__ int64_t VisibleEnd(const StepParams& p, const DeviceGroup& g, int head) {
  return g.tokens - g.num_queries + 1 + QueryToken(p, g, head);
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
