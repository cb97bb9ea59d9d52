// Tiles of rows in shared memory: brought there from the device or straight from the host pool, and
// what attention and its certificate compute from them. One thread block of kThreads works
// together.
#ifndef VATTN_KERNELS_CUDA_ROWS_CUH_
#define VATTN_KERNELS_CUDA_ROWS_CUH_

#include <cuda_pipeline.h>

#include "kernels/cuda/vocabulary.cuh"

namespace vattn::cuda {

constexpr int kThreads = 512;
constexpr int kMostTileRows = 64;
constexpr int kMostTileBytes =
    44 * 1024;                   // two to four tiles fit shared memory (METHOD.md, "Speed")
constexpr int kRowPadding = 32;  // bytes, spreads rows over the banks

constexpr int kLeastTiles = 2, kMostTiles = 4;  // tiles in flight
constexpr int kTailSums = 8;                    // doubles that a thread sums for the certificate

// Tile size of a row layout. Rows of a tile lie `pitch` bytes apart. From where an address has
// kSplitRow, parts of 16 bytes from key_parts on are brought from `gap` bytes further on, and those
// from used_parts on not at all.
struct TileShape {
  int rows, row_bytes, pitch;
  int key_parts = 0, used_parts = 0;
  int64_t gap = 0;
};
VATTN_HD inline TileShape MakeTileShape(int row_bytes, int most = kMostTileRows) {
  const int pitch = row_bytes + kRowPadding;
  int rows = most;
  while (rows > 8 && rows * pitch > kMostTileBytes) rows /= 2;
  return {.rows = rows, .row_bytes = row_bytes, .pitch = pitch};
}
// For a list of `count` rows that `size` thread blocks share: small tiles rather than idle blocks.
VATTN_HD inline TileShape MakeTileShape(int row_bytes, int64_t count, int size) {
  return MakeTileShape(
      row_bytes, count > int64_t{kMostTileRows} / 2 * size ? kMostTileRows : kMostTileRows / 2);
}
// The same for whole rows, wherever they are.
VATTN_HD inline TileShape OfRows(const DeviceStorage& s, TileShape shape) {
  const RowLayout& row = s.host.row;
  const int element = row.dtype == DType::kF32 ? 4 : 2;
  shape.key_parts = row.dim_k * element / 16;
  shape.used_parts = shape.key_parts + (row.shared_kv ? 0 : row.dim_v * element / 16);
  shape.gap = s.pool_v_offset - row.v_offset;
  return shape;
}
VATTN_HD inline int TileBytes(const TileShape& t) { return t.rows * t.pitch; }

// Shared memory of a walk over tiles; tiles and vectors follow in dynamic shared memory.
template <int kHeads>
struct RowsShared {
  uint64_t address[kMostTiles][kMostTileRows];
  float p[kMostTileRows * kHeads];  // [rows][kHeads] logits, then weights
  float norm2[kMostTileRows];
  float log_weight[kMostTileRows];
  float factor[kMostTileRows];
  float most[kHeads], scale[kHeads], mass[kHeads], mass2[kHeads];
};

// Brings `tiles` tiles through shared memory, `depth` at a time, and calls compute(k, tile) on each
// by all threads. address(k, r): where row r of tile k is, 0: no such row. Ends with all threads in
// step.
template <class Address, class Compute>
__device__ void WalkTiles(const TileShape& shape, int depth, int tiles,
                          uint64_t (*at)[kMostTileRows], std::byte* memory, Address&& address,
                          Compute&& compute) {
  const int tid = threadIdx.x, per_row = shape.row_bytes / 16;
  // A warp lists and fetches its own rows of every tile, so that only the tiles need a barrier.
  const int warp = tid / kWarp, lane = tid % kWarp,
            rows_each = (shape.rows + kThreads / kWarp - 1) / (kThreads / kWarp);
  const auto fetch = [&](int k) {
    const int stage = k % depth, first = warp * rows_each;
    std::byte* tile = memory + stage * TileBytes(shape);
    const int mine = min(rows_each, shape.rows - first);
    if (k < tiles && mine > 0) {
      if (lane < mine) at[stage][first + lane] = address(k, first + lane);
      __syncwarp();
      int row = first + lane / per_row, part = lane % per_row;
#pragma unroll 2
      for (; row < first + mine; part += kWarp) {
        while (part >= per_row) part -= per_row, ++row;
        if (row >= first + mine) break;
        uint64_t from = at[stage][row];
        if ((from & kSplitRow) != 0) {
          from = part >= shape.used_parts  ? 0
                 : part >= shape.key_parts ? from - kSplitRow + shape.gap
                                           : from - kSplitRow;
        }
        if (from != 0) {
          __pipeline_memcpy_async(tile + row * shape.pitch + part * 16,
                                  reinterpret_cast<const std::byte*>(from) + part * 16, 16);
        }
      }
      __syncwarp();
    }
    __pipeline_commit();
  };
  __syncthreads();
#pragma unroll 1
  for (int k = 1 - depth; k < tiles; ++k) {
    fetch(k + depth - 1);
    if (k < 0) continue;
    if (depth == kMostTiles) {
      __pipeline_wait_prior(kMostTiles - 1);
    } else if (depth == 3) {
      __pipeline_wait_prior(2);
    } else {
      __pipeline_wait_prior(1);
    }
    __syncthreads();
    compute(k, memory + (k % depth) * TileBytes(shape));
    __syncthreads();
  }
  __pipeline_wait_prior(0);
}

// out[row * kHeads + h] = vectors[h] . part of row, for count rows; vectors [kHeads][dim] in shared
// memory, the part starts `offset` bytes into the row. Rows are shared by several lanes.
template <DType kType, int kHeads>
__device__ void DotTile(const TileShape& shape, const std::byte* tile, int count, int offset,
                        int dim, const float* vectors, float* out) {
  using E = Element<kType>;
  const int pairs = shape.rows * kHeads;
  int lanes = 1;
  while (lanes < 8 && pairs * lanes * 2 <= kThreads) lanes *= 2;
  const int sub = threadIdx.x % lanes;
#pragma unroll 1
  for (int pair = threadIdx.x / lanes; pair < pairs; pair += kThreads / lanes) {
    const int head = pair / shape.rows, row = pair - head * shape.rows;
    float sum = 0;
    if (row < count) {
      const uint4* from = reinterpret_cast<const uint4*>(tile + row * shape.pitch + offset);
      const float4* vector = reinterpret_cast<const float4*>(vectors + head * dim);
#pragma unroll 2
      for (int c = sub; c < dim / E::kPer16; c += lanes) {
        float x[E::kPer16];
        E::Unpack(from[c], x);
#pragma unroll
        for (int i = 0; i < E::kPer16 / 4; ++i) {
          const float4 q = vector[c * (E::kPer16 / 4) + i];
          sum = fmaf(x[4 * i], q.x, sum);
          sum = fmaf(x[4 * i + 1], q.y, sum);
          sum = fmaf(x[4 * i + 2], q.z, sum);
          sum = fmaf(x[4 * i + 3], q.w, sum);
        }
      }
    }
#pragma unroll 1
    for (int o = lanes / 2; o > 0; o /= 2) sum += __shfl_xor_sync(kAllLanes, sum, o);
    if (sub == 0) out[row * kHeads + head] = sum;
  }
}

// out[row] = |part of row|^2 for count rows.
template <DType kType>
__device__ void NormTile(const TileShape& shape, const std::byte* tile, int count, int offset,
                         int dim, float* out) {
  using E = Element<kType>;
  constexpr int kLanes = kThreads / kMostTileRows;
  const int sub = threadIdx.x % kLanes, row = threadIdx.x / kLanes;
  float sum = 0;
  if (row < count) {
    const uint4* from = reinterpret_cast<const uint4*>(tile + row * shape.pitch + offset);
#pragma unroll 2
    for (int c = sub; c < dim / E::kPer16; c += kLanes) {
      float x[E::kPer16];
      E::Unpack(from[c], x);
#pragma unroll
      for (int i = 0; i < E::kPer16; ++i) sum = fmaf(x[i], x[i], sum);
    }
  }
#pragma unroll
  for (int o = kLanes / 2; o > 0; o /= 2) sum += __shfl_xor_sync(kAllLanes, sum, o);
  if (sub == 0 && row < shape.rows) out[row] = sum;
}

// The weighted sum of V over tiles: each thread holds two dimensions of every head for a part of
// the rows.
template <DType kType, int kHeads>
struct ValueSum {
  float sum[kHeads][2];
  int pairs, groups, pair, group;  // dimension pairs; parts of the rows; this thread's own

