// Attention of a team: over its list of drawn or given rows, over every token, and the merging of
// its thread blocks' states.
#ifndef VATTN_KERNELS_CUDA_ATTEND_CUH_
#define VATTN_KERNELS_CUDA_ATTEND_CUH_

#include <cmath>

#include "kernels/cuda/team.cuh"
#include "kernels/cuda/verify.cuh"

namespace vattn::cuda {

// Queries of heads [first, first + kHeads) behind the tiles in dynamic shared memory.
template <int kHeads>
__device__ float* LoadQueries(Team<kHeads>& team, int first) {
  const RowLayout& row = team.p.storage.host.row;
  float* queries = reinterpret_cast<float*>(
                       team.memory + RowsBytes<kHeads>(row, team.p.storage.tiles_in_flight)) -
                   kHeads * row.dim_k;
  const int now = min(kHeads, team.heads() - first);
  __syncthreads();
  for (int i = threadIdx.x; i < kHeads * row.dim_k; i += kThreads) {
    queries[i] = i < now * row.dim_k
                     ? team.group.scratch.query[static_cast<int64_t>(first) * row.dim_k + i]
                     : 0;
  }
  return queries;
}

// Copies the first `count` rows of a tile to their hot slots in shared.slot. Holds a barrier.
template <int kHeads>
__device__ void KeepRows(Team<kHeads>& team, const TileShape& shape, const std::byte* tile,
                         int count) {
  const HotSetRef& hot = team.p.hot;
  if (hot.slots == 0) return;
  __syncthreads();  // shared.slot is there
  const int per_row = shape.row_bytes / 16;
#pragma unroll 1
  for (int c = threadIdx.x; c < count * per_row; c += kThreads) {
    const int r = c / per_row, part = c - r * per_row;
    const int32_t slot = team.shared.slot[r];
    if (slot < 0) continue;
    *reinterpret_cast<uint4*>(hot.rows + static_cast<int64_t>(slot) * shape.row_bytes + part * 16) =
        *reinterpret_cast<const uint4*>(tile + r * shape.pitch + part * 16);
  }
}

// States of all heads over this block's tiles of the list. A row counts with 1 / pi at `scale`, or, if
// log_weights is not null, with exp of its log weight.
template <DType kType, int kHeads>
__device__ __noinline__ void AttendList(Team<kHeads>& team, int64_t count, float scale,
                                        const float* log_weights) {
  const GroupScratch& w = team.group.scratch;
  const RowLayout& row = team.p.storage.host.row;
  const TileShape shape = OfRows(team.p.storage, MakeTileShape(row.row_bytes, count, team.size));
  const int heads = team.heads(), tid = threadIdx.x;
  const int tiles = team.Tiles(count, shape.rows);
  const auto place = [&](int k, int r) { return team.RowPlace(shape.rows, k, r); };
  for (int first = 0; first < heads; first += kHeads) {
    const float* queries = LoadQueries(team, first);
    if (tid < kHeads) {
      team.shared.rows.most[tid] = log_weights != nullptr || first + tid >= heads
                                       ? LeastLogit(team.p)
                                       : team.shared.head[first + tid].shift;
    }
    float* state =
        w.state + (static_cast<int64_t>(team.rank) * heads + first) * StateFloats(row.dim_v);
    AttendTiles<kType, kHeads>(
        row, shape, team.p.storage.tiles_in_flight, tiles, min(kHeads, heads - first), queries,
        team.memory, team.shared.rows, state,
        [&](int k, int r) -> uint64_t {
          const int64_t i = place(k, r);
          return i < count ? LoadL2(w.row + i) : 0;
        },
        [&](int k) { return static_cast<int>(min(count - place(k, 0), int64_t{shape.rows})); },
        [&](int k, int r) {
          const int64_t i = place(k, r);
          team.shared.slot[r] = first == 0 ? LoadL2(w.slot + i) : -1;
          if (log_weights != nullptr) return make_float2(log_weights[i], 1);
          return make_float2(0, 1 / Min(1.f, scale * LoadL2(w.weight + i)));
        },
        [&](int k, int r, int h, float& logit) {
          const int64_t i = place(k, r);
          // Lists of a caller may have what not every query token sees.
          if (team.p.task == Task::kAttendSelected && team.p.num_tokens > 1 &&
              LoadL2(w.token + i) >= VisibleEnd(team.p, team.group, first + h))
            logit = -INFINITY;
          w.logit[(first + h) * w.capacity + i] = logit;
          if (first + h == 0) w.norm2[i] = team.shared.rows.norm2[r];
        },
        [&](int k, const std::byte* tile) {
          if (first == 0)
            KeepRows(team, shape, tile,
                     static_cast<int>(min(count - place(k, 0), int64_t{shape.rows})));
        });
  }
}

// States of all heads over this block's tiles of every token.
template <DType kType, int kHeads>
__device__ __noinline__ void AttendAll(Team<kHeads>& team) {
  const GroupScratch& w = team.group.scratch;
  const RowLayout& row = team.p.storage.host.row;
  const TileShape shape = OfRows(team.p.storage, MakeTileShape(row.row_bytes));
  const int64_t count = team.group.tokens;
  const int tiles = team.Tiles(count, shape.rows);
  const auto token = [&](int k, int r) { return team.RowPlace(shape.rows, k, r); };
  for (int first = 0; first < team.heads(); first += kHeads) {
    const float* queries = LoadQueries(team, first);
    if (threadIdx.x < kHeads) team.shared.rows.most[threadIdx.x] = LeastLogit(team.p);
    AttendTiles<kType, kHeads>(
        row, shape, team.p.storage.tiles_in_flight, tiles, min(kHeads, team.heads() - first),
        queries, team.memory, team.shared.rows,
        w.state + (static_cast<int64_t>(team.rank) * team.heads() + first) * StateFloats(row.dim_v),
        [&](int k, int r) -> uint64_t {
          return token(k, r) < count ? RowAddress(team.p.storage, team.group, token(k, r)) : 0;
        },
        [&](int k) { return static_cast<int>(min(count - token(k, 0), int64_t{shape.rows})); },
        WeighOnce{},
        [&](int k, int r, int h, float& logit) {
          if (team.p.num_tokens > 1 && token(k, r) >= VisibleEnd(team.p, team.group, first + h))
            logit = -INFINITY;
        });
  }
}

// Makes the rows that AttendList brought to the hot set known there. Call it after a barrier, so that
// the rows are whole.
template <int kHeads>
__device__ void Publish(Team<kHeads>& team, int64_t count) {
  const GroupScratch& w = team.group.scratch;
  const HotSetRef& hot = team.p.hot;
  for (int64_t i = int64_t{team.rank} * kThreads + threadIdx.x; i < count;
       i += int64_t{team.size} * kThreads) {
    const int32_t slot = LoadL2(w.slot + i);
    if (slot < 0) continue;
    const uint32_t token = LoadL2(w.token + i);
    __threadfence();
    *static_cast<volatile int32_t*>(hot.slot_of + HotKey(team.p.storage.host, team.group, token)) =
        slot;
    w.row[i] =
        reinterpret_cast<uint64_t>(hot.rows + int64_t{slot} * team.p.storage.host.row.row_bytes);
    w.slot[i] = -1;
  }
}

// Merges the team's states from `walks` walks over lists, for the heads of this thread block. With
// `fixed` the states of sinks and window and of value codes are merged too. Writes output, shift,
// denominator and ref to scratch, and publishes the first `count` rows of the list. There is a barrier
// before and after.
template <int kHeads>
__device__ __noinline__ void Combine(Team<kHeads>& team, bool fixed, int64_t count, int walks = 1) {
  const GroupScratch& w = team.group.scratch;
  const Promise& promise = team.p.promise;
  const int heads = team.heads(), dim = team.p.storage.host.row.dim_v, tid = threadIdx.x;
  const bool coded =
      fixed && team.p.storage.host.value_bits > 0 && promise.policy == Policy::kVerified;
  const int walked = walks * team.size, rows = walked + (fixed ? kFixedParts : 0),
            parts = rows + (coded ? 1 : 0);
  constexpr int kEach = 2;  // parts of a lane
  static_assert(kMostWalks * kMostTeam + kFixedParts + 1 <= kEach * kWarp);
  __shared__ float whole, norms[kWarps];                  // the denominator
  float* factor = reinterpret_cast<float*>(team.memory);  // [parts]
  const auto state = [&](int r, int h) {
    const float* from = r < walked ? w.state + static_cast<int64_t>(r) * heads * StateFloats(dim)
                        : r < rows
                            ? w.fixed + static_cast<int64_t>(r - walked) * heads * StateFloats(dim)
                            : w.coded;
    return ConstSoftmaxState(from + static_cast<int64_t>(h) * StateFloats(dim), dim);
  };
  // Several threads share an element. The first parts of each are on their way while factors are made.
  const int shares = Max(kThreads / dim, 1), own_share = tid / dim,
            own_place = tid - own_share * dim;
  constexpr int kHeld = 5;
  team.Sync();
#pragma unroll 1
  for (int h = team.rank; h < heads; h += team.size) {
    float held[kHeld];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int r = own_share + k * shares;
      held[k] = own_share < shares && r < parts ? LoadL2(state(r, h).numerator + own_place) : 0;
    }
    HeadWork work = team.shared.head[h];
    if (tid < kWarp) {
      float most[kEach], own[kEach], of_codes[kEach], norm2[kEach], all = -INFINITY;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int r = tid + i * kWarp;
        const bool in = r < parts;
        const ConstSoftmaxState at = state(in ? r : 0, h);
        most[i] = in ? LoadL2(&at.max()) : -INFINITY;
        own[i] = r < rows ? LoadL2(&at.denominator()) : 0;  // |v|^2 is summed over rows alone
        norm2[i] = in ? LoadL2(&at.value_norm2()) : 0;
        of_codes[i] = in && r >= rows          ? LoadL2(&at.denominator())
                      : coded && r < team.size ? LoadL2(w.coded_mass + r * heads + h)
                                               : 0;
        all = fmaxf(all, most[i]);
      }
      all = WarpMax(all);
      float mass = 0, coded_mass = 0, mass2 = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int r = tid + i * kWarp;
        const float f = MergeFactor(most[i], own[i] + of_codes[i], all);
        if (r < parts) factor[r] = f;
        mass += f * own[i];
        coded_mass += f * of_codes[i];
        mass2 += f * norm2[i];
      }
      mass = WarpSum(mass), mass2 = WarpSum(mass2);
      if (coded) coded_mass = WarpSum(coded_mass);
      if (tid == 0) {
        const float denominator = fmaxf(mass + coded_mass, kLeastDivisor);
        whole = denominator;
        if (all > work.shift) work.mass *= expf(work.shift - all);
        work.shift = all;
        work.denominator = denominator;
        work.unseen = coded_mass;
        work.value_norm2 = Max(mass2 / fmaxf(mass, kLeastDivisor), 0.f);
        work.least_ref =
            promise.norm == Norm::kValue ? promise.norm_floor * sqrtf(work.value_norm2) : 0;
      }
    }
    __syncthreads();
    float* share = factor + parts;  // [shares][dim]
