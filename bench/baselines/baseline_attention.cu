// A warp takes tiles of 16 tokens. Logits are Q x K^T and outputs V^T x P^T by tensor cores, in
// mma.m16n8k16 with operands straight from 16-byte loads: the order of elements inside the summed
// dimension is free, so a lane's 8 neighbouring elements serve as its share of two steps. The
// accumulator of the logits is, packed to bf16, the operand P^T: no shuffles between the two
// products. With g = lane / 4 and c = lane % 4:
//   K: lane holds elements 8 (4 j + c) ... + 7 of tokens g and g + 8
//   V: lane holds elements 8 (8 h + g) ... + 7 of tokens 2 c, 2 c + 1, 2 c + 8, 2 c + 9
//   logits: head g, tokens 2 c, 2 c + 1 (and + 8); outputs: heads 2 c, 2 c + 1
// K of the next tile is loaded as soon as this tile's is used up, and so is V.
#include <cmath>

#include "bench/baselines/baseline_attention.h"

namespace vattn::bench {
namespace {

constexpr int kWarpLanes = 32;
constexpr int kWarps = kAttendWarps;
constexpr int kTile = kAttendTile;
constexpr int kHeads = kMaxBaselineGroup;
constexpr int kMergeWarps = 8;
constexpr float kRoom = 8;  // powers of two that a logit may exceed the reference by

__device__ uint4 Load(const std::byte* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

__device__ void Multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                         uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ uint32_t PackBf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ uint32_t Word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Offsets of a tile's rows from the item's first row, one a lane (lanes 16 to 31 repeat 0 to 15).
// Rows past the end repeat the last.
template <int kDim, bool kIndirect>
__device__ int64_t RowOffset(const AttendItem& item, int tile) {
  const int token = min(tile * kTile + static_cast<int>(threadIdx.x % kTile), item.tokens - 1);
  return static_cast<int64_t>(kIndirect ? item.slot[token] : token) * (4 * kDim);
}

template <int kDim>
struct Tile {
  uint4 k[2][kDim / 32];
  uint4 v[4][kDim / 64];

  __device__ void LoadK(const std::byte* rows, int64_t offset, int g, int c) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::byte* row = rows + __shfl_sync(~0u, offset, 8 * half + g) + c * 16;
#pragma unroll
      for (int j = 0; j < kDim / 32; ++j) k[half][j] = Load(row + j * 64);
    }
  }
  __device__ void LoadV(const std::byte* rows, int64_t offset, int g, int c) {
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int token = 2 * c + t % 2 + t / 2 * 8;
      const std::byte* row = rows + __shfl_sync(~0u, offset, token) + 2 * kDim + g * 16;
#pragma unroll
      for (int h = 0; h < kDim / 64; ++h) v[t][h] = Load(row + h * 128);
    }
  }
};

// Softmax state of one warp, logits in base 2. sum: [h][i] of heads 2c (even) and 2c + 1 (odd
// places), dimension 8 (8 h + g) + 2 i (first two places) and one more.
template <int kDim>
struct State {
  float sum[kDim / 64][4][4] = {};
  float largest = -INFINITY;  // reference of head g: at most kRoom below the largest seen
  float mass = 0;             // of head g, this lane's tokens only
};

template <int kDim>
__device__ void Weigh(const Tile<kDim>& tile, const uint4 (&q)[kDim / 32], float scale, int valid,
                      int c, State<kDim>* state, float (&p)[2][4]) {
  float top = -INFINITY;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    p[half][0] = p[half][1] = p[half][2] = p[half][3] = 0;
#pragma unroll
    for (int j = 0; j < kDim / 32; ++j) {
      Multiply(p[half], q[j].x, 0, q[j].y, 0, tile.k[half][j].x, tile.k[half][j].y);
      Multiply(p[half], q[j].z, 0, q[j].w, 0, tile.k[half][j].z, tile.k[half][j].w);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      p[half][i] = 8 * half + 2 * c + i < valid ? p[half][i] * scale : -INFINITY;
      top = fmaxf(top, p[half][i]);
    }
  }
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
  if (__any_sync(~0u, top > state->largest + kRoom)) {
    const float largest = fmaxf(state->largest, top), factor = exp2f(state->largest - largest);
    state->largest = largest;
    state->mass *= factor;
    const float even = __shfl_sync(~0u, factor, 8 * c), odd = __shfl_sync(~0u, factor, 8 * c + 4);
#pragma unroll
    for (int h = 0; h < kDim / 64; ++h) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        state->sum[h][i][0] *= even;
        state->sum[h][i][1] *= odd;
        state->sum[h][i][2] *= even;
        state->sum[h][i][3] *= odd;
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      p[half][i] = exp2f(p[half][i] - state->largest);
      state->mass += p[half][i];
    }
  }
}

