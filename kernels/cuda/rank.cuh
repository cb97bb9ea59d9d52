// The best tokens of the middle by rank, for every head of a group by its team: radix select over
// 32-bit keys, exact, ties to the lower token, kept as masks of a bit a token; and the list of the
// masks' tokens with their rows. Only counts cross thread blocks, so that a selection does not
// depend on the team's size.
#ifndef VATTN_KERNELS_CUDA_RANK_CUH_
#define VATTN_KERNELS_CUDA_RANK_CUH_

#include <cmath>

#include "kernels/cuda/hot_set.cuh"
#include "kernels/cuda/team.cuh"

namespace vattn::cuda {

constexpr int kDigits = 3;  // of a key, the highest first
constexpr int kDigitBins = 1 << 11;
// The lowest bit of a digit. The last one has a bit of the one before, which is known by then.
VATTN_HD constexpr int DigitShift(int digit) { return digit == 0 ? 21 : digit == 1 ? 10 : 0; }

constexpr int kMaskWords = kBlockTokens / kWarp;  // of a block

// Tokens of a block that a lane of a warp takes: two runs of 64, so that two Philox calls give
// their random numbers (kernels/rng.h).
constexpr int kLaneTokens = kBlockTokens / kWarp;
inline __device__ int LaneToken(int lane, int i) {
  return i / 4 * 128 + lane / 16 * 64 + i % 4 * 16 + lane % 16;
}
// The word of the block's mask that the token is in, and its bit there.
inline __device__ int LaneWord(int lane, int i) { return i / 4 * 4 + lane / 16 * 2 + i % 4 / 2; }
inline __device__ int LaneBit(int lane, int i) { return i % 2 * 16 + lane % 16; }

// The mask of a block from a flag for each of a lane's tokens; the same in every lane.
struct BlockMask {
  uint32_t word[kMaskWords];

  __device__ explicit BlockMask(unsigned flags) {
    unsigned ballot[kLaneTokens];
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) ballot[i] = __ballot_sync(kAllLanes, flags >> i & 1);
#pragma unroll
    for (int q = 0; q < kMaskWords; ++q) {
      const unsigned low = ballot[q / 4 * 4 + q % 2 * 2], high = ballot[q / 4 * 4 + q % 2 * 2 + 1];
      word[q] = q % 4 < 2 ? (low & 0xffffu) | high << 16 : low >> 16 | (high & 0xffff0000u);
    }
  }
  __device__ uint32_t Word(int at) const {
    uint32_t x = 0;
#pragma unroll
    for (int q = 0; q < kMaskWords; ++q) x = q == at ? word[q] : x;
    return x;
  }
  __device__ int Count() const {
    int count = 0;
#pragma unroll
    for (int q = 0; q < kMaskWords; ++q) count += __popc(word[q]);
    return count;
  }
  // Tokens of the mask below the lane's i-th.
  __device__ int Before(int lane, int i) const {
    const int at = LaneWord(lane, i);
    int count = 0;
#pragma unroll
    for (int q = 0; q < kMaskWords; ++q) {
      count += __popc(q < at ? word[q] : q == at ? word[q] & ((1u << LaneBit(lane, i)) - 1) : 0);
    }
    return count;
  }
};

// Flags of the lane's tokens of block b that lie in the middle.
inline __device__ unsigned InMiddle(const DeviceGroup& group, int64_t b) {
  const int64_t first = (FirstBlock(group) + b) * kBlockTokens;
  unsigned in = 0;
#pragma unroll
  for (int i = 0; i < kLaneTokens; ++i) {
    const int64_t token = first + LaneToken(threadIdx.x % kWarp, i);
    in |= (token >= group.middle_begin && token < group.middle_end ? 1u : 0u) << i;
  }
  return in;
}

// Keys of tokens: the larger the better. Whole warps call Open for a block of the middle, then Load
// for its heads, which gives the keys of the lane's tokens and flags of the tokens that take part.

