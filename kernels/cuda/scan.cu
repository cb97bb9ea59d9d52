// Scan of the index: predicted scores of every middle token for every head of its group, as fp16
// estimates relative to the largest of their block (kernels/cpu/scan.h has the definition). A warp
// takes a block of 256 tokens, 32 at a time: tensor cores multiply their codes with up to 8 heads'
// queries. For policies with a ranking the scores are left as they are; with IndexKind::kExact and
// kExternal they are there (exact.cu, external.cu).
#include <cmath>

#include "kernels/cuda/stages.h"
#include "kernels/cuda/vocabulary.cuh"
#include "kernels/sampling.h"

namespace vattn::cuda {
namespace {

constexpr int kScanThreads = 256;
constexpr int kScanWarps = kScanThreads / kWarp;
// Thread blocks of a multiprocessor: few warps, but with registers for the loads under way.
constexpr int kScanBlocks = 2;
constexpr int kPartTokens = 32;  // of a warp at a time: two tiles
constexpr int kParts = kBlockTokens / kPartTokens;
// Lanes that share a row of a matrix product: lane = 4 * row + place.
constexpr int kQuad = 4;

// Code words of a token by precision (kernels/geometry.h). A word holds 1, 2, 4 or 8 runs of 4
// dimensions.
struct Words {
  int words8, words4, words2, words1;

