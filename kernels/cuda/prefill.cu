// Exact attention of many query tokens at once, as kernels/cpu/prefill.cc: rows come from the host
// pool chunk by chunk, and a tile of queries keeps its sums from one chunk to the next. Products are
// those of the tensor cores in the type of the rows, sums are fp32 (FlashAttention-2, arXiv
// 2307.08691). Few queries make few tiles: then thread blocks share the keys of a tile, each with sums
// of its own, which are merged in the end (Flash-Decoding).
#include <cmath>
#include <type_traits>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/vocabulary.cuh"
#include "kernels/sampling.h"

namespace vattn::cuda {
namespace {

constexpr int kPadding =
    8;  // elements behind each row of shared memory, so that rows lie in other banks
constexpr float kLn2 = .69314718f;

// Two elements of the type of rows from two floats, the first in the low half.
template <class T>
__device__ uint32_t Pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

__device__ float PowerOf2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// c [16][8] += a [16][16] b [16][8], spread over a warp as mma.m16n8k16 has it.
template <class T>
__device__ void MultiplyAdd(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

__device__ uint32_t Shared(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// Four matrices [8][8] from shared memory, to the operand of a product; with kTurned transposed.
template <bool kTurned>
__device__ void LoadMatrices(uint32_t (&out)[4], uint32_t at) {
  if constexpr (kTurned) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at));
  }
}

__device__ void CopyAsync16(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(there ? 16 : 0));
}

// Two neighbouring elements of an output, from an even place on.
__device__ void StorePair(void* out, int64_t at, int32_t dtype, float x, float y) {
  switch (static_cast<DType>(dtype)) {
    case DType::kF32:
      *reinterpret_cast<float2*>(static_cast<float*>(out) + at) = make_float2(x, y);
      break;
    case DType::kF16:
      *reinterpret_cast<uint32_t*>(static_cast<__half*>(out) + at) = Pack<__half>(x, y);
      break;
    case DType::kBF16:
      *reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(out) + at) =
          Pack<__nv_bfloat16>(x, y);
      break;
  }
}

// A warp has kTiles tiles of 16 queries; a query is a query head of a token, and those of a token
// follow each other. kKeys keys are in shared memory at a time, twice. Up to kDimK and kDimV elements
// a row.
template <class TypeOfRows, int kWarpsOf, int kTilesOf, int kKeysOf, int kDimKOf, int kDimVOf>
struct Plan {
  using T = TypeOfRows;
  static constexpr int kWarps = kWarpsOf, kTiles = kTilesOf, kKeys = kKeysOf, kDimK = kDimKOf,
                       kDimV = kDimVOf;
  static constexpr int kThreads = kWarps * kWarp, kQueries = kWarps * kTiles * 16;
  static constexpr int kPitchK = kDimK + kPadding, kPitchV = kDimV + kPadding;
  static constexpr int kColumns = kDimV / 8;
  static constexpr int kBytes = (kQueries * kPitchK + 2 * kKeys * (kPitchK + kPitchV)) * 2;
};

// Rows of a tile to shared memory: `there` of them, the first at `from`, `dim` elements of each, and
// zeros for what is not there.
template <class P, int kDim>
__device__ void LoadRows(uint32_t to, const std::byte* from, int64_t row_bytes, int there,
                         int dim) {
  constexpr int kParts = kDim / 8, kStep = P::kThreads / kParts, kPitch = kDim + kPadding;
  static_assert(P::kThreads % kParts == 0 && P::kKeys % kStep == 0);
  const int first = threadIdx.x / kParts, c = threadIdx.x % kParts * 8;
  const int rows = c < dim ? there : 0;
#pragma unroll
  for (int i = 0; i < P::kKeys / kStep; ++i) {
    const int r = first + i * kStep;
    CopyAsync16(to + (r * kPitch + c) * 2, r < rows ? from + r * row_bytes + c * 2 : from,
                r < rows);
  }
}