// By score. NaN is worst.
class ScoreKeys {
 public:
  __device__ ScoreKeys(const DeviceGroup& group, int heads) : group_(group), heads_(heads) {}
  __device__ void Open(int64_t b) { b_ = b, in_ = InMiddle(group_, b); }
  __device__ unsigned Load(int h, uint32_t (&key)[kLaneTokens]) const {
    const float* score = group_.scratch.score + (b_ * heads_ + h) * kBlockTokens;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      const float s = score[LaneToken(threadIdx.x % kWarp, i)];
      const uint32_t bits = __float_as_uint(__fadd_rn(s, 0.f));  // -0 as 0
      key[i] = s != s ? 0 : bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
    }
    return in_;
  }

 private:
  const DeviceGroup& group_;
  const int heads_;
  int64_t b_ = 0;
  unsigned in_ = 0;
};

// By the permanent random number of a token, the smallest first. Tokens in the masks `top`
// [blocks][G][kMaskWords], if there are any, take no part.
class UniformKeys {
 public:
  __device__ UniformKeys(const DeviceGroup& group, int heads, uint32_t refresh, const uint32_t* top)
      : group_(group), heads_(heads), refresh_(refresh), top_(top) {}
  __device__ void Open(int64_t b) {
    b_ = b, in_ = InMiddle(group_, b);
    const uint32_t first = static_cast<uint32_t>((FirstBlock(group_) + b) * kBlockTokens);
    const RandomKey& from = group_.key;
#pragma unroll
    for (int run = 0; run < kLaneTokens / 4; ++run) {
      const uint32_t counter = TokenCounter(first + LaneToken(threadIdx.x % kWarp, 4 * run));
      const Philox4 r = Philox({{counter, Epoch(counter, group_.step, refresh_), from.stream,
                                 static_cast<uint32_t>(RandomUse::kSelect)}},
                               from.key0, from.key1);
      // Only 23 bits are in u (UnitFloat).
#pragma unroll
      for (int i = 0; i < 4; ++i) key_[4 * run + i] = ~(r.word[i] >> 9 << 9);
    }
  }
  __device__ unsigned Load(int h, uint32_t (&key)[kLaneTokens]) const {
    unsigned in = in_;
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i) {
      const int lane = threadIdx.x % kWarp;
      key[i] = key_[i];
      if (top_ == nullptr) continue;
      const uint32_t word = LoadL2(top_ + (b_ * heads_ + h) * kMaskWords + LaneWord(lane, i));
      in &= ~((word >> LaneBit(lane, i) & 1u) << i);
    }
    return in;
  }

 private:
  const DeviceGroup& group_;
  const int heads_;
  const uint32_t refresh_;
  const uint32_t* const top_;
  int64_t b_ = 0;
  unsigned in_ = 0;
  uint32_t key_[kLaneTokens] = {};
};

// At the start of a team's dynamic shared memory while it ranks: per head how many are sought (at
// least one), the key of the last of them, how many with that key are taken, and how many have it.
struct Ranks {
  uint32_t want[kMaxDeviceGroup], last[kMaxDeviceGroup], taken[kMaxDeviceGroup],
      tied[kMaxDeviceGroup];
};
template <int kHeads>
__device__ Ranks& RanksOf(Team<kHeads>& team) {
  return *reinterpret_cast<Ranks*>(team.memory);
}

// Blocks of the middle that a warp of the team ranks: from here up to RunBegin(team, warp + 1).
template <int kHeads>
__device__ int64_t RunBegin(const Team<kHeads>& team, int warp) {
  return NumBlocks(team.group) * (team.rank * kWarps + warp) / (team.size * kWarps);
}