  __device__ int all() const { return words8 + words4 + words2 + words1; }
  __device__ int Runs(int word) const {
    return word < words8 ? 1 : word < words8 + words4 ? 2 : word < words8 + words4 + words2 ? 4 : 8;
  }
  __device__ int FirstRun(int word) const {
    const int over8 = word - words8, over4 = over8 - words4, over2 = over4 - words2;
    if (over8 < 0) return word;
    if (over4 < 0) return words8 + 2 * over8;
    return words8 + 2 * words4 + (over2 < 0 ? 4 * over4 : 4 * words2 + 8 * over2);
  }
  // Place q of a quad takes words q, 4 + q, 8 + q, ...: of the i-th four, the most runs in one.
  __device__ int MostRuns(int i) const { return Runs(min(all(), kQuad * (i + 1)) - 1); }
};

// exp(x) for x <= 0 by the operations of PowerOf2 in kernels/cpu/scan.cc, one by one. Adding and
// subtracting kRound rounds to the nearest integer, and leaves its low bits where the exponent needs
// them.
__device__ float ExpNegative(float x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23
  const float y = fmaxf(__fmul_rn(x, kLog2E), -30.f);
  const float r = __fadd_rn(y, kRound);
  const float f = __fsub_rn(y, __fsub_rn(r, kRound));
  float p = fmaf(f, kPower4, kPower3);
  p = fmaf(f, p, kPower2);
  p = fmaf(f, p, kPower1);
  p = fmaf(f, p, 1.f);
  const float e = __int_as_float(__float_as_int(p) + (__float_as_int(r) << 23));
  return y > -29.f ? e : 0;
}

// acc += codes of 16 tokens times queries of 8 heads over two runs a lane. Lane 4 g + q: low, high
// are rows g and g + 8 of the codes' runs 0 and 1, b the same runs of head g's query; acc: rows g,
// g, g + 8, g + 8 with heads 2 q, 2 q + 1 (mma.m16n8k32).
__device__ void Multiply(int (&acc)[4], uint32_t low0, uint32_t high0, uint32_t low1,
                         uint32_t high1, int32_t b0, int32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
      "%9}, "
      "{%0, %1, %2, %3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(low0), "r"(high0), "r"(low1), "r"(high1), "r"(b0), "r"(b1));
}

// What a lane does with word 4 i + place of its tokens, and its part of head `row`'s query.
template <int kRuns>
struct WordPlan {
  int bits;
  uint32_t mask;
  int32_t query[kRuns];  // runs of the word, 0 where there is none
};
template <int kRuns>
__device__ WordPlan<kRuns> PlanWord(const Words& words, const PackedQueries& q, int i) {
  const int lane = threadIdx.x % kWarp, word = kQuad * i + lane % kQuad;
  const int runs = word < words.all() ? words.Runs(word) : 0;
  WordPlan<kRuns> plan;
  plan.bits = runs <= 1 ? 8 : runs == 2 ? 4 : runs == 4 ? 2 : 1;
  plan.mask = runs <= 1   ? 0xffffffffu
              : runs == 2 ? 0x0f0f0f0fu
              : runs == 4 ? 0x03030303u
                          : 0x01010101u;
#pragma unroll
  for (int r = 0; r < kRuns; ++r)
    plan.query[r] = r < runs ? q.run[words.FirstRun(word) + r][lane / kQuad] : 0;
  return plan;
}

// acc[0]: tokens 4 g, 4 g + 1 of the 32, acc[1]: 4 g + 2, 4 g + 3. `most` runs are looked at.
template <int kRuns>
__device__ void AddWord(const uint4& word, const WordPlan<kRuns>& plan, int most,
                        int (&acc)[2][4]) {
  const uint32_t w[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
  for (int run = 0; run < kRuns; run += 2) {
    if (run >= most) break;
    uint32_t low[4], high[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      low[t] = (w[t] >> (plan.bits * run)) & plan.mask;
      high[t] = run + 1 < most ? (w[t] >> (plan.bits * (run + 1))) & plan.mask : 0;
    }
    Multiply(acc[0], low[0], low[1], high[0], high[1], plan.query[run], plan.query[run + 1]);
    Multiply(acc[1], low[2], low[3], high[2], high[3], plan.query[run], plan.query[run + 1]);
  }
}

// How the scores of 32 tokens lie over the lanes of a warp: kTokens tokens from FirstToken() on for
// kOwn heads from FirstHead() on.
template <int kHeads>
struct Spread {
  static constexpr int kOwn = kHeads == 1 ? 1 : 2;
  static constexpr int kTokens =
      kHeads * kPartTokens / kWarp / kOwn > 0 ? kHeads* kPartTokens / kWarp / kOwn : 1;
  using Scores = float[kParts][kTokens][kOwn];  // of a block
  // Lanes of a quad with a head
  static constexpr int kSharing = kQuad * kOwn / (kHeads > 2 ? kHeads : kOwn);

  static __device__ int Row() { return threadIdx.x % kWarp / kQuad; }
  static __device__ int Place() { return threadIdx.x % kQuad; }
  static __device__ int FirstHead() {
    return kHeads == 8 ? 2 * Place() : kHeads == 4 ? 2 * (Place() % 2) : 0;
  }
  static __device__ int FirstToken() {
    return 4 * Row() + (kHeads == 8 ? 0 : kHeads == 4 ? 2 * (Place() / 2) : Place());
  }

  // Sums as Multiply leaves them, to the lanes that go on with them.
  static __device__ void Share(const int (&acc)[2][4], int (&out)[kTokens][kOwn]) {
    if constexpr (kHeads == 8) {
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        out[t][0] = acc[t / 2][t % 2 * 2];
        out[t][1] = acc[t / 2][t % 2 * 2 + 1];
      }
    } else {
      // Places 2 and 3 have heads that are not there: they take the second half of the tokens.
      int half[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (kOwn == 1 && i % 2 == 1) continue;
        const int other = __shfl_xor_sync(kAllLanes, acc[1][i], 2);
        half[i / 2][i % 2] = Place() < 2 ? acc[0][i] : other;
      }
      // And with one or two heads, places 1 and 3 the odd tokens.
#pragma unroll
      for (int h = 0; h < kOwn; ++h) {
        if constexpr (kHeads == 4) {
          out[0][h] = half[0][h], out[1][h] = half[1][h];
        } else {
          const int other = __shfl_xor_sync(kAllLanes, half[1][h], 1);
          out[0][h] = Place() % 2 == 0 ? half[0][h] : other;
        }
      }
    }
  }

  // Over all lanes that have tokens of the same head.
  template <class T, class F>
  static __device__ T Reduce(T x, F&& f) {
#pragma unroll
    for (int o = kQuad; o < kWarp; o *= 2) x = f(x, __shfl_xor_sync(kAllLanes, x, o));
    if constexpr (kHeads <= 4) x = f(x, __shfl_xor_sync(kAllLanes, x, 2));
    if constexpr (kHeads <= 2) x = f(x, __shfl_xor_sync(kAllLanes, x, 1));
    return x;
  }
};

// The codes of 256 tokens, which lie together in the library's own pool, and tile by tile in an
// engine's.
template <bool kPaged>
struct BlockCodes {
  const std::byte* codes = nullptr;

