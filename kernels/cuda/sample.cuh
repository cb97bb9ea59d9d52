// Passes over the estimates of a group (METHOD.md, "Selection"): predicted variance, candidates,
// and the draw. The weight of a token is the root of sum_h (gain_h e^_h + floor_h)^2. A token is drawn
// if and only if u < scale * weight, or ln e^_h >= scratch.sure_h for any head h.
#ifndef VATTN_KERNELS_CUDA_SAMPLE_CUH_
#define VATTN_KERNELS_CUDA_SAMPLE_CUH_

#include <cmath>

#include "kernels/cuda/hot_set.cuh"
#include "kernels/cuda/team.cuh"

namespace vattn::cuda {

// scratch.sure of all heads in a segment of the index. Null: no token is sure.
inline __device__ const float* SureScores(const GroupScratch& w, int segment, int heads) {
  return w.sure == nullptr ? nullptr : w.sure + segment * heads;
}

// The estimate from which on head h draws a token for sure, in a block with this shift. `sure` is what
// SureScores returned.
inline __device__ float SureEstimate(const float* sure, int h, float shift) {
  constexpr float kNever = 2;  // over every estimate
  // Tokens that are not there have estimate 0.
  return sure == nullptr ? kNever : fmaxf(expf(fminf(1.f, sure[h] - shift)), kLeastEstimate);
}

// Adds the part of one head to weight^2. An outlier, whose e is below 0 for every head, is always
// drawn, and so is a token with e >= sure.
inline __device__ void AddWeight(float e, float gain, float floor, float sure, float& weight2) {
  if (e < 0 || e >= sure) {
    weight2 = kAlwaysWeight2;
    return;
  }
  const float with_floor = fmaf(e, gain, e > 0 ? floor : 0);
  weight2 = fmaf(with_floor, with_floor, weight2);
}

// Expected draws and variance excess 1 / pi - 1 of a token with this weight^2.
inline __device__ float Excess(float weight2, float scale, float& expected) {
  const float inverse = rsqrtf(fmaxf(weight2, kLeastDivisor));
  expected += fminf(1.f, weight2 * inverse * scale);
  return fmaxf(inverse / scale - 1.f, 0.f);
}

// One tile of 16 tokens in `stride` is looked at: in block b the tiles whose number is (phase + b)
// modulo stride. SampledTiles says how many these are in `blocks` blocks, SampledTile where the item-th
// of them lies.
constexpr int kTilesPerBlock = kBlockTokens / kTileTokens;
inline __device__ int SampledTiles(int stride, int blocks) {
  if (stride <= kTilesPerBlock) return blocks * (kTilesPerBlock / stride);
  return (blocks + stride - 1) / stride * kTilesPerBlock;
}
struct TilePlace {
  int block, tile;
};
inline __device__ TilePlace SampledTile(int stride, int phase, int item) {
  if (stride <= kTilesPerBlock) {
    const int per_block = kTilesPerBlock / stride, b = item / per_block;
    return {b, (phase + b) % stride + item % per_block * stride};
  }
  const int tile = item % kTilesPerBlock;
  return {item / kTilesPerBlock * stride + (tile - phase % stride + stride) % stride, tile};
}

// As PredictVariance of kernels/cpu/sample.h, from one tile of 16 tokens in `stride`: into shared.total
// the predicted variance of every head, [0, G), and the expected draws, [G].
template <int kHeads>
__device__ __noinline__ void PredictSample(Team<kHeads>& team, float scale, int stride, int phase) {
  const GroupScratch& w = team.group.scratch;
  const int heads = team.heads(), tid = threadIdx.x, warp = tid / kWarp, lane = tid % kWarp;
  const int blocks = static_cast<int>(NumBlocks(team.group));
  constexpr int kLanes = kTileTokens / 2;  // a lane takes two tokens
  for (int i = tid; i < kWarps * (kMaxDeviceGroup + 1); i += kThreads)
    (&team.shared.sums[0][0])[i] = 0;
  __syncthreads();
  const int items = SampledTiles(stride, blocks), step = team.size * (kThreads / kLanes),
            rounds = (items + step - 1) / step;
  float expected = 0;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const int item = round * step + team.rank * (kThreads / kLanes) + tid / kLanes;
    const auto [b0, tile0] = SampledTile(stride, phase, item);
    int64_t b = b0;
    int tile = tile0;
    const bool in = item < items && b < blocks;
    if (!in) b = 0, tile = 0;
    const uint16_t* estimate =
        w.estimate + b * heads * kBlockTokens + tile * kTileTokens + tid % kLanes * 2;
    const float* sure = SureScores(w, SegmentAt(team.group, FirstBlock(team.group) + b), heads);
    float weight2[2] = {};
    for (int h = 0; h < heads; ++h) {
      const float2 e =
          __half22float2(*reinterpret_cast<const __half2*>(estimate + h * kBlockTokens));
      const float shift = w.shift[b * heads + h], gain = expf(team.shared.log_gain[h] + shift);
      const float limit = SureEstimate(sure, h, shift);
      AddWeight(e.x, gain, team.shared.floor[h], limit, weight2[0]);
      AddWeight(e.y, gain, team.shared.floor[h], limit, weight2[1]);
    }
    float none = 0;
    float& sum = in ? expected : none;
    const float excess0 = in ? Excess(weight2[0], scale, sum) : 0,
                excess1 = in ? Excess(weight2[1], scale, sum) : 0;
    for (int h = 0; h < heads; ++h) {
      const float2 e =
          __half22float2(*reinterpret_cast<const __half2*>(estimate + h * kBlockTokens));
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

// One block of 256 tokens by one warp: a lane takes tokens 64 r + 16 k + 2 p + {0, 1}, r = lane /
// 8, p = lane % 8, k = 0 .. 3, so that two Philox calls give its eight random numbers.
constexpr int kDrawTokens = 8;
inline __device__ int DrawToken(int lane, int i) {
  return lane / 8 * 64 + i / 2 * 16 + lane % 8 * 2 + i % 2;
}

// Writes the tokens of one block that a warp keeps, in ascending order, and returns their number.
// kept[i]: the ballot of the lanes' i-th tokens.
inline __device__ int WriteCandidates(uint64_t* out, uint32_t first, int lane,
                                      const unsigned (&kept)[kDrawTokens],
                                      const float (&weight2)[kDrawTokens]) {
  // Ranks in the order of tokens: runs of 8 lanes one after the other, in a run k by k.
  const unsigned run = 0xffu << (lane / 8 * 8), before_run = (1u << (lane / 8 * 8)) - 1;
  const unsigned before_lane = run & ((1u << lane) - 1);
  int rank = 0, count = 0;
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
      out[at] = uint64_t{first + DrawToken(lane, j)} |
                uint64_t{__float_as_uint(__fsqrt_rn(weight2[j]))} << 32;
    };
    if (even) put(here, i);
    if (odd) put(here + even, i + 1);
    rank += __popc(kept[i] & run) + __popc(kept[i + 1] & run);
  }
  return count;
}

// A pass of a warp over one segment. Writes the predicted variance of every head and the expected
// draws to scratch.predicted, and lists all tokens with u < bound * weight as candidates, from the
// segment's first place in scratch.candidate on.
//
// The function is long because it is one loop over registers: up to kHeads heads stay in registers
// over the segment, and with kAhead the next block is loaded meanwhile; more heads go in rounds, of which
// there are kRounds at most, or 0: any number. part [G], in shared memory, is this warp's; with kRounds 0.
template <int kHeads, int kRounds>
__device__ void PredictSegment(const DeviceGroup& group, int heads, int segment,
                               const float* log_gain, const float* floors, float scale, float bound,
                               Randomness randomness, float* part) {
  const GroupScratch& w = group.scratch;
  const int lane = threadIdx.x % kWarp;
  const uint32_t use = randomness.use();
  const Epochs epochs(group.step, randomness.renewal());
  const RandomKey key = group.key;
  const uint16_t* const estimates = w.estimate;
  const float* const shifts = w.shift;
  const float inverse_scale = 1 / scale;
  const int64_t blocks = NumBlocks(group), begin = segment * SegmentBlocks(blocks);
  const int64_t end = min(blocks, begin + SegmentBlocks(blocks)), first_block = FirstBlock(group);
  uint64_t* const out = w.candidate + begin * kBlockTokens;
  float* const sums = w.predicted + static_cast<int64_t>(segment) * (heads + 1);
  float expected = 0, variance[kHeads] = {}, floor[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) floor[h] = h < heads ? floors[h] : 0;
  const bool few = kRounds == 1 || (kRounds == 0 && heads <= kHeads);
  float more[kRounds > 1 ? kRounds : 1][kHeads] = {};  // variance, with several rounds
  if (kRounds == 0 && !few) {
    for (int h = lane; h < heads; h += kWarp) part[h] = 0;
    __syncwarp();
  }
  int candidates = 0;
  // Estimates of kHeads heads from `first` on of block b, and the unit of head first + lane %
  // kHeads.
  constexpr bool kAhead = kHeads <= 4;  // there are registers for the next block
  __half2 held[kHeads][kDrawTokens / 2], next[kAhead ? kHeads : 1][kDrawTokens / 2];
  float shift = 0, next_shift = 0;
  const auto load = [&](int64_t b, int first, auto& to, float& unit) {
    const int mine = first + lane % kHeads;
    unit = mine < heads ? shifts[b * heads + mine] : 0;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const uint16_t* from = estimates + (b * heads + first + h) * kBlockTokens;
#pragma unroll
      for (int k = 0; k < kDrawTokens / 2; ++k) {
        to[h][k] = first + h < heads
                       ? *reinterpret_cast<const __half2*>(from + DrawToken(lane, 2 * k))
                       : __half2{};
      }
    }
  };
  if constexpr (kAhead) {
    if (few && begin < end) load(begin, 0, next, next_shift);
  }
  int index_segment = SegmentAt(group, first_block + begin);
  int64_t index_end = SegmentEnd(group, index_segment, first_block + end);
  for (int64_t b = begin; b < end; ++b) {
    if (first_block + b >= index_end)
      index_end = SegmentEnd(group, ++index_segment, first_block + end);
    const float* const sure = SureScores(w, index_segment, heads);
    const uint16_t* estimate = estimates + b * heads * kBlockTokens;
    float weight2[kDrawTokens] = {};
    // Of pairs of tokens, which are drawn for sure, and which are not there: 16 bits each.
    unsigned always[kDrawTokens / 2] = {}, absent[kDrawTokens / 2] = {};
    float own = 0;  // gain of head lane % kHeads
#pragma unroll 1
    for (int first = 0; first < (kRounds == 1 ? 1 : heads); first += kHeads) {
      bool loaded = false;
      if constexpr (kAhead) {
        if (few) {
#pragma unroll
          for (int h = 0; h < kHeads; ++h) {
#pragma unroll
            for (int k = 0; k < kDrawTokens / 2; ++k) held[h][k] = next[h][k];
          }
          shift = next_shift;
          if (b + 1 < end) load(b + 1, 0, next, next_shift);
          loaded = true;
        }
      }
      if (!loaded) load(b, first, held, shift);
      const int mine = first + lane % kHeads;
      own = mine < heads ? expf(log_gain[mine] + shift) : 0;
      // No estimate lies between the limit and the next fp16 from it on.
      const __half2 own_limit =
          __half2half2(__float2half_ru(SureEstimate(mine < heads ? sure : nullptr, mine, shift)));
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float gain = __shfl_sync(kAllLanes, own, h);
        const __half2 limit = __shfl_sync(kAllLanes, own_limit, h);
        const float least = few ? floor[h] : first + h < heads ? floors[first + h] : 0;
#pragma unroll
        for (int k = 0; k < kDrawTokens / 2; ++k) {
          const float2 e = __half22float2(held[h][k]);
          const float x = fmaf(e.x, gain, least), y = fmaf(e.y, gain, least);
          weight2[2 * k] = fmaf(x, x, weight2[2 * k]);
          weight2[2 * k + 1] = fmaf(y, y, weight2[2 * k + 1]);
          always[k] |= __hge2_mask(held[h][k], limit);
        }
      }
      if (first > 0) continue;
        // Outliers and tokens that are not there are so for every head.
#pragma unroll
      for (int k = 0; k < kDrawTokens / 2; ++k) {
        always[k] |= __hlt2_mask(held[0][k], __half2{});
        absent[k] = __heq2_mask(held[0][k], __half2{});
      }
    }
#pragma unroll
    for (int i = 0; i < kDrawTokens; ++i) {
      const unsigned bit = i % 2 == 0 ? 1u : 0x10000u;
      if ((always[i / 2] & bit) != 0) weight2[i] = kAlwaysWeight2;
      if ((absent[i / 2] & bit) != 0) weight2[i] = 0;
    }
    const uint32_t first_token = static_cast<uint32_t>((first_block + b) * kBlockTokens);
    float excess[kDrawTokens];
    unsigned kept[kDrawTokens];
    unsigned any = 0;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t counter = TokenCounter(first_token + DrawToken(lane, j));
      const Philox4 r =
          Philox({{counter, epochs.Of(counter), key.stream, use}}, key.key0, key.key1);
#pragma unroll
      for (int k = 0; k < kDrawTokens / 2; ++k) {
        const int i = 2 * k + j;
        const float inverse = rsqrtf(fmaxf(weight2[i], kLeastDivisor)),
                    weight = weight2[i] * inverse;
        expected += fminf(1.f, weight * scale);
        excess[i] = fmaxf(fmaf(inverse, inverse_scale, -1.f), 0.f);
        // The rough weight decides only where the exact one surely agrees.
        const float u = UnitFloat(r.word[k]);
        kept[i] = __ballot_sync(kAllLanes, u < bound * weight * 1.00001f);
        any |= kept[i];
      }
    }
    if (few) {
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float sum = 0;  // of e^2 (1 / pi - 1), in the unit of the gain
#pragma unroll
        for (int k = 0; k < kDrawTokens / 2; ++k) {
          const float2 e = __half22float2(held[h][k]);
          sum = fmaf(e.x * e.x, excess[2 * k], sum);
          sum = fmaf(e.y * e.y, excess[2 * k + 1], sum);
        }
        const float gain = __shfl_sync(kAllLanes, own, h);
        variance[h] = fmaf(sum, gain * gain, variance[h]);
      }
    } else if constexpr (kRounds > 1) {
#pragma unroll
      for (int round = 0; round < kRounds; ++round) {
        load(b, round * kHeads, held, shift);
        const int mine = round * kHeads + lane % kHeads;
        own = mine < heads ? expf(log_gain[mine] + shift) : 0;
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          float sum = 0;
#pragma unroll
          for (int k = 0; k < kDrawTokens / 2; ++k) {
            const float2 e = __half22float2(held[h][k]);
            sum = fmaf(e.x * e.x, excess[2 * k], sum);
            sum = fmaf(e.y * e.y, excess[2 * k + 1], sum);
          }
          const float gain = __shfl_sync(kAllLanes, own, h);
          more[round][h] = fmaf(sum, gain * gain, more[round][h]);
        }
      }
    } else {
#pragma unroll 2
      for (int h = 0; h < heads; ++h) {
        const float gain = expf(log_gain[h] + shifts[b * heads + h]);
        float sum = 0;
#pragma unroll
        for (int k = 0; k < kDrawTokens / 2; ++k) {
          const float2 e = __half22float2(*reinterpret_cast<const __half2*>(
              estimate + h * kBlockTokens + DrawToken(lane, 2 * k)));
          const float x0 = e.x * gain, x1 = e.y * gain;
          sum = fmaf(x0 * x0, excess[2 * k], sum);
          sum = fmaf(x1 * x1, excess[2 * k + 1], sum);
        }
        sum = WarpSum(sum);
        if (lane == 0) part[h] += sum;
      }
    }
    if (any != 0) candidates += WriteCandidates(out + candidates, first_token, lane, kept, weight2);
  }
  if (few) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float sum = WarpSum(variance[h]);
      if (lane == 0 && h < heads) sums[h] = sum;
    }
  } else if constexpr (kRounds > 1) {
#pragma unroll
    for (int h = 0; h < kRounds * kHeads; ++h) {
      const float sum = WarpSum(more[h / kHeads][h % kHeads]);
      if (lane == 0 && h < heads) sums[h] = sum;
    }
  } else {
    __syncwarp();
    for (int h = lane; h < heads; h += kWarp) sums[h] = part[h];
  }
  expected = WarpSum(expected);
  if (lane == 0) {
    sums[heads] = expected;
    w.candidates[segment] = candidates;
  }
}