struct Bin {
  uint32_t bin, above, count;
};
// The highest bin of histogram [kDigitBins] with `rest` >= 1 counts in it and above, by a warp; how
// many lie above it and in it.
inline __device__ Bin FindBin(const uint32_t* histogram, uint32_t rest) {
  constexpr int kChunk = 4 * kWarp, kChunks = kDigitBins / kChunk;
  const int lane = threadIdx.x % kWarp;
  const auto bins = [&](int chunk, int at) {
    return LoadL2(reinterpret_cast<const uint4*>(histogram + chunk * kChunk) + at);
  };
  uint32_t total[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const uint4 x = bins(c, lane);
    total[c] = __reduce_add_sync(kAllLanes, x.x + x.y + x.z + x.w);
  }
  uint32_t above = 0;
  int chunk = -1;
#pragma unroll
  for (int c = kChunks - 1; c >= 0; --c) {
    if (chunk >= 0) continue;
    if (above + total[c] >= rest) {
      chunk = c;
    } else {
      above += total[c];
    }
  }
  if (chunk < 0) chunk = 0;
  // The first lane has the highest bins.
  const int at = kWarp - 1 - lane;
  const uint4 x = bins(chunk, at);
  const uint32_t bin[4] = {x.w, x.z, x.y, x.x}, sum = x.x + x.y + x.z + x.w;
  uint32_t before = sum;
#pragma unroll
  for (int o = 1; o < kWarp; o *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, before, o);
    if (lane >= o) before += other;
  }
  before += above - sum;
  Bin found{static_cast<uint32_t>(chunk * kChunk + 4 * at + 3), before, bin[0]};
#pragma unroll
  for (int i = 1; i < 4; ++i) {
    if (found.above + found.count < rest) {
      found = {found.bin - 1, found.above + found.count, bin[i]};
    }
  }
  const unsigned here =
      __ballot_sync(kAllLanes, found.above < rest && found.above + found.count >= rest);
  const int source = here == 0 ? 0 : __ffs(static_cast<int>(here)) - 1;
  return {__shfl_sync(kAllLanes, found.bin, source), __shfl_sync(kAllLanes, found.above, source),
          __shfl_sync(kAllLanes, found.count, source)};
}

// Fills ranks.last, taken and tied of every head for ranks.want. Holds kDigits + 1 barriers.
template <int kHeads, class Keys>
__device__ __noinline__ void FindLast(Team<kHeads>& team, Keys& keys) {
  const GroupScratch& w = team.group.scratch;
  Ranks& ranks = RanksOf(team);
  const int heads = team.heads(), tid = threadIdx.x, warp = tid / kWarp, lane = tid % kWarp;
  // [at_once][kDigitBins]
  uint32_t* bins = reinterpret_cast<uint32_t*>(team.memory + sizeof(Ranks));
  const int bytes = RowsBytes<kHeads>(team.p.storage.host.row, team.p.storage.tiles_in_flight);
  const int at_once = min(heads, (bytes - static_cast<int>(sizeof(Ranks))) / (4 * kDigitBins));
  for (int64_t i = int64_t{team.rank} * kThreads + tid; i < int64_t{kDigits} * heads * kDigitBins;
       i += int64_t{team.size} * kThreads) {
    w.histogram[i] = 0;
  }
  for (int h = tid; h < heads; h += kThreads) {
    ranks.last[h] = 0;
    ranks.taken[h] = ranks.want[h];
  }
  team.Sync();
  for (int digit = 0; digit < kDigits; ++digit) {
    const int shift = DigitShift(digit);
    const uint32_t known = digit == 0 ? 0 : ~0u << DigitShift(digit - 1);
    uint32_t* histogram = w.histogram + int64_t{digit} * heads * kDigitBins;
    for (int first = 0; first < heads; first += at_once) {
      const int now = min(at_once, heads - first);
      for (int i = tid; i < now * kDigitBins; i += kThreads) bins[i] = 0;
      __syncthreads();
      for (int64_t b = RunBegin(team, warp); b < RunBegin(team, warp + 1); ++b) {
        keys.Open(b);
        for (int h = 0; h < now; ++h) {
          uint32_t key[kLaneTokens];
          const unsigned in = keys.Load(first + h, key);
          const uint32_t last = ranks.last[first + h];
#pragma unroll
          for (int i = 0; i < kLaneTokens; ++i) {
            if ((in >> i & 1) == 0 || ((key[i] ^ last) & known) != 0) continue;
            atomicAdd(bins + h * kDigitBins + (key[i] >> shift) % kDigitBins, 1u);
          }
        }
      }
      __syncthreads();
      for (int i = tid; i < now * kDigitBins; i += kThreads) {
        if (bins[i] > 0) atomicAdd(histogram + int64_t{first} * kDigitBins + i, bins[i]);
      }
      __syncthreads();
    }
    team.Sync();
    for (int h = warp; h < heads; h += kWarps) {
      const Bin bin = FindBin(histogram + int64_t{h} * kDigitBins, ranks.taken[h]);
      __syncwarp();
      if (lane > 0) continue;
      ranks.last[h] |= bin.bin << shift;
      ranks.taken[h] -= bin.above;
      ranks.tied[h] = bin.count;
    }
    __syncthreads();
  }
}