  static __device__ BlockCodes At(const StepParams& p, const DeviceGroup& group, int64_t block) {
    return {p.storage.codes + group.blocks[block] * p.storage.code_block_bytes};
  }
  __device__ bool there() const { return codes != nullptr; }
  __device__ const std::byte* Tile(int tile, int all) const { return codes + tile * all * 64; }
};
template <>
struct BlockCodes<true> {
  const StepParams* p = nullptr;
  const DeviceGroup* group = nullptr;
  int64_t token = 0;  // the first one

  static __device__ BlockCodes At(const StepParams& p, const DeviceGroup& group, int64_t block) {
    return {&p, &group, block * kBlockTokens};
  }
  __device__ bool there() const { return p != nullptr; }
  __device__ const std::byte* Tile(int tile, int all) const {
    const DeviceStorage& s = p->storage;
    // The table may end with the middle.
    const TokenPlace at =
        PlaceOf(s.host.block, min(token + tile * kTileTokens, group->middle_end - kTileTokens));
    return s.codes + group->blocks[at.block] * s.code_block_bytes +
           (int64_t{group->kv_head} * s.host.block.tokens + at.in_block) * (4 * all);
  }
};

// Where a lane finds its tile of part `part` of a block, and there its four tokens' words kQuad * i +
// place.
template <class Codes>
__device__ const std::byte* TileAt(const Codes& codes, int all, int part) {
  return codes.Tile(2 * part + static_cast<int>(threadIdx.x) % kWarp / 16, all);
}
__device__ const uint4* WordsAt(const std::byte* tile, int i) {
  const int lane = threadIdx.x % kWarp, word = kQuad * i + lane % kQuad;
  return reinterpret_cast<const uint4*>(tile + word * 64 + lane / kQuad % 4 * 16);
}

// The next parts' words of a lane, on their way while it works; across blocks, so that the end of
// one does not leave the memory idle.
template <int kHeads, int kFours>
struct WordQueue {
  static constexpr int kAhead = kHeads <= 4 ? 4 : 2;
  uint4 word[kAhead][kFours > 0 ? kFours : 1];

  template <class Codes>
  __device__ void Fetch(const Codes& codes, int all, int part) {
    if (!codes.there()) return;
    const std::byte* const tile = TileAt(codes, all, part);
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      if (kQuad * i + static_cast<int>(threadIdx.x) % kQuad < all)
        word[part % kAhead][i] = __ldcs(WordsAt(tile, i));
    }
  }
};

// Scores of one block of 256 tokens for up to kHeads heads, by one warp. Tokens [begin, end) of the
// block are in the middle. kFours > 0: a token has 4 * kFours code words, `plans` says what a lane
// does with each, and the first parts are already in `queue`; the loop then fetches the parts of
// `following`, unless that is not there. kFours == 0: any number of words, and nothing is fetched ahead. No
// word has more than kRuns runs. has_outliers: a token whose code is all 0 gets kOutlierScore. Returns
// whether there may be such tokens, NaN, or tokens outside of the middle, whose score is -inf; the same in
// all lanes.
template <int kHeads, int kFours, int kRuns, class Codes>
__device__ bool ScoreBlock(const Codes& codes, const Codes& following,
                           WordQueue<kHeads, kFours>& queue, const Words& words,
                           const WordPlan<kRuns>* plans, const PackedQueries& q, bool has_outliers,
                           int begin, int end, typename Spread<kHeads>::Scores& score) {
  using Lanes = Spread<kHeads>;
  constexpr int kOwn = Lanes::kOwn, kTokens = Lanes::kTokens;
  const int place = Lanes::Place(), all = words.all();
  float scale[kOwn], offset[kOwn];
#pragma unroll
  for (int h = 0; h < kOwn; ++h) {
    scale[h] = q.scale[Lanes::FirstHead() + h];
    offset[h] = q.offset[Lanes::FirstHead() + h];
  }
  unsigned outliers = 0;  // bit 4 part + t: of the row's t-th token in a part
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    int acc[2][4] = {};
    uint4 bits = make_uint4(0, 0, 0, 0);  // of the row's four tokens
    const auto note = [&](const uint4& w) {
      bits.x |= w.x, bits.y |= w.y, bits.z |= w.z, bits.w |= w.w;
    };
    if constexpr (kFours > 0) {
      constexpr int kAhead = WordQueue<kHeads, kFours>::kAhead;
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        note(queue.word[part % kAhead][i]);
        AddWord(queue.word[part % kAhead][i], plans[i], words.MostRuns(i), acc);
      }
      queue.Fetch(part + kAhead < kParts ? codes : following, all, (part + kAhead) % kParts);
    } else {
      const std::byte* const tile = TileAt(codes, all, part);
      for (int i = 0; i * kQuad < all; ++i) {
        const uint4 none = make_uint4(0, 0, 0, 0);
        const uint4 word = kQuad * i + place < all ? __ldcs(WordsAt(tile, i)) : none;
        note(word);
        AddWord(word, PlanWord<kRuns>(words, q, i), words.MostRuns(i), acc);
      }
    }
    int sum[kTokens][kOwn];
    Lanes::Share(acc, sum);
    // A lane has seen a quarter of its row's words. Few parts have a quarter without a bit.
    const bool none = bits.x == 0 || bits.y == 0 || bits.z == 0 || bits.w == 0;
    if (has_outliers && __any_sync(kAllLanes, none)) {
      unsigned present = (bits.x != 0 ? 1 : 0) | (bits.y != 0 ? 2 : 0) | (bits.z != 0 ? 4 : 0) |
                         (bits.w != 0 ? 8 : 0);
      present |= __shfl_xor_sync(kAllLanes, present, 1);
      present |= __shfl_xor_sync(kAllLanes, present, 2);
      outliers |= (present ^ 0xfu) << (4 * part);
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int h = 0; h < kOwn; ++h)
        score[part][t][h] = fmaf(static_cast<float>(sum[t][h]), scale[h], offset[h]);
    }
  }
  bool mixed = outliers != 0;