// Sums of scratch.predicted over the segments to shared.total [G + 1].
template <int kHeads>
__device__ void SumPredicted(Team<kHeads>& team) {
  const GroupScratch& w = team.group.scratch;
  const int heads = team.heads(), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int segments = NumSegments(NumBlocks(team.group));
  __syncthreads();
  for (int h = warp; h <= heads; h += kWarps) {
    double sum = 0;
#pragma unroll
    for (int i = 0; i < kMostSegments / kWarp; ++i) {
      const int s = i * kWarp + lane;
      sum += s < segments ? LoadL2(w.predicted + static_cast<int64_t>(s) * (heads + 1) + h) : 0.f;
    }
    sum = WarpSum(sum);
    if (lane == 0) team.shared.total[h] = sum;
  }
  __syncthreads();
}

// PredictSegment of all of the middle by the team, and the sums. Two barriers.
template <int kHeads>
__device__ __noinline__ void PredictAll(Team<kHeads>& team, float scale, float bound,
                                        Randomness randomness) {
  __syncthreads();
  for (int s = team.SegmentBegin(threadIdx.x / kWarp);
       s < team.SegmentBegin(threadIdx.x / kWarp + 1); ++s) {
    PredictSegment<kHeads, 0>(team.group, team.heads(), s, team.shared.log_gain, team.shared.floor,
                              scale, bound, randomness, team.shared.sums[threadIdx.x / kWarp]);
  }
  team.Sync();
  SumPredicted(team);
}

