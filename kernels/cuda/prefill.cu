// Exact attention of many query tokens at once, as kernels/cpu/prefill.cc: rows come from the host
// pool chunk by chunk, and a tile of queries keeps its sums from one chunk to the next. Products are
// those of the tensor cores in the type of the rows, sums are fp32 (FlashAttention-2, arXiv
// 2307.08691).
#include <cmath>
#include <type_traits>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/vocabulary.cuh"

namespace vattn::cuda {
namespace {

constexpr int kPrefillThreads = 128;
constexpr int kPrefillWarps = kPrefillThreads / kWarp;
constexpr int kKeys = 64;    // of a tile in shared memory
constexpr int kPadding = 8;  // elements behind each row there, so that rows lie in other banks
constexpr int kCopyThreads = 256;

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

// Four matrices [8][8] from shared memory, to the operand of a product; with kTurned transposed.
template <bool kTurned>
__device__ void LoadMatrices(uint32_t (&out)[4], const void* row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
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

__device__ void CopyAsync16(void* to, const void* from, bool there) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from),
               "r"(there ? 16 : 0));
}

// A warp has kTiles tiles of 16 queries; a query is a query head of a token, and those of a token
// follow each other. Up to kDimK and kDimV elements a row.
template <class T, int kTiles, int kDimK, int kDimV>
struct Warp {
  static constexpr int kPitchK = kDimK + kPadding, kPitchV = kDimV + kPadding;
  static constexpr int kColumns = kDimV / 8;
  float sum[kTiles][kColumns][4];          // weight times value
  float most[kTiles][2], mass[kTiles][2];  // of the rows lane / 4 and lane / 4 + 8
};

