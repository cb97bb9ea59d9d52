// Passes over the estimates of a group (ALGORITHM 4): predicted variance, candidates, and the draw.
// weight^2 of a token = sum_h (gain_h e^_h + floor_h)^2, it is drawn iff u < scale * weight.
#ifndef VATTN_KERNELS_CUDA_DRAW_CUH_
#define VATTN_KERNELS_CUDA_DRAW_CUH_

#include <cmath>

#include "kernels/cuda/team.cuh"

namespace vattn::cuda {

// Whose random numbers a draw takes: the permanent ones, or those of the step's n-th redraw, n from 1.
struct Randomness {
  uint32_t refresh = 1;
  uint32_t redraw = 0;
};

inline __device__ float Uniform(const DeviceGroup& group, const Randomness& r, uint32_t token) {
  const uint32_t counter = TokenCounter(token);
  const uint32_t refresh = r.redraw > 0 ? 1 : r.refresh;
  const uint32_t use = r.redraw > 0 ? static_cast<uint32_t>(RandomUse::kRedraw) + r.redraw - 1
                                    : static_cast<uint32_t>(RandomUse::kSelect);
  const Philox4 x = Philox({{counter, Epoch(counter, group.step, refresh), group.key.stream, use}}, group.key.key0,
                           group.key.key1);
  return UnitFloat(x.word[(token >> 4) & 3]);
}

// x = gain e and its part of weight^2.
inline __device__ void AddWeight(float e, float gain, float floor, float& weight2) {
  const float with_floor = fmaf(e, gain, e > 0 ? floor : 0);
  weight2 = fmaf(with_floor, with_floor, weight2);
}

// Expected draws and variance excess 1 / pi - 1 of a token with this weight^2.
inline __device__ float Excess(float weight2, float scale, float& expected) {
  const float inverse = rsqrtf(fmaxf(weight2, 1e-30f));
  expected += fminf(1.f, weight2 * inverse * scale);
  return fmaxf(inverse / scale - 1.f, 0.f);
}

// Predicted variance of every head [0, G) and expected draws [G] over one tile of 16 tokens in
// `stride`, as PredictVariance of kernels/cpu/sample.h: into shared.total.
template <int kHeads>
__device__ __noinline__ void PredictSample(Team<kHeads>& team, float scale, int stride, int phase) {
  const GroupScratch& w = team.group.scratch;
  const int heads = team.heads(), tid = threadIdx.x, warp = tid / kWarp, lane = tid % kWarp;
  const int64_t blocks = NumBlocks(team.group);
  constexpr int kTiles = kBlockTokens / kTileTokens, kLanes = kTileTokens / 2;  // a lane takes two tokens
  for (int i = tid; i < kWarps * (kMaxDeviceGroup + 1); i += kThreads) (&team.shared.sums[0][0])[i] = 0;
  __syncthreads();
  const int64_t per_block = stride <= kTiles ? kTiles / stride : 1;
  const int64_t items = stride <= kTiles ? blocks * per_block : (blocks + stride - 1) / stride * kTiles;
  const int64_t step = static_cast<int64_t>(team.size) * (kThreads / kLanes);
  const int64_t rounds = (items + step - 1) / step;
  float expected = 0;
  for (int64_t round = 0; round < rounds; ++round) {
    const int64_t item = round * step + static_cast<int64_t>(team.rank) * (kThreads / kLanes) + tid / kLanes;
    int64_t b;
    int tile;
    if (stride <= kTiles) {
      b = item / per_block;
      tile = static_cast<int>((phase + b) % stride + item % per_block * stride);
    } else {
      tile = static_cast<int>(item % kTiles);
      b = item / kTiles * stride + (tile - phase % stride + stride) % stride;
    }
    const bool in = item < items && b < blocks;
    if (!in) b = 0, tile = 0;
    const uint16_t* estimate = w.estimate + b * heads * kBlockTokens + tile * kTileTokens + tid % kLanes * 2;
    float weight2[2] = {};
    for (int h = 0; h < heads; ++h) {
      const float2 e = __half22float2(*reinterpret_cast<const __half2*>(estimate + h * kBlockTokens));
      const float gain = expf(team.shared.log_gain[h] + w.shift[b * heads + h]);
      AddWeight(e.x, gain, team.shared.floor[h], weight2[0]);
      AddWeight(e.y, gain, team.shared.floor[h], weight2[1]);
    }
    float none = 0;
    float& sum = in ? expected : none;
    const float excess0 = in ? Excess(weight2[0], scale, sum) : 0, excess1 = in ? Excess(weight2[1], scale, sum) : 0;
    for (int h = 0; h < heads; ++h) {
      const float2 e = __half22float2(*reinterpret_cast<const __half2*>(estimate + h * kBlockTokens));
      const float gain = expf(team.shared.log_gain[h] + w.shift[b * heads + h]);
      const float x0 = e.x * gain, x1 = e.y * gain;
      const float variance = WarpSum(x0 * x0 * excess0 + x1 * x1 * excess1);
      if (lane == 0) team.shared.sums[warp][h] += variance;
    }
  }
  expected = WarpSum(expected);
  if (lane == 0) team.shared.sums[warp][heads] = expected;
  __syncthreads();
  for (int i = tid; i <= heads; i += kThreads) {
    double sum = 0;
    for (int j = 0; j < kWarps; ++j) sum += team.shared.sums[j][i];
    team.shared.total[i] = sum * stride;
  }
  team.Add(heads + 1);
}

// One block of 256 tokens by one warp: a lane takes tokens 64 r + 16 k + 2 p + {0, 1}, r = lane / 8,
// p = lane % 8, k = 0 .. 3, so that two Philox calls give its eight random numbers.
constexpr int kDrawTokens = 8;
inline __device__ int DrawToken(int lane, int i) { return lane / 8 * 64 + i / 2 * 16 + lane % 8 * 2 + i % 2; }

// Sums as PredictSample over every token, and as candidates all with u < bound * weight.
template <int kHeads>
__device__ __noinline__ void PredictAll(Team<kHeads>& team, float scale, float bound, Randomness randomness) {
  const GroupScratch& w = team.group.scratch;
  const int heads = team.heads(), tid = threadIdx.x, warp = tid / kWarp, lane = tid % kWarp;
  const uint32_t refresh = randomness.redraw > 0 ? 1 : randomness.refresh;
  const uint32_t use = randomness.redraw > 0 ? static_cast<uint32_t>(RandomUse::kRedraw) + randomness.redraw - 1
                                             : static_cast<uint32_t>(RandomUse::kSelect);
  const RandomKey key = team.group.key;
  for (int i = tid; i < kWarps * (kMaxDeviceGroup + 1); i += kThreads) (&team.shared.sums[0][0])[i] = 0;
  __syncthreads();
  float expected = 0;
  for (int64_t b = team.BlocksBegin() + warp; b < team.BlocksEnd(); b += kWarps) {
    const uint16_t* estimate = w.estimate + b * heads * kBlockTokens;
    float weight2[kDrawTokens] = {};
    for (int h = 0; h < heads; ++h) {
      const float gain = expf(team.shared.log_gain[h] + w.shift[b * heads + h]);
#pragma unroll
      for (int k = 0; k < kDrawTokens / 2; ++k) {
        const float2 e = __half22float2(
            *reinterpret_cast<const __half2*>(estimate + h * kBlockTokens + DrawToken(lane, 2 * k)));
        AddWeight(e.x, gain, team.shared.floor[h], weight2[2 * k]);
        AddWeight(e.y, gain, team.shared.floor[h], weight2[2 * k + 1]);
      }
    }
    const uint32_t first = static_cast<uint32_t>((FirstBlock(team.group) + b) * kBlockTokens);
    float u[kDrawTokens];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t counter = TokenCounter(first + DrawToken(lane, j));
      const Philox4 x = Philox({{counter, Epoch(counter, team.group.step, refresh), key.stream, use}}, key.key0, key.key1);
#pragma unroll
      for (int k = 0; k < kDrawTokens / 2; ++k) u[2 * k + j] = UnitFloat(x.word[k]);
    }
    float excess[kDrawTokens];
    unsigned kept[kDrawTokens];
    unsigned any = 0;
#pragma unroll
    for (int i = 0; i < kDrawTokens; ++i) {
      excess[i] = weight2[i] > 0 ? Excess(weight2[i], scale, expected) : 0;
      kept[i] = __ballot_sync(kAllLanes, u[i] < bound * __fsqrt_rn(weight2[i]));
      any |= kept[i];
    }
    for (int h = 0; h < heads; ++h) {
      const float gain = expf(team.shared.log_gain[h] + w.shift[b * heads + h]);
      float sum = 0;
#pragma unroll
      for (int k = 0; k < kDrawTokens / 2; ++k) {
        const float2 e = __half22float2(
            *reinterpret_cast<const __half2*>(estimate + h * kBlockTokens + DrawToken(lane, 2 * k)));
        const float x0 = e.x * gain, x1 = e.y * gain;
        sum = fmaf(x0 * x0, excess[2 * k], sum);
        sum = fmaf(x1 * x1, excess[2 * k + 1], sum);
      }
      sum = WarpSum(sum);
      if (lane == 0) team.shared.sums[warp][h] += sum;
    }
    int count = 0;
    if (any != 0) {
      // Ranks in the order of tokens: runs of 8 lanes one after the other, in a run k by k.
      const unsigned run = 0xffu << (lane / 8 * 8), before_run = (1u << (lane / 8 * 8)) - 1;
      const unsigned before_lane = run & ((1u << lane) - 1);
      int rank = 0;
#pragma unroll
      for (int i = 0; i < kDrawTokens; ++i) {
        count += __popc(kept[i]);
        rank += __popc(kept[i] & before_run);
      }
#pragma unroll
      for (int i = 0; i < kDrawTokens; i += 2) {
        const int here = rank + __popc(kept[i] & before_lane) + __popc(kept[i + 1] & before_lane);
        const bool even = kept[i] >> lane & 1, odd = kept[i + 1] >> lane & 1;
        const auto put = [&](int at, int j) {
          w.candidate[b * kBlockTokens + at] =
              uint64_t{first + DrawToken(lane, j)} |
              uint64_t{__float_as_uint(__fsqrt_rn(weight2[j]))} << 32;
        };
        if (even) put(here, i);
        if (odd) put(here + even, i + 1);
        rank += __popc(kept[i] & run) + __popc(kept[i + 1] & run);
      }
    }
    if (lane == 0) w.candidates[b] = count;
  }
  expected = WarpSum(expected);
  if (lane == 0) team.shared.sums[warp][heads] = expected;
  __syncthreads();
  for (int i = tid; i <= heads; i += kThreads) {
    double sum = 0;
    for (int j = 0; j < kWarps; ++j) sum += team.shared.sums[j][i];
    team.shared.total[i] = sum;
  }
  team.Add(heads + 1);
}