  __device__ explicit ValueSum(int dim) {
    pairs = dim / 2;
    groups = kThreads / pairs;
    group = threadIdx.x / pairs;
    pair = threadIdx.x - group * pairs;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) sum[h][0] = sum[h][1] = 0;
  }

  // sum = sum * scale + p . V over count rows; p [rows][kHeads], scale [kHeads].
  __device__ void Add(const TileShape& shape, const std::byte* tile, int count, int offset,
                      const float* p, const float* scale) {
    if (group >= groups) return;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) sum[h][0] *= scale[h], sum[h][1] *= scale[h];
    const std::byte* at = tile + offset + pair * 2 * Element<kType>::kBytes;
#pragma unroll 2
    for (int r = group; r < count; r += groups) {
      const float2 v = Element<kType>::Pair(at + r * shape.pitch);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        sum[h][0] = fmaf(p[r * kHeads + h], v.x, sum[h][0]);
        sum[h][1] = fmaf(p[r * kHeads + h], v.y, sum[h][1]);
      }
    }
  }

  // Sums over the parts, by way of memory [groups][kHeads][dim] in shared memory, to out(h, j,
  // value) for the first `heads` heads. All threads must call it.
  template <class Out>
  __device__ void Finish(float* memory, int heads, Out&& out) {
    const int dim = 2 * pairs;
    __syncthreads();
    if (group < groups) {
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        memory[(group * kHeads + h) * dim + 2 * pair] = sum[h][0];
        memory[(group * kHeads + h) * dim + 2 * pair + 1] = sum[h][1];
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < heads * dim; i += kThreads) {
      float total = 0;
#pragma unroll 4
      for (int g = 0; g < groups; ++g) total += memory[g * kHeads * dim + i];
      out(i / dim, i % dim, total);
    }
    __syncthreads();
  }
};