#pragma unroll
  for (int h = 0; h < kOwn; ++h) mixed = mixed || !IsFinite(scale[h] + offset[h]);
  if (!__any_sync(kAllLanes, mixed) && begin == 0 && end == kBlockTokens) return false;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int in_row = Lanes::FirstToken() % 4 + t;
      const int token = part * kPartTokens + Lanes::FirstToken() + t;
      const bool outlier = (outliers >> (4 * part + in_row) & 1) != 0,
                 there = token >= begin && token < end;
#pragma unroll
      for (int h = 0; h < kOwn; ++h)
        score[part][t][h] = !there ? -INFINITY : outlier ? kOutlierScore : score[part][t][h];
    }
  }
  return true;
}

// Calls f(score, place in [heads][256]) for the scores of a lane.
template <int kHeads, class F>
__device__ void ForEachScore(typename Spread<kHeads>::Scores& score, int heads, F&& f) {
  using Lanes = Spread<kHeads>;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int t = 0; t < Lanes::kTokens; ++t) {
#pragma unroll
      for (int h = 0; h < Lanes::kOwn; ++h) {
        const int head = Lanes::FirstHead() + h;
        if (head < heads)
          f(score[part][t][h], head * kBlockTokens + part * kPartTokens + Lanes::FirstToken() + t);
      }
    }
  }
}

// Estimates of a block from its scores, by the same warp. mixed: some scores may be
// -inf, NaN or kOutlierScore.
template <int kHeads>
__device__ void EstimateBlock(const typename Spread<kHeads>::Scores& score, bool mixed, int heads,
                              uint16_t* estimate, float* shift, float* mass) {
  using Lanes = Spread<kHeads>;
  constexpr int kOwn = Lanes::kOwn, kTokens = Lanes::kTokens;
  const int place = Lanes::Place();
#pragma unroll
  for (int h = 0; h < kOwn; ++h) {
    const int head = Lanes::FirstHead() + h;
    float most = -INFINITY;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) most = fmaxf(most, score[part][t][h]);
    }
    most = Lanes::Reduce(most, [](float x, float y) { return fmaxf(x, y); });
    unsigned sum = 0;  // in units of 2^-24, in which every estimate is whole
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      alignas(8) __half rounded[kTokens];
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float e = fmaxf(ExpNegative(__fsub_rn(score[part][t][h], most)), kLeastEstimate);
        rounded[t] = __float2half_rn(e);
        sum += static_cast<unsigned>(__half2float(rounded[t]) * 0x1p24f);
      }
      if (mixed) {
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          const float s = score[part][t][h];
          const bool there = s > -INFINITY, outlier = s == kOutlierScore;
          if (there && !outlier) continue;
          sum -= static_cast<unsigned>(__half2float(rounded[t]) * 0x1p24f);
          rounded[t] = __float2half_rn(outlier ? kOutlierEstimate : 0);
        }
      }
      if (head >= heads) continue;
      uint16_t* out = estimate + head * kBlockTokens + part * kPartTokens + Lanes::FirstToken();
      if constexpr (kTokens == 4) {
        *reinterpret_cast<uint2*>(out) = *reinterpret_cast<const uint2*>(rounded);
      } else if constexpr (kTokens == 2) {
        *reinterpret_cast<__half2*>(out) = __halves2half2(rounded[0], rounded[1]);
      } else {
        *out = __half_as_ushort(rounded[0]);
      }
    }
    // A warp's sum may reach 2^32, so its halves are added apart.
    const auto add = [](unsigned x, unsigned y) { return x + y; };
    const unsigned low = Lanes::Reduce(sum & 0xfff, add), high = Lanes::Reduce(sum >> 12, add);
    if (Lanes::Row() == 0 && place < kQuad / Lanes::kSharing && head < heads) {
      shift[head] = most;
      mass[head] = fmaf(static_cast<float>(high), 0x1p-12f, static_cast<float>(low) * 0x1p-24f);
    }
  }
}