// Where row i of the list is and whether it should be copied to the hot set. Returns 1 for a miss.
inline __device__ int Resolve(const DecodeParams& p, const DeviceGroup& group, uint32_t call, uint32_t token, int64_t i) {
  constexpr uint32_t kTaken = 0xffffffffu;
  constexpr int kTries = 64;
  const GroupScratch& w = group.scratch;
  const HotSetRef& hot = p.hot;
  const int64_t row_bytes = p.storage.host.row.row_bytes;
  const uint32_t mark = call * 2 + 1;
  const int64_t key = int64_t{group.blocks[token / kBlockTokens]} * kBlockTokens + token % kBlockTokens;
  w.slot[i] = -1;
  if (hot.slots > 0) {
    const int32_t slot = *static_cast<volatile int32_t*>(hot.slot_of + key);
    if (slot >= 0) {
      volatile uint32_t* use = hot.use + slot;
      for (;;) {
        const uint32_t seen = *use;
        if (seen == kTaken) break;
        if (seen >> 1 == call || atomicCAS(hot.use + slot, seen, mark) == seen) {
          __threadfence();
          if (*static_cast<volatile int64_t*>(hot.owner + slot) != key) break;
          w.row[i] = reinterpret_cast<uint64_t>(hot.rows + slot * row_bytes);
          return 0;
        }
      }
    }
    for (int tries = 0; tries < kTries; ++tries) {
      const uint32_t at = atomicAdd(hot.hand, 1u) % static_cast<uint32_t>(hot.slots);
      const uint32_t seen = *static_cast<volatile uint32_t*>(hot.use + at);
      if (seen == kTaken || seen >> 1 == call) continue;
      if (seen & 1) {
        atomicCAS(hot.use + at, seen, seen & ~1u);
        continue;
      }
      if (atomicCAS(hot.use + at, seen, kTaken) != seen) continue;
      const int64_t old = hot.owner[at];
      if (old >= 0) atomicCAS(hot.slot_of + old, static_cast<int32_t>(at), -1);
      *static_cast<volatile int64_t*>(hot.owner + at) = key;
      __threadfence();
      *static_cast<volatile uint32_t*>(hot.use + at) = mark;
      w.slot[i] = static_cast<int32_t>(at);
      break;
    }
  }
  w.row[i] = reinterpret_cast<uint64_t>(HostRow(p.storage.host, group.blocks, token));
  return 1;
}