// What AttendTiles does unless the caller says otherwise: a row counts once, and nothing is kept.
struct WeighOnce {
  __device__ float2 operator()(int, int) const { return make_float2(0, 1); }
};
struct IgnoreLogit {
  __device__ void operator()(int, int, int, float) const {}
};
struct IgnoreTile {
  __device__ void operator()(int, const std::byte*) const {}
};

// Softmax states of up to kHeads heads over tiles of rows, to `state` [heads][dim_v + 3]. shared.most
// must hold what the logits are relative to at first (-inf: the largest of the rows). queries
// [kHeads][dim_k] lie in shared memory.
//   address(k, r)         as in WalkTiles
//   count(k)              rows of tile k
//   weigh(k, r)           {what is added to the logit, the factor of the weight}
//   note(k, r, h, logit)  sees each logit, when |v|^2 of the row is in shared.norm2. It may set the
//                         logit to -inf, which leaves the row out for this head; shared.most must
//                         be finite then.
//   keep(k, tile)         sees each tile once
template <DType kType, int kHeads, class Address, class Count, class Weigh = WeighOnce,
          class Note = IgnoreLogit, class Keep = IgnoreTile>
__device__ void AttendTiles(const RowLayout& row, const TileShape& shape, int depth, int tiles,
                            int heads, const float* queries, std::byte* memory,
                            RowsShared<kHeads>& shared, float* state, Address&& address,
                            Count&& count, Weigh&& weigh = {}, Note&& note = {}, Keep&& keep = {}) {
  const int tid = threadIdx.x, warp = tid / kWarp, lane = tid % kWarp;
  ValueSum<kType, kHeads> values(row.dim_v);
  if (tid < kHeads) shared.mass[tid] = shared.mass2[tid] = 0;
  WalkTiles(shape, depth, tiles, shared.address, memory, address,
            [&](int k, const std::byte* tile) {
              const int n = count(k);
              if (tid < n) {
                const float2 w = weigh(k, tid);
                shared.log_weight[tid] = w.x;
                shared.factor[tid] = w.y;
              }
              DotTile<kType, kHeads>(shape, tile, n, 0, row.dim_k, queries, shared.p);
              NormTile<kType>(shape, tile, n, row.v_offset, row.dim_v, shared.norm2);
              keep(k, tile);
              __syncthreads();
              if (warp < kHeads) {
                const int h = warp;
                float most = shared.most[h];
#pragma unroll 1
                for (int r = lane; r < n; r += kWarp) {
                  float& s = shared.p[r * kHeads + h];
                  if (h < heads) note(k, r, h, s);
                  most = fmaxf(most, s + shared.log_weight[r]);
                }
                most = WarpMax(most);
                const float scale = most == shared.most[h] ? 1 : expf(shared.most[h] - most);
                float mass = 0, mass2 = 0;
#pragma unroll 1
                for (int r = lane; r < n; r += kWarp) {
                  float& p = shared.p[r * kHeads + h];
                  p = expf(p + shared.log_weight[r] - most) * shared.factor[r];
                  mass += p;
                  mass2 = fmaf(p, shared.norm2[r], mass2);
                }
                mass = WarpSum(mass), mass2 = WarpSum(mass2);
                __syncwarp();
                if (lane == 0) {
                  shared.most[h] = most;
                  shared.scale[h] = scale;
                  shared.mass[h] = shared.mass[h] * scale + mass;
                  shared.mass2[h] = shared.mass2[h] * scale + mass2;
                }
              }
              __syncthreads();
              values.Add(shape, tile, n, row.v_offset, shared.p, shared.scale);
            });
  values.Finish(reinterpret_cast<float*>(memory), heads,
                [&](int h, int j, float x) { state[h * StateFloats(row.dim_v) + j] = x; });
  if (tid < heads) {
    const SoftmaxState out(state + tid * StateFloats(row.dim_v), row.dim_v);
    out.max() = shared.most[tid];
    out.denominator() = shared.mass[tid];
    out.value_norm2() = shared.mass2[tid];
  }
  __syncthreads();
}

// Bytes of dynamic shared memory of AttendTiles: tiles (or the sums of values or of the
// certificate) and the queries.
template <int kHeads>
VATTN_HD inline int RowsBytes(const RowLayout& row, int depth) {
  const int sums = kThreads * (2 * kHeads * 4 > kTailSums * 8 ? 2 * kHeads * 4 : kTailSums * 8);
  const int tiles = depth * TileBytes(MakeTileShape(row.row_bytes));
  return (tiles > sums ? tiles : sums) +
         kHeads * (row.dim_k > row.dim_v ? row.dim_k : row.dim_v) * 4;
}

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_ROWS_CUH_