// Some of the tokens with the last key are left out. Counts for each head how many such tokens the
// warps before this one have, to before [G]. Holds a barrier.
template <int kHeads, class Keys>
__device__ void CountTies(Team<kHeads>& team, Keys& keys, uint32_t* before) {
  const GroupScratch& w = team.group.scratch;
  const Ranks& ranks = RanksOf(team);
  const int heads = team.heads(), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int place = team.rank * kWarps + warp;
  for (int h = lane; h < heads; h += kWarp) before[h] = 0;
  __syncwarp();
  for (int64_t b = RunBegin(team, warp); b < RunBegin(team, warp + 1); ++b) {
    keys.Open(b);
    for (int h = 0; h < heads; ++h) {
      uint32_t key[kLaneTokens];
      const unsigned in = keys.Load(h, key);
      unsigned count = 0;
#pragma unroll
      for (int i = 0; i < kLaneTokens; ++i) count += (in >> i & 1) != 0 && key[i] == ranks.last[h];
      count = __reduce_add_sync(kAllLanes, count);
      if (lane == 0) before[h] += count;
    }
  }
  __syncwarp();
  for (int h = lane; h < heads; h += kWarp) w.ties[int64_t{place} * heads + h] = before[h];
  team.Sync();
  for (int h = 0; h < heads; ++h) {
    unsigned count = 0;
    for (int i = lane; i < place; i += kWarp) count += LoadL2(w.ties + int64_t{i} * heads + h);
    count = __reduce_add_sync(kAllLanes, count);
    if (lane == 0) before[h] = count;
  }
  __syncwarp();
}