// Appends the candidates with low * weight <= u < high * weight, ascending, to the list after its first
// `count`; the new count, or -1 if the list has no room for it. Counts misses in shared.fetched.
template <int kHeads>
__device__ __noinline__ int64_t Draw(Team<kHeads>& team, float low, float high, Randomness randomness, int64_t count) {
  const GroupScratch& w = team.group.scratch;
  const int tid = threadIdx.x, warp = tid / kWarp, lane = tid % kWarp;
  const int64_t begin = team.BlocksBegin(), end = team.BlocksEnd();
  const auto drawn = [&](uint64_t candidate) {
    const float u = Uniform(team.group, randomness, static_cast<uint32_t>(candidate));
    const float weight = __uint_as_float(static_cast<uint32_t>(candidate >> 32));
    return u < high * weight && u >= low * weight;
  };
  __syncthreads();
  if (tid == 0) team.shared.count = 0;
  __syncthreads();
  for (int64_t b = begin + warp; b < end; b += kWarps) {
    const int candidates = static_cast<int>(w.candidates[b]);
    int kept = 0;
    for (int i = lane; i - lane < candidates; i += kWarp) {
      const bool in = i < candidates && drawn(w.candidate[b * kBlockTokens + i]);
      kept += __popc(__ballot_sync(kAllLanes, in));
    }
    if (lane == 0) {
      w.kept[b] = kept;
      atomicAdd(&team.shared.count, kept);
    }
  }
  __syncthreads();
  // Where this thread block's part of the list starts.
  const int own = team.shared.count;
  int64_t at = count, all = own;
  if (team.size > 1) {
    double* totals = w.partial + static_cast<int64_t>(team.parity) * team.size * kPartials(team.heads());
    if (tid == 0) totals[team.rank] = own;
    team.Sync();
    all = 0;
    for (int r = 0; r < team.size; ++r) {
      const int64_t n = static_cast<int64_t>(LoadShared(totals + r));
      if (r < team.rank) at += n;
      all += n;
    }
    team.parity ^= 1;
  }
  if (count + all > w.capacity) return -1;
  const uint32_t call = *team.p.hot.call;
  for (int64_t first = begin; first < end; first += kThreads) {
    const int blocks = static_cast<int>(min(end - first, int64_t{kThreads}));
    // Offsets of the next blocks: a scan over the warps' scans.
    const int mine = tid < blocks ? static_cast<int>(w.kept[first + tid]) : 0;
    int sum = mine;
#pragma unroll
    for (int o = 1; o < kWarp; o *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, o);
      if (lane >= o) sum += other;
    }
    __syncthreads();
    if (lane == kWarp - 1) team.shared.slot[warp] = sum;
    __syncthreads();
    int before = 0, whole = 0;
    for (int j = 0; j < kWarps; ++j) {
      if (j < warp) before += team.shared.slot[j];
      whole += team.shared.slot[j];
    }
    team.shared.offset[tid] = before + sum - mine;
    __syncthreads();
    for (int i = warp; i < blocks; i += kWarps) {
      const int64_t b = first + i;
      const int candidates = static_cast<int>(w.candidates[b]);
      int64_t to = at + team.shared.offset[i];
      for (int c = lane; c - lane < candidates; c += kWarp) {
        const uint64_t candidate = c < candidates ? w.candidate[b * kBlockTokens + c] : 0;
        const bool in = c < candidates && drawn(candidate);
        const unsigned ballot = __ballot_sync(kAllLanes, in);
        int miss = 0;
        if (in) {
          const int64_t place = to + __popc(ballot & ((1u << lane) - 1));
          w.token[place] = static_cast<uint32_t>(candidate);
          w.weight[place] = __uint_as_float(static_cast<uint32_t>(candidate >> 32));
          miss = Resolve(team.p, team.group, call, static_cast<uint32_t>(candidate), place);
        }
        const int misses = __popc(__ballot_sync(kAllLanes, miss != 0));
        if (lane == 0 && misses > 0) atomicAdd(&team.shared.fetched, misses);
        to += __popc(ballot);
      }
    }
    at += whole;
    __syncthreads();
  }
  return count + all;
}