// One thread block: a tile of queries of one KV head over the chunk's keys. It is kept in one piece
// because what its steps hand on to each other are accumulators in registers.
template <class T, int kTiles, int kDimK, int kDimV>
__global__ void __launch_bounds__(kPrefillThreads)
    PrefillKernel(const __grid_constant__ PrefillChunk p) {
  using W = Warp<T, kTiles, kDimK, kDimV>;
  constexpr int kQueries = kPrefillWarps * kTiles * 16;
  extern __shared__ __align__(16) std::byte memory[];
  T* const queries = reinterpret_cast<T*>(memory);  // [kQueries][kPitchK]
  T* const keys = queries + kQueries * W::kPitchK;  // [2][kKeys][kPitchK]
  T* const values = keys + 2 * kKeys * W::kPitchK;  // [2][kKeys][kPitchV]
  const RowLayout& row = p.row;
  const int tid = threadIdx.x, warp = tid / kWarp, lane = tid % kWarp, kv_head = blockIdx.y;
  const int64_t all = p.count * p.group_heads, begin = int64_t{blockIdx.x} * kQueries;
  // Tokens of the sequence that the queries of this thread block see: those before `end`.
  const int64_t last = min(begin + kQueries, all) - 1;
  const int64_t end = min(p.begin + p.tokens, p.first + last / p.group_heads + 1);
  const auto place = [&](int64_t query) {
    return query / p.group_heads * p.q_heads + int64_t{kv_head} * p.group_heads +
           query % p.group_heads;
  };

  for (int i = tid; i < kQueries * (kDimK / 8); i += kPrefillThreads) {
    const int r = i / (kDimK / 8), c = i % (kDimK / 8) * 8;
    const int64_t query = begin + r;
    uint4 x = make_uint4(0, 0, 0, 0);
    if (query < all && c < row.dim_k) {
      const int64_t token = query / p.group_heads,
                    head = int64_t{kv_head} * p.group_heads + query % p.group_heads;
      const T* from =
          static_cast<const T*>(p.q) + token * p.q_token_stride + head * p.q_head_stride + c;
      T one[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) one[j] = from[j];  // strides are any number of elements
      x = *reinterpret_cast<const uint4*>(one);
    }
    *reinterpret_cast<uint4*>(queries + r * W::kPitchK + c) = x;
  }

  const std::byte* const rows =
      p.rows + int64_t{kv_head} * p.rows_stride;  // [tokens][row_bytes] of this KV head
  const auto load = [&](int64_t token, int buffer) {
    T* const k = keys + buffer * kKeys * W::kPitchK;
    T* const v = values + buffer * kKeys * W::kPitchV;
    for (int i = tid; i < kKeys * (kDimK / 8); i += kPrefillThreads) {
      const int r = i / (kDimK / 8), c = i % (kDimK / 8) * 8;
      const bool there = token + r < end && c < row.dim_k;
      const std::byte* from = rows + (there ? (token + r - p.begin) * row.row_bytes + c * 2 : 0);
      CopyAsync16(k + r * W::kPitchK + c, from, there);
    }
    for (int i = tid; i < kKeys * (kDimV / 8); i += kPrefillThreads) {
      const int r = i / (kDimV / 8), c = i % (kDimV / 8) * 8;
      const bool there = token + r < end && c < row.dim_v;
      const std::byte* from =
          rows + (there ? (token + r - p.begin) * row.row_bytes + row.v_offset + c * 2 : 0);
      CopyAsync16(v + r * W::kPitchV + c, from, there);
    }
    asm volatile("cp.async.commit_group;");
  };

  W w;
  const int64_t mine = begin + warp * kTiles * 16;  // the warp's first query
  // What a thread has of an accumulator: rows lane / 4 and + 8, columns lane % 4 * 2 and + 1.
  const int at_row = lane / 4, at_column = lane % 4 * 2;
  const auto query_of = [&](int tile, int half) { return mine + tile * 16 + half * 8 + at_row; };
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t query = query_of(m, half);
      const bool kept = p.begin > 0 && query < all;
      w.most[m][half] = kept ? p.most[place(query)] : -FLT_MAX;
      w.mass[m][half] = kept ? p.mass[place(query)] : 0;
#pragma unroll
      for (int n = 0; n < W::kColumns; ++n) {
        const int c = n * 8 + at_column;
        const bool there = kept && c < row.dim_v;
        const float* from = p.sum + (there ? place(query) * row.dim_v + c : 0);
        w.sum[m][n][2 * half] = there ? from[0] : 0;
        w.sum[m][n][2 * half + 1] = there ? from[1] : 0;
      }
    }
  }

  if (p.begin < end) load(p.begin, 0);
  int buffer = 0;
  for (int64_t token = p.begin; token < end; token += kKeys, buffer ^= 1) {
    if (token + kKeys < end) {
      load(token + kKeys, buffer ^ 1);
      asm volatile("cp.async.wait_group 1;");
    } else {
      asm volatile("cp.async.wait_group 0;");
    }
    __syncthreads();
    const T* const k = keys + buffer * kKeys * W::kPitchK;
    const T* const v = values + buffer * kKeys * W::kPitchV;
    // Whether the tile has a token that not every query of the warp sees.
    const bool hides = token + kKeys > p.first + mine / p.group_heads + 1 || token + kKeys > end;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      float s[kKeys / 8][4] = {};
#pragma unroll
      for (int d = 0; d < kDimK / 16; ++d) {
        uint32_t a[4];
        LoadMatrices<false>(a, queries + ((warp * kTiles + m) * 16 + lane % 16) * W::kPitchK +
                                   d * 16 + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < kKeys / 16; ++n) {
          uint32_t b[4];  // keys n * 16 .. + 7, then + 8 .. + 15; of each two halves of 16 elements
          LoadMatrices<false>(
              b, k + (n * 16 + lane / 16 * 8 + lane % 8) * W::kPitchK + d * 16 + lane / 8 % 2 * 8);
          MultiplyAdd<T>(s[2 * n], a, b[0], b[1]);
          MultiplyAdd<T>(s[2 * n + 1], a, b[2], b[3]);
        }
      }
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[n][i] *= p.scale;
          if (!hides) continue;
          const int64_t at = token + n * 8 + at_column + i % 2;
          if (at > p.first + query_of(m, i / 2) / p.group_heads || at >= end) s[n][i] = -INFINITY;
        }
      }
      float fade[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = w.most[m][half];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
          most = fmaxf(most, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
        most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
        fade[half] = expf(w.most[m][half] - most);
        w.most[m][half] = most;
        float mass = 0;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[n][i] = __expf(s[n][i] - most);
            mass += s[n][i];
          }
        }
        mass += __shfl_xor_sync(kAllLanes, mass, 1);
        mass += __shfl_xor_sync(kAllLanes, mass, 2);
        w.mass[m][half] = w.mass[m][half] * fade[half] + mass;
      }
#pragma unroll
      for (int n = 0; n < W::kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) w.sum[m][n][i] *= fade[i / 2];
      }
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
        const uint32_t a[4] = {Pack<T>(s[2 * j][0], s[2 * j][1]), Pack<T>(s[2 * j][2], s[2 * j][3]),
                               Pack<T>(s[2 * j + 1][0], s[2 * j + 1][1]),
                               Pack<T>(s[2 * j + 1][2], s[2 * j + 1][3])};