// One thread block: a tile of queries of one KV head over its part of the chunk's keys. It is kept in
// one piece because what its steps hand on to each other are accumulators in registers.
template <class P>
__global__ void __launch_bounds__(P::kThreads, P::kThreads <= 128 ? 2 : 1)
    PrefillKernel(const __grid_constant__ PrefillChunk p) {
  using T = typename P::T;
  constexpr int kTiles = P::kTiles, kKeys = P::kKeys;
  extern __shared__ __align__(16) std::byte memory[];
  T* const queries = reinterpret_cast<T*>(memory);     // [kQueries][kPitchK]
  T* const keys = queries + P::kQueries * P::kPitchK;  // [2][kKeys][kPitchK]
  T* const values = keys + 2 * kKeys * P::kPitchK;     // [2][kKeys][kPitchV]
  const RowLayout& row = p.row;
  const int tid = threadIdx.x, warp = tid / kWarp, lane = tid % kWarp;
  // Tiles with many keys, those of the last queries, come first.
  const int tile = static_cast<int>(gridDim.x - 1 - blockIdx.x), kv_head = blockIdx.y;
  const int all = static_cast<int>(p.count) * p.group_heads, begin = tile * P::kQueries;
  // Of the chunk's tokens, those that the queries of this thread block see, and its part of them.
  const int64_t last = min(begin + P::kQueries, all) - 1;
  const int seen = static_cast<int>(
      max(min(p.tokens, p.first + last / p.group_heads + 1 - p.begin), int64_t{0}));
  const int key_tiles = (seen + kKeys - 1) / kKeys;
  const int split = blockIdx.z, splits = gridDim.z;
  const int from_tile = static_cast<int>(int64_t{key_tiles} * split / splits),
            to_tile = static_cast<int>(int64_t{key_tiles} * (split + 1) / splits);
  const bool fresh = p.begin == 0, done = p.last && splits == 1;
  if (from_tile == to_tile && !fresh && !done) return;
  const int64_t states = p.count * p.q_heads;  // of one part
  const auto place = [&](int query) {
    return int64_t{query / p.group_heads} * p.q_heads + kv_head * p.group_heads +
           query % p.group_heads;
  };

  for (int i = tid; i < P::kQueries * (P::kDimK / 8); i += P::kThreads) {
    const int r = i / (P::kDimK / 8), c = i % (P::kDimK / 8) * 8, query = begin + r;
    uint4 x = make_uint4(0, 0, 0, 0);
    if (query < all && c < row.dim_k) {
      const int64_t token = query / p.group_heads,
                    head = int64_t{kv_head} * p.group_heads + query % p.group_heads;
      const T* from =
          static_cast<const T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride + c;
      if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
        x = *reinterpret_cast<const uint4*>(from);
      } else {
        T one[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) one[j] = from[j];  // strides are any number of elements
        x = *reinterpret_cast<const uint4*>(one);
      }
    }
    *reinterpret_cast<uint4*>(queries + r * P::kPitchK + c) = x;
  }

  const std::byte* const rows =
      p.rows + int64_t{kv_head} * p.rows_stride;  // [tokens][row_bytes] of this KV head
  const auto load = [&](int key_tile, int buffer) {
    const std::byte* const at = rows + int64_t{key_tile} * kKeys * row.row_bytes;
    const int there = seen - key_tile * kKeys;
    LoadRows<P, P::kDimK>(Shared(keys + buffer * kKeys * P::kPitchK), at, row.row_bytes, there,
                          row.dim_k);
    LoadRows<P, P::kDimV>(Shared(values + buffer * kKeys * P::kPitchV), at + row.v_offset,
                          row.row_bytes, there, row.dim_v);
    asm volatile("cp.async.commit_group;");
  };

  // Of the rows lane / 4 and lane / 4 + 8 of each tile: the largest logit, times log2 e, and the sum of
  // weights relative to it over this thread's columns.
  float sum[kTiles][P::kColumns][4];  // weight times value
  float most[kTiles][2], mass[kTiles][2];
  const float unit = p.scale * kLog2E;
  const int mine = begin + warp * kTiles * 16;  // the warp's first query
  // What a thread has of an accumulator: rows lane / 4 and + 8, columns lane % 4 * 2 and + 1.
  const int at_row = lane / 4, at_column = lane % 4 * 2;
  const auto query_of = [&](int m, int half) { return mine + m * 16 + half * 8 + at_row; };
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = query_of(m, half);
      const bool kept = !fresh && query < all;
      const int64_t at = kept ? split * states + place(query) : 0;
      most[m][half] = kept ? p.most[at] : -FLT_MAX;
      mass[m][half] = kept && lane % 4 == 0 ? p.mass[at] : 0;