template <int kDim>
__device__ void AddValues(const Tile<kDim>& tile, const float (&p)[2][4], State<kDim>* state) {
  const uint32_t b0 = PackBf16(p[0][0], p[0][1]), b1 = PackBf16(p[1][0], p[1][1]);
#pragma unroll
  for (int h = 0; h < kDim / 64; ++h) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t t0 = Word(tile.v[0][h], i), t1 = Word(tile.v[1][h], i);
      const uint32_t t2 = Word(tile.v[2][h], i), t3 = Word(tile.v[3][h], i);
      Multiply(state->sum[h][i], __byte_perm(t0, t1, 0x5410), __byte_perm(t0, t1, 0x7632),
               __byte_perm(t2, t3, 0x5410), __byte_perm(t2, t3, 0x7632), b0, b1);
    }
  }
}

// The states of the block's warps as one, to out[group][kDim + 2].
template <int kDim>
__device__ void WriteState(State<kDim> state, int group, float* out) {
  __shared__ float sums[kWarps][kHeads][kDim], largest[kWarps][kHeads], mass[kWarps][kHeads];
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  const int g = lane / 4, c = lane % 4;
  state.mass += __shfl_xor_sync(~0u, state.mass, 1);
  state.mass += __shfl_xor_sync(~0u, state.mass, 2);
  if (c == 0) {
    largest[warp][g] = state.largest;
    mass[warp][g] = state.mass;
  }
#pragma unroll
  for (int h = 0; h < kDim / 64; ++h) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int dim = 8 * (8 * h + g) + 2 * i;
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[warp][2 * c + j % 2][dim + j / 2] = state.sum[h][i][j];
    }
  }
  __syncthreads();
  for (int head = 0; head < group; ++head) {
    float top = largest[0][head];  // the first warp has a tile
    for (int w = 1; w < kWarps; ++w) top = fmaxf(top, largest[w][head]);
    float factor[kWarps], total = 0;
    for (int w = 0; w < kWarps; ++w) {
      factor[w] = exp2f(largest[w][head] - top);
      total += factor[w] * mass[w][head];
    }
    float* to = out + head * (kDim + 2);
    for (int i = threadIdx.x; i < kDim; i += blockDim.x) {
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += factor[w] * sums[w][head][i];
      to[i] = sum;
    }
    if (threadIdx.x == 0) {
      to[kDim] = top;
      to[kDim + 1] = total;
    }
  }
}

template <int kDim, bool kIndirect>
__global__ void __launch_bounds__(kWarps* kWarpLanes, kAttendBlocks)
    AttendKernel(const AttendParams params, float scale) {
  const AttendItem item = params.items[blockIdx.x];
  const int lane = threadIdx.x % kWarpLanes, g = lane / 4, c = lane % 4;
  const int tiles = (item.tokens + kTile - 1) / kTile;
  int index = threadIdx.x / kWarpLanes;
  uint4 q[kDim / 32] = {};
  if (g < params.group) {
    const auto* head = reinterpret_cast<const std::byte*>(
        params.q + (static_cast<int64_t>(item.unit) * params.group + g) * kDim);
#pragma unroll
    for (int j = 0; j < kDim / 32; ++j) q[j] = Load(head + (4 * j + c) * 16);
  }
  State<kDim> state;
  if (index < tiles) {
    Tile<kDim> tile;
    int64_t offset = RowOffset<kDim, kIndirect>(item, index);
    tile.LoadK(item.rows, offset, g, c);
    tile.LoadV(item.rows, offset, g, c);
    offset = RowOffset<kDim, kIndirect>(item, min(index + kWarps, tiles - 1));
    for (; index < tiles; index += kWarps) {
      float p[2][4];
      Weigh<kDim>(tile, q, scale, item.tokens - index * kTile, c, &state, p);
      if (index + kWarps < tiles) tile.LoadK(item.rows, offset, g, c);
      AddValues<kDim>(tile, p, &state);
      if (index + kWarps < tiles) tile.LoadV(item.rows, offset, g, c);
      offset = RowOffset<kDim, kIndirect>(item, min(index + 2 * kWarps, tiles - 1));
    }
  }
  WriteState<kDim>(state, params.group,
                   params.state + static_cast<int64_t>(blockIdx.x) * params.group * (kDim + 2));
}