// Sets masks [blocks][G][kMaskWords] to the best tokens that FindLast found. more: the masks hold some
// of these already, and are set to the rest.
template <int kHeads, class Keys>
__device__ __noinline__ void SelectBest(Team<kHeads>& team, Keys& keys, uint32_t* masks,
                                        bool more) {
  const Ranks& ranks = RanksOf(team);
  const int heads = team.heads(), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  // Tied tokens that precede what the warp looks at, per head.
  uint32_t* before = reinterpret_cast<uint32_t*>(team.memory + sizeof(Ranks)) + warp * heads;
  bool cut = false;  // the same in the whole team
  for (int h = 0; h < heads; ++h) cut = cut || ranks.taken[h] < ranks.tied[h];
  if (cut) CountTies(team, keys, before);
  for (int64_t b = RunBegin(team, warp); b < RunBegin(team, warp + 1); ++b) {
    keys.Open(b);
    for (int h = 0; h < heads; ++h) {
      uint32_t key[kLaneTokens];
      const unsigned in = keys.Load(h, key);
      unsigned best = 0, tied = 0;
#pragma unroll
      for (int i = 0; i < kLaneTokens; ++i) {
        if ((in >> i & 1) == 0) continue;
        best |= (key[i] > ranks.last[h] ? 1u : 0u) << i;
        tied |= (key[i] == ranks.last[h] ? 1u : 0u) << i;
      }
      if (ranks.taken[h] < ranks.tied[h]) {
        const BlockMask ties(tied);
        const uint32_t first = before[h];
#pragma unroll
        for (int i = 0; i < kLaneTokens; ++i) {
          if (first + ties.Before(lane, i) >= ranks.taken[h]) tied &= ~(1u << i);
        }
        __syncwarp();
        if (lane == 0) before[h] = first + ties.Count();
        __syncwarp();
      }
      const BlockMask mask(best | tied);
      if (lane >= kMaskWords) continue;
      uint32_t* to = masks + (b * heads + h) * kMaskWords + lane;
      *to = more ? mask.Word(lane) & ~*to : mask.Word(lane);
    }
  }
}

// Lists the tokens that the masks of any head hold, in ascending order and with their rows, as the
// team's list; returns their number. Adds to shared.count the tokens that no list had before (all of
// them if `fresh`), and to shared.fetched the rows that are not in the hot set. The other thread
// blocks see this block's part after a barrier.
template <int kHeads>
__device__ __noinline__ int64_t ListMasked(Team<kHeads>& team, const uint32_t* masks, bool fresh) {
  constexpr int kBlocks = kWarp / kMaskWords;  // that a warp looks at together
  const GroupScratch& w = team.group.scratch;
  const int heads = team.heads(), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  __syncthreads();
  const int64_t begin = RunBegin(team, warp), end = RunBegin(team, warp + 1);
  const auto listed = [&](int64_t b) {  // word lane % kMaskWords of any head
    uint32_t any = 0;
    for (int h = 0; b < end && h < heads; ++h) {
      any |= LoadL2(masks + (b * heads + h) * kMaskWords + lane % kMaskWords);
    }
    return any;
  };
  unsigned kept = 0, added = 0;
  for (int64_t b = begin + lane / kMaskWords; b < end; b += kBlocks) {
    const uint32_t any = listed(b);
    uint32_t* seen = w.seen + b * kMaskWords + lane % kMaskWords;  // this thread's alone
    const uint32_t old = fresh ? 0 : *seen;
    *seen = old | any;
    kept += __popc(any), added += __popc(any & ~old);
  }
  __syncwarp();
  kept = __reduce_add_sync(kAllLanes, kept), added = __reduce_add_sync(kAllLanes, added);
  if (lane == 0) atomicAdd(&team.shared.count, static_cast<int32_t>(added));
  const ListPlace place = team.PlaceOnList(0, static_cast<int32_t>(kept));
  int64_t to = place.warp;
  const uint32_t first_token = static_cast<uint32_t>(FirstBlock(team.group) * kBlockTokens);
  for (int64_t b = begin + lane / kMaskWords; b - lane / kMaskWords < end; b += kBlocks) {
    uint32_t any = listed(b);
    int upto = __popc(any);
    const int here = upto;
#pragma unroll
    for (int o = 1; o < kWarp; o *= 2) {
      const int other = __shfl_up_sync(kAllLanes, upto, o);
      if (lane >= o) upto += other;
    }
    int64_t at = to + upto - here;
    const uint32_t token =
        first_token + static_cast<uint32_t>(b) * kBlockTokens + lane % kMaskWords * kWarp;
    for (; any != 0; any &= any - 1) w.token[at++] = token + __ffs(static_cast<int>(any)) - 1;
    to += __shfl_sync(kAllLanes, upto, kWarp - 1);
  }
  ResolveListed(team, place.block, place.in_block);
  return place.end;
}

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_RANK_CUH_