#pragma unroll
      for (int n = 0; n < P::kColumns; ++n) {
        const int c = n * 8 + at_column;
        const float2 x = kept && c < row.dim_v
                             ? *reinterpret_cast<const float2*>(p.sum + at * row.dim_v + c)
                             : make_float2(0, 0);
        sum[m][n][2 * half] = x.x, sum[m][n][2 * half + 1] = x.y;
      }
    }
  }

  // Where this lane's matrices begin. Of queries: rows, then the other 8 columns. Of keys: 8 of them,
  // the other 8 columns, then 8 more keys. Of values: 8 keys, 8 more, then the other 8 columns.
  const uint32_t query_at =
      Shared(queries + (warp * kTiles * 16 + lane % 16) * P::kPitchK + lane / 16 * 8);
  const uint32_t key_at = Shared(keys + (lane / 16 * 8 + lane % 8) * P::kPitchK + lane / 8 % 2 * 8);
  const uint32_t value_at =
      Shared(values + (lane / 8 % 2 * 8 + lane % 8) * P::kPitchV + lane / 16 * 8);

  if (from_tile < to_tile) load(from_tile, 0);
  int buffer = 0;
#pragma unroll 1
  for (int key_tile = from_tile; key_tile < to_tile; ++key_tile, buffer ^= 1) {
    asm volatile("cp.async.wait_group 0;");
    __syncthreads();  // the tile is there, and the one before it is no longer read
    if (key_tile + 1 < to_tile) load(key_tile + 1, buffer ^ 1);
    float s[kTiles][kKeys / 8][4] = {};
    const uint32_t k = key_at + buffer * kKeys * P::kPitchK * 2;
#pragma unroll
    for (int d = 0; d < P::kDimK / 16; ++d) {
      uint32_t a[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
        LoadMatrices<false>(a[m], query_at + (m * 16 * P::kPitchK + d * 16) * 2);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];
        LoadMatrices<false>(b, k + (n * 16 * P::kPitchK + d * 16) * 2);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          MultiplyAdd<T>(s[m][2 * n], a[m], b[0], b[1]);
          MultiplyAdd<T>(s[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
    // Whether the tile has a token that not every query of the warp sees.
    const int tile_end = (key_tile + 1) * kKeys;
    if (tile_end > seen || p.begin + tile_end > p.first + mine / p.group_heads + 1) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t sees = p.first + query_of(m, half) / p.group_heads + 1 - p.begin;
          const int end = static_cast<int>(min(sees, int64_t{seen}));
#pragma unroll
          for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              if (key_tile * kKeys + n * 8 + at_column + i >= end)
                s[m][n][2 * half + i] = -INFINITY;
            }
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      float fade[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = s[m][0][2 * half];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
          top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
        top = fmaxf(most[m][half], top * unit);
        fade[half] = PowerOf2(most[m][half] - top);
        most[m][half] = top;
        float more = 0;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[m][n][i] = PowerOf2(fmaf(s[m][n][i], unit, -top));
            more += s[m][n][i];
          }
        }
        mass[m][half] = fmaf(mass[m][half], fade[half], more);
      }
      if (__any_sync(kAllLanes, fade[0] != 1 || fade[1] != 1)) {
#pragma unroll
        for (int n = 0; n < P::kColumns; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[m][n][i] *= fade[i / 2];
        }
      }
    }
    const uint32_t v = value_at + buffer * kKeys * P::kPitchV * 2;
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      uint32_t a[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        a[m][0] = Pack<T>(s[m][2 * j][0], s[m][2 * j][1]);
        a[m][1] = Pack<T>(s[m][2 * j][2], s[m][2 * j][3]);
        a[m][2] = Pack<T>(s[m][2 * j + 1][0], s[m][2 * j + 1][1]);
        a[m][3] = Pack<T>(s[m][2 * j + 1][2], s[m][2 * j + 1][3]);
      }