// k8, k4, k2, k1 >= 0: words of each precision known at compile time. k8 < 0: none is, but for k1 =
// 0. kRanked: scores go to scratch.score. kPaged: codes lie in an engine's pool.
template <int kHeads, int k8, int k4, int k2, int k1, bool kRanked, bool kPaged>
__global__ void __launch_bounds__(kScanThreads, kScanBlocks)
    ScanKernel(const __grid_constant__ StepParams p) {
  constexpr int kFours = k8 < 0 ? 0 : (k8 + k4 + k2 + k1 + kQuad - 1) / kQuad;
  constexpr int kRuns = k1 == 0 ? 4 : 8;
  const CodeLayout& code = p.storage.host.code;
  WordQueue<kHeads, kFours> queue = {};
  const Words words = k8 < 0
                          ? Words{code.dims8 / 4, code.dims4 / 8, code.dims2 / 16, code.dims1 / 32}
                          : Words{k8, k4, k2, k1};
  if (blockIdx.x == 0 && threadIdx.x == 0) StampTime(p, TimelinePoint::kPrepared);
  // Warps take contiguous runs of the blocks of all groups.
  const int64_t all = ScanBlocks(p), warps = static_cast<int64_t>(gridDim.x) * kScanWarps;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kScanWarps + threadIdx.x / kWarp;
  const int64_t from = all * warp / warps, to = all * (warp + 1) / warps;
  if (from >= to) return;
  int g = GroupOf(p, from);
  for (int64_t at = from; at < to;) {
    const DeviceGroup& group = p.groups[g];
    const int64_t last = min(to, group.first_block + NumBlocks(group));
    if (last <= at) {
      ++g;
      continue;
    }
    // Queries are packed for one segment of the index. `before` added to a block's number in the scan
    // gives its number in the sequence.
    const int64_t before = FirstBlock(group) - group.first_block;
    const int segment = SegmentAt(group, at + before);
    const int64_t end = SegmentEnd(group, segment, last + before) - before;
    const PackedQueries* const queries =
        group.scratch.packed + int64_t{segment} * ((p.group_heads + 7) / 8);
    for (int first = 0; first < p.group_heads; first += kHeads) {
      const PackedQueries& packed = queries[first / 8];
      WordPlan<kRuns> plans[kFours > 0 ? kFours : 1];
#pragma unroll
      for (int i = 0; i < kFours; ++i) plans[i] = PlanWord<kRuns>(words, packed, i);
      using Codes = BlockCodes<kPaged>;
      const auto codes = [&](int64_t item) { return Codes::At(p, group, item + before); };
#pragma unroll
      for (int part = 0; part < queue.kAhead; ++part) queue.Fetch(codes(at), words.all(), part);
      for (int64_t item = at; item < end; ++item) {
        const int64_t b = item - group.first_block, token = (FirstBlock(group) + b) * kBlockTokens;
        const int64_t out = b * p.group_heads + first;
        const int heads = min(kHeads, p.group_heads - first);
        typename Spread<kHeads>::Scores score;
        const bool mixed = ScoreBlock<kHeads, kFours, kRuns>(
            codes(item), item + 1 < end ? codes(item + 1) : Codes{}, queue, words, plans, packed,
            code.kind == IndexKind::kBalanced,
            static_cast<int>(max(group.middle_begin - token, int64_t{0})),
            static_cast<int>(min(group.middle_end - token, int64_t{kBlockTokens})), score);
        if constexpr (kRanked) {
          float* to_score = group.scratch.score + out * kBlockTokens;
          ForEachScore<kHeads>(score, heads, [&](float s, int i) {
            // In a ranking outliers come first.
            to_score[i] = s == kOutlierScore ? -kOutlierScore : s;
          });
        } else {
          EstimateBlock<kHeads>(score, mixed, heads, group.scratch.estimate + out * kBlockTokens,
                                group.scratch.shift + out, group.scratch.mass + out);
        }
      }
    }
    at = end;
  }
}