// One block a unit and query head; a warp takes every kMergeWarps-th item.
template <int kDim>
__global__ void __launch_bounds__(kMergeWarps* kWarpLanes) MergeKernel(const MergeParams params) {
  constexpr int kPerLane = kDim / kWarpLanes;
  __shared__ float sums[kMergeWarps][kDim], largest[kMergeWarps], mass[kMergeWarps];
  const int unit = blockIdx.x / params.group, head = blockIdx.x % params.group;
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  const int end = params.first[unit + 1];
  float sum[kPerLane] = {}, top = -INFINITY, total = 0;
#pragma unroll 4
  for (int item = params.first[unit] + warp; item < end; item += kMergeWarps) {
    const float* from =
        params.state + (static_cast<int64_t>(item) * params.group + head) * (kDim + 2);
    const float item_top = from[kDim], next = fmaxf(top, item_top);
    const float old = exp2f(top - next), factor = exp2f(item_top - next);
    for (int i = 0; i < kPerLane; ++i) sum[i] = sum[i] * old + factor * from[i * kWarpLanes + lane];
    total = total * old + factor * from[kDim + 1];
    top = next;
  }
  for (int i = 0; i < kPerLane; ++i) sums[warp][i * kWarpLanes + lane] = sum[i];
  if (lane == 0) {
    largest[warp] = top;
    mass[warp] = total;
  }
  __syncthreads();
  if (threadIdx.x >= kDim) return;
  top = largest[0];
  for (int w = 1; w < kMergeWarps; ++w) top = fmaxf(top, largest[w]);
  float out = 0;
  total = 0;
  for (int w = 0; w < kMergeWarps; ++w) {
    const float factor = exp2f(largest[w] - top);
    out += factor * sums[w][threadIdx.x];
    total += factor * mass[w];
  }
  params.out[static_cast<int64_t>(blockIdx.x) * kDim + threadIdx.x] = out / total;
}

template <int kDim>
int LaunchAttend(const AttendParams& params, cudaStream_t stream) {
  const float scale = 1.44269504f / std::sqrt(static_cast<float>(kDim));
  const auto kernel = params.indirect ? AttendKernel<kDim, true> : AttendKernel<kDim, false>;
  kernel<<<params.num_items, kWarps * kWarpLanes, 0, stream>>>(params, scale);
  return cudaGetLastError();
}

}  // namespace

int AttendItems(const AttendParams& params, cudaStream_t stream) {
  if (params.group < 1 || params.group > kMaxBaselineGroup) return cudaErrorInvalidValue;
  if (params.num_items == 0) return cudaSuccess;
  if (params.head_dim == 64) return LaunchAttend<64>(params, stream);
  if (params.head_dim == 128) return LaunchAttend<128>(params, stream);
  return cudaErrorInvalidValue;
}

int MergeItems(const MergeParams& params, cudaStream_t stream) {
  if (params.head_dim != 64 && params.head_dim != 128) return cudaErrorInvalidValue;
  const auto kernel = params.head_dim == 64 ? MergeKernel<64> : MergeKernel<128>;
  kernel<<<params.units * params.group, kMergeWarps * kWarpLanes, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace vattn::bench