#pragma unroll
      for (int n = 0; n < P::kColumns / 2; ++n) {
        uint32_t b[4];
        LoadMatrices<true>(b, v + (j * 16 * P::kPitchV + n * 16) * 2);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          MultiplyAdd<T>(sum[m][2 * n], a[m], b[0], b[1]);
          MultiplyAdd<T>(sum[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float whole = mass[m][half];
      whole += __shfl_xor_sync(kAllLanes, whole, 1);
      whole += __shfl_xor_sync(kAllLanes, whole, 2);
      const int query = query_of(m, half);
      if (query >= all) continue;
      const int64_t at = done ? place(query) : split * states + place(query);
      const float scale = done ? 1 / whole : 1;
      if (lane % 4 == 0 && done && p.lse != nullptr) p.lse[at] = most[m][half] * kLn2 + logf(whole);
      if (lane % 4 == 0 && !done) p.most[at] = most[m][half], p.mass[at] = whole;
#pragma unroll
      for (int n = 0; n < P::kColumns; ++n) {
        const int c = n * 8 + at_column;
        if (c >= row.dim_v) continue;
        const float x = sum[m][n][2 * half] * scale, y = sum[m][n][2 * half + 1] * scale;
        if (done) {
          StorePair(p.out, at * row.dim_v + c, p.out_dtype, x, y);
        } else {
          *reinterpret_cast<float2*>(p.sum + at * row.dim_v + c) = make_float2(x, y);
        }
      }
    }
  }
}

constexpr int kMergeThreads = 256;

// Outputs from the sums of all parts, a warp a query.
__global__ void __launch_bounds__(kMergeThreads)
    MergeKernel(const __grid_constant__ PrefillChunk p) {
  const int64_t states = p.count * p.q_heads,
                at = int64_t{blockIdx.x} * (kMergeThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp, dim = p.row.dim_v;
  if (at >= states) return;
  float most = -FLT_MAX, mass = 0;
  for (int s = 0; s < p.splits; ++s) most = fmaxf(most, p.most[s * states + at]);
  for (int s = 0; s < p.splits; ++s)
    mass += p.mass[s * states + at] * PowerOf2(p.most[s * states + at] - most);
  if (lane == 0 && p.lse != nullptr) p.lse[at] = most * kLn2 + logf(mass);
  for (int c = 2 * lane; c < dim; c += 2 * kWarp) {
    float2 sum = make_float2(0, 0);
    for (int s = 0; s < p.splits; ++s) {
      const float weight = PowerOf2(p.most[s * states + at] - most);
      const float2 part = *reinterpret_cast<const float2*>(p.sum + (s * states + at) * dim + c);
      sum.x = fmaf(weight, part.x, sum.x), sum.y = fmaf(weight, part.y, sum.y);
    }
    StorePair(p.out, at * dim + c, p.out_dtype, sum.x / mass, sum.y / mass);
  }
}

template <class P>
int Launch(const PrefillChunk& p, cudaStream_t stream) {
  const auto kernel = PrefillKernel<P>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, P::kBytes);
  if (error != cudaSuccess) return error;
  const int64_t tiles = (p.count * p.group_heads + P::kQueries - 1) / P::kQueries;
  const dim3 grid(static_cast<unsigned>(tiles), p.kv_heads, p.splits);
  kernel<<<grid, P::kThreads, P::kBytes, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
int LaunchOf(const PrefillChunk& p, cudaStream_t stream) {
  const int dim = p.row.dim_k > p.row.dim_v ? p.row.dim_k : p.row.dim_v;
  if (dim <= 64) return Launch<Plan<T, 4, 2, 64, 64, 64>>(p, stream);
  if (dim <= 128) return Launch<Plan<T, 4, 2, 64, 128, 128>>(p, stream);
  return Launch<Plan<T, 8, 1, 32, 256, 256>>(p, stream);
}

}  // namespace

int PrefillSplits(int64_t count, int32_t group_heads, int32_t kv_heads, int multiprocessors) {
  constexpr int64_t kQueries = 128;  // of every Plan
  constexpr int64_t kMostSplits = 32;
  const int64_t blocks = (count * group_heads + kQueries - 1) / kQueries * kv_heads,
                splits = 2 * multiprocessors / blocks;
  return static_cast<int>(splits < 1 ? 1 : splits > kMostSplits ? kMostSplits : splits);
}

int Prefill(const PrefillChunk& p, Stream stream) {
  const cudaStream_t on_stream = static_cast<cudaStream_t>(stream.handle);
  const int error = p.row.dtype == DType::kF16 ? LaunchOf<__half>(p, on_stream)
                                               : LaunchOf<__nv_bfloat16>(p, on_stream);
  if (error != cudaSuccess || !p.last || p.splits == 1) return error;
  constexpr int64_t kAtOnce = kMergeThreads / kWarp;
  const int64_t blocks = (p.count * p.q_heads + kAtOnce - 1) / kAtOnce;
  MergeKernel<<<static_cast<unsigned>(blocks), kMergeThreads, 0, on_stream>>>(p);
  return cudaGetLastError();
}

}  // namespace vattn::cuda