#pragma unroll 1
    for (int i = tid; i < shares * dim; i += kThreads) {
      const int first = i / dim;
      float sum = 0;
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        const int r = first + k * shares;
        if (r >= parts) break;
        sum = fmaf(factor[r], i == tid ? held[k] : LoadL2(state(r, h).numerator + i % dim), sum);
      }
#pragma unroll 1
      for (int r = first + kHeld * shares; r < parts; r += shares)
        sum = fmaf(factor[r], LoadL2(state(r, h).numerator + i % dim), sum);
      share[i] = sum;
    }
    __syncthreads();
    float norm2 = 0;
#pragma unroll 1
    for (int j = tid; j < dim; j += kThreads) {
      float sum = 0;
#pragma unroll 4
      for (int i = 0; i < shares; ++i) sum += share[i * dim + j];
      const float o = sum / whole;
      w.output[static_cast<int64_t>(h) * dim + j] = o;
      norm2 = fmaf(o, o, norm2);
    }
    norm2 = BlockSum(norm2, norms);
    if (tid == 0) {
      work.output_norm2 = norm2;
      w.head[h] = work;
    }
  }
  Publish(team, count);
  team.Sync();
}

// Loads to shared memory what the thread blocks of the other heads left in scratch.head, and with
// `states` in group.state.
template <int kHeads>
__device__ void LoadHeads(Team<kHeads>& team, bool states) {
  const int words = sizeof(HeadWork) / 4, state_words = sizeof(HeadState) / 4;
  __syncthreads();
  for (int i = threadIdx.x; i < team.heads() * words; i += kThreads) {
    reinterpret_cast<float*>(team.shared.head)[i] =
        LoadL2(reinterpret_cast<const float*>(team.group.scratch.head) + i);
  }
  for (int i = threadIdx.x; states && i < team.heads() * state_words; i += kThreads) {
    reinterpret_cast<float*>(team.shared.state)[i] =
        LoadL2(reinterpret_cast<const float*>(team.group.state) + i);
  }
  __syncthreads();
}

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_ATTEND_CUH_