// Makes the drawn tokens exact (kernels/cpu/sample.h, FixDrawn): weight infinite, estimate 0, and the
// masses of all blocks summed anew.
template <int kHeads>
__device__ __noinline__ void FixDrawn(Team<kHeads>& team, int64_t count) {
  const GroupScratch& w = team.group.scratch;
  const int heads = team.heads(), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  // A thread block alone writes the estimates that it reads: its L1 cache holds no older ones.
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const uint32_t token = LoadShared(w.token + i);
    const int64_t b = token / kBlockTokens - FirstBlock(team.group);
    if (team.rank == 0) w.weight[i] = INFINITY;
    if (b < team.BlocksBegin() || b >= team.BlocksEnd()) continue;
    for (int h = 0; h < heads; ++h) w.estimate[(b * heads + h) * kBlockTokens + token % kBlockTokens] = 0;
  }
  __syncthreads();
  for (int64_t i = team.BlocksBegin() * heads + warp; i < team.BlocksEnd() * heads; i += kWarps) {
    float sum = 0;
    const __half2* estimate = reinterpret_cast<const __half2*>(w.estimate + i * kBlockTokens);
    for (int j = lane; j < kBlockTokens / 2; j += kWarp) {
      const float2 e = __half22float2(estimate[j]);
      sum += e.x + e.y;
    }
    sum = WarpSum(sum);
    if (lane == 0) w.mass[i] = sum;
  }
  team.Sync();
}

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_DRAW_CUH_