// Estimates from the scores in scratch.score, a warp a block.
template <int kHeads>
__global__ void __launch_bounds__(kScanThreads, kScanBlocks)
    EstimateKernel(const __grid_constant__ StepParams p) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kScanWarps;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kScanWarps + threadIdx.x / kWarp;
       item < ScanBlocks(p); item += warps) {
    const DeviceGroup& group = p.groups[GroupOf(p, item)];
    for (int first = 0; first < p.group_heads; first += kHeads) {
      const int64_t out = (item - group.first_block) * p.group_heads + first;
      const int heads = min(kHeads, p.group_heads - first);
      const float* from = group.scratch.score + out * kBlockTokens;
      typename Spread<kHeads>::Scores score = {};
      ForEachScore<kHeads>(score, heads, [&](float& s, int i) { s = from[i]; });
      EstimateBlock<kHeads>(score, true, heads, group.scratch.estimate + out * kBlockTokens,
                            group.scratch.shift + out, group.scratch.mass + out);
    }
  }
}

template <int kHeads, bool kRanked>
void LaunchScan(const StepParams& p, int blocks, cudaStream_t stream) {
  const CodeLayout& c = p.storage.host.code;
  const bool common = c.dims8 == 0 && c.dims4 == 40 && c.dims2 == 48;  // 32 bytes, 128 dimensions
  if (p.paged && common) {
    ScanKernel<kHeads, 0, 5, 3, 0, kRanked, true><<<blocks, kScanThreads, 0, stream>>>(p);
  } else if (p.paged) {
    ScanKernel<kHeads, -1, -1, -1, 0, kRanked, true><<<blocks, kScanThreads, 0, stream>>>(p);
  } else if (common) {
    ScanKernel<kHeads, 0, 5, 3, 0, kRanked, false><<<blocks, kScanThreads, 0, stream>>>(p);
  } else if (c.dims1 == 256) {
    ScanKernel<kHeads, 0, 0, 0, 8, kRanked, false><<<blocks, kScanThreads, 0, stream>>>(p);
  } else if (c.dims1 > 0) {
    ScanKernel<kHeads, -1, -1, -1, -1, kRanked, false><<<blocks, kScanThreads, 0, stream>>>(p);
  } else {
    ScanKernel<kHeads, -1, -1, -1, 0, kRanked, false><<<blocks, kScanThreads, 0, stream>>>(p);
  }
}

template <int kHeads>
int Launch(const StepParams& p, int multiprocessors, cudaStream_t stream) {
  const int blocks = multiprocessors * kScanBlocks;
  if (ScoredBeforeScan(p.promise.index)) {
    EstimateKernel<kHeads><<<blocks, kScanThreads, 0, stream>>>(p);
  } else if (p.promise.policy != Policy::kVerified) {
    LaunchScan<kHeads, true>(p, blocks, stream);
  } else {
    LaunchScan<kHeads, false>(p, blocks, stream);
  }
  return cudaGetLastError();
}

}  // namespace

int Scan(const StepParams& p, int multiprocessors, Stream stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream.handle);
  if (p.group_heads <= 1) return Launch<1>(p, multiprocessors, s);
  if (p.group_heads <= 2) return Launch<2>(p, multiprocessors, s);
  if (p.group_heads <= 4) return Launch<4>(p, multiprocessors, s);
  return Launch<8>(p, multiprocessors, s);
}

}  // namespace vattn::cuda