#pragma unroll
        for (int n = 0; n < W::kColumns / 2; ++n) {
          uint32_t b[4];  // columns n * 16 .. + 7, then + 8 .. + 15; of each two halves of 16 keys
          LoadMatrices<true>(
              b, v + (j * 16 + lane / 8 % 2 * 8 + lane % 8) * W::kPitchV + n * 16 + lane / 16 * 8);
          MultiplyAdd<T>(w.sum[m][2 * n], a, b[0], b[1]);
          MultiplyAdd<T>(w.sum[m][2 * n + 1], a, b[2], b[3]);
        }
      }
    }
    __syncthreads();  // before the buffer is filled again
  }

#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t query = query_of(m, half);
      if (query >= all) continue;
      const int64_t at = place(query);
      const float mass = w.mass[m][half], scale = p.last ? 1 / mass : 1;
      if (lane % 4 == 0 && p.last && p.lse != nullptr) p.lse[at] = w.most[m][half] + logf(mass);
      if (lane % 4 == 0 && !p.last) p.most[at] = w.most[m][half], p.mass[at] = mass;
#pragma unroll
      for (int n = 0; n < W::kColumns; ++n) {
        const int c = n * 8 + at_column;
        if (c >= row.dim_v) continue;
        for (int i = 0; i < 2; ++i) {
          const float x = w.sum[m][n][2 * half + i] * scale;
          if (p.last) {
            StoreOutput(p.out, at * row.dim_v + c + i, p.out_dtype, x);
          } else {
            p.sum[at * row.dim_v + c + i] = x;
          }
        }
      }
    }
  }
}

// Rows of tokens [begin, begin + tokens) of every KV head from the host pool, [kv_heads][tokens].
__global__ void FetchKernel(Storage host, const int32_t* blocks, int64_t blocks_stride,
                            int64_t begin, int64_t tokens, std::byte* to, int64_t to_stride) {
  const int64_t words = tokens * (host.row.row_bytes / 16);
  const int32_t* const ids = blocks + blockIdx.y * blocks_stride;
  for (int64_t i = int64_t{blockIdx.x} * kCopyThreads + threadIdx.x; i < words;
       i += int64_t{gridDim.x} * kCopyThreads) {
    const int64_t token = i / (host.row.row_bytes / 16);
    const int part = static_cast<int>(i % (host.row.row_bytes / 16));
    *reinterpret_cast<uint4*>(to + blockIdx.y * to_stride + token * host.row.row_bytes +
                              part * 16) =
        *reinterpret_cast<const uint4*>(HostRow(host, ids, begin + token) + part * 16);
  }
}

template <class T, int kTiles, int kDimK, int kDimV>
int Launch(const PrefillChunk& p, cudaStream_t stream) {
  using W = Warp<T, kTiles, kDimK, kDimV>;
  constexpr int kQueries = kPrefillWarps * kTiles * 16;
  constexpr int kBytes = (kQueries * W::kPitchK + 2 * kKeys * (W::kPitchK + W::kPitchV)) * 2;
  const auto kernel = PrefillKernel<T, kTiles, kDimK, kDimV>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int64_t tiles = (p.count * p.group_heads + kQueries - 1) / kQueries;
  kernel<<<dim3(static_cast<unsigned>(tiles), p.kv_heads), kPrefillThreads, kBytes, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
int LaunchOf(const PrefillChunk& p, cudaStream_t stream) {
  const int dim = p.row.dim_k > p.row.dim_v ? p.row.dim_k : p.row.dim_v;
  if (dim <= 64) return Launch<T, 2, 64, 64>(p, stream);
  if (dim <= 128) return Launch<T, 2, 128, 128>(p, stream);
  return Launch<T, 1, 256, 256>(p, stream);
}

}  // namespace

int FetchRows(const Storage& host, const int32_t* blocks, int64_t blocks_stride, int32_t kv_heads,
              int64_t begin, int64_t tokens, std::byte* to, int64_t to_stride, Stream stream) {
  FetchKernel<<<dim3(64, kv_heads), kCopyThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(
      host, blocks, blocks_stride, begin, tokens, to, to_stride);
  return cudaGetLastError();
}

int Prefill(const PrefillChunk& p, Stream stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream.handle);
  return p.row.dtype == DType::kF16 ? LaunchOf<__half>(p, s) : LaunchOf<__nv_bfloat16>(p, s);
}

}  // namespace vattn::cuda