// Appends the candidates with low * weight <= u < high * weight, ascending, to the list after its
// first `count`, and finds their rows; the new count, or -1 if the list has no room for it. Counts
// misses in shared.fetched. Others see this block's part after a barrier.
template <int kHeads>
__device__ __noinline__ int64_t DrawTokens(Team<kHeads>& team, float low, float high,
                                           Randomness randomness, int64_t count) {
  const GroupScratch& w = team.group.scratch;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int segment_tokens = static_cast<int>(SegmentBlocks(NumBlocks(team.group))) * kBlockTokens;
  const int segment_begin = team.SegmentBegin(warp), segment_end = team.SegmentBegin(warp + 1);
  const Epochs epochs(team.group.step, randomness.renewal());
  // The first pass counts, the second one writes.
  int kept = 0;
  ListPlace place;
  int64_t to = 0;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    if (pass == 1) {
      place = team.PlaceOnList(count, kept);
      if (place.end > w.capacity) return -1;
      to = place.warp;
    }
#pragma unroll 1
    for (int segment = segment_begin; segment < segment_end; ++segment) {
      const uint64_t* candidate = w.candidate + int64_t{segment} * segment_tokens;
      const int candidates = static_cast<int>(w.candidates[segment]);
#pragma unroll 1
      for (int i = lane; i - lane < candidates; i += kWarp) {
        const uint64_t c = i < candidates ? candidate[i] : 0;
        const uint32_t token = static_cast<uint32_t>(c);
        const float weight = __uint_as_float(static_cast<uint32_t>(c >> 32));
        const float u = TokenUniform(team.group.key, token, epochs, randomness.use());
        const bool in = i < candidates && u < high * weight && u >= low * weight;
        const unsigned ballot = __ballot_sync(kAllLanes, in);
        if (pass == 0) {
          kept += __popc(ballot);
          continue;
        }
        if (in) {
          const int64_t at = to + __popc(ballot & ((1u << lane) - 1));
          w.token[at] = token;
          w.weight[at] = weight;
        }
        to += __popc(ballot);
      }
    }
  }
  ResolveListed(team, place.block, place.in_block);
  return place.end;
}

// Makes the drawn tokens exact (kernels/cpu/sample.h, FixDrawn): weight infinite, estimate 0, and
// the masses of all blocks summed anew.
template <int kHeads>
__device__ __noinline__ void FixDrawn(Team<kHeads>& team, int64_t count) {
  const GroupScratch& w = team.group.scratch;
  const int heads = team.heads(), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  // A thread block alone writes the estimates that it reads: its L1 cache holds no older ones.
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const uint32_t token = LoadL2(w.token + i);
    const int64_t b = token / kBlockTokens - FirstBlock(team.group);
    if (team.rank == 0) w.weight[i] = INFINITY;
    if (b < team.BlocksBegin() || b >= team.BlocksEnd()) continue;
    for (int h = 0; h < heads; ++h)
      w.estimate[(b * heads + h) * kBlockTokens + token % kBlockTokens] = 0;
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

#endif  // VATTN_KERNELS_CUDA_SAMPLE_CUH_
