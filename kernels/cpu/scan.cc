#include "kernels/cpu/scan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/cpu/index.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/workers.h"
#include "kernels/sampling.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/scan.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace vattn::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
using DI = hn::RebindToSigned<D>;
using VI = hn::Vec<DI>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));

// acc + the dot product of each lane's 4 unsigned bytes (at most 7 bits) with 4 signed bytes of q.
// kVnni: the processor has AVX512_VNNI, which this Highway's targets do not let the compiler use.
template <bool kVnni>
HWY_INLINE VI DotBytes(VI acc, VI codes, int32_t q) {
#if HWY_TARGET == HWY_AVX3
  const __m512i queries = _mm512_set1_epi32(q);
  if constexpr (kVnni) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.raw) : "v"(codes.raw), "v"(queries));
    return acc;
  }
  const __m512i pairs = _mm512_maddubs_epi16(codes.raw, queries);
  return VI{_mm512_add_epi32(acc.raw, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
#elif HWY_TARGET == HWY_AVX2
  const __m256i pairs = _mm256_maddubs_epi16(codes.raw, _mm256_set1_epi32(q));
  return VI{_mm256_add_epi32(acc.raw, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
#else
  const DI di;
  const VI byte = hn::Set(di, 0xFF);
  for (int i = 0; i < 4; ++i) {
    const VI level = hn::And(hn::ShiftRightSame(codes, 8 * i), byte);
    acc = hn::Add(acc, hn::Mul(level, hn::Set(di, static_cast<int8_t>(q >> (8 * i)))));
  }
  return acc;
#endif
}

bool HasVnni() {
#if HWY_TARGET == HWY_AVX3
  static const bool has = __builtin_cpu_supports("avx512vnni") != 0;
  return has;
#else
  return false;
#endif
}

// scores [heads][256] of kVectors vectors of tokens from `token` on: sums of several tiles at once
// hide the latency of a product. With kBalanced, a code of all 0 has kOutlierScore.
template <int kHeads, int kVectors, bool kVnni>
HWY_INLINE void ScoreVectors(const uint8_t* codes, const CodeLayout& layout, const PackedQueries& q,
                             int token, float* scores) {
  const D d;
  const DI di;
  const int words8 = layout.dims8 / 4, words4 = layout.dims4 / 8, words2 = layout.dims2 / 16;
  const int tile_words = layout.words() * kTileTokens;
  const int32_t* at[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int i = token + v * kLanes;
    at[v] =
        reinterpret_cast<const int32_t*>(codes) + i / kTileTokens * tile_words + i % kTileTokens;
  }
  const int32_t(*run)[8] = q.run;
  VI acc[kVectors][kHeads];
  for (int v = 0; v < kVectors; ++v) {
    for (int g = 0; g < kHeads; ++g) acc[v][g] = hn::Zero(di);
  }
  const auto add = [&](const VI* level, const int32_t* by) HWY_ATTR {
    for (int g = 0; g < kHeads; ++g) {
      for (int v = 0; v < kVectors; ++v) acc[v][g] = DotBytes<kVnni>(acc[v][g], level[v], by[g]);
    }
  };
  int word = 0;
  VI level[kVectors], any[kVectors];
  for (int v = 0; v < kVectors; ++v) any[v] = hn::Zero(di);
  const auto load = [&](int v) HWY_ATTR {
    const VI loaded = hn::LoadU(di, at[v] + word);
    any[v] = hn::Or(any[v], loaded);
    return loaded;
  };
  for (int w = 0; w < words8; ++w, word += kTileTokens, ++run) {
    for (int v = 0; v < kVectors; ++v) level[v] = load(v);
    add(level, run[0]);
  }
  const VI nibble = hn::Set(di, 0x0F0F0F0F);
  for (int w = 0; w < words4; ++w, word += kTileTokens, run += 2) {
    for (int v = 0; v < kVectors; ++v) level[v] = hn::And(load(v), nibble);
    add(level, run[0]);
    for (int v = 0; v < kVectors; ++v) {
      level[v] = hn::And(hn::ShiftRight<4>(hn::LoadU(di, at[v] + word)), nibble);
    }
    add(level, run[1]);
  }
  const VI pair = hn::Set(di, 0x03030303);
  for (int w = 0; w < words2; ++w, word += kTileTokens, run += 4) {
    for (int v = 0; v < kVectors; ++v) level[v] = hn::And(load(v), pair);
    add(level, run[0]);
    for (int v = 0; v < kVectors; ++v)
      level[v] = hn::And(hn::ShiftRight<2>(hn::LoadU(di, at[v] + word)), pair);
    add(level, run[1]);
    for (int v = 0; v < kVectors; ++v)
      level[v] = hn::And(hn::ShiftRight<4>(hn::LoadU(di, at[v] + word)), pair);
    add(level, run[2]);
    for (int v = 0; v < kVectors; ++v)
      level[v] = hn::And(hn::ShiftRight<6>(hn::LoadU(di, at[v] + word)), pair);
    add(level, run[3]);
  }
  const VI bit = hn::Set(di, 0x01010101);
  for (const int32_t(*const end)[8] = run + layout.dims1 / 4; run < end; word += kTileTokens) {
    for (int shift = 0; shift < 8; ++shift, ++run) {
      for (int v = 0; v < kVectors; ++v) {
        level[v] = hn::And(hn::ShiftRightSame(hn::LoadU(di, at[v] + word), shift), bit);
      }
      add(level, run[0]);
    }
  }
  const VI unmarked = hn::Set(di, layout.kind == IndexKind::kBalanced ? 0 : 1);
  for (int v = 0; v < kVectors; ++v) {
    const auto marked = hn::RebindMask(d, hn::Eq(hn::Or(any[v], unmarked), hn::Zero(di)));
    for (int g = 0; g < kHeads; ++g) {
      const auto s =
          hn::MulAdd(hn::ConvertTo(d, acc[v][g]), hn::Set(d, q.scale[g]), hn::Set(d, q.offset[g]));
      hn::StoreU(hn::IfThenElse(marked, hn::Set(d, kOutlierScore), s), d,
                 scores + g * kBlockTokens + token + v * kLanes);
    }
  }
}

// scores [heads][256] of tiles [first, last) of a block. On the way the same tiles of the block
// `soon` are fetched, if not null.
template <int kHeads, bool kVnni>
void ScoreTiles(const uint8_t* codes, const CodeLayout& layout, const PackedQueries& q, int first,
                int last, const uint8_t* soon, float* scores) {
  constexpr int kVectors = kLanes == kTileTokens ? 2 : 1;
  constexpr int kAtOnce = kVectors * kLanes;
  const int end = last * kTileTokens;
  int token = first * kTileTokens;
  for (; token + kAtOnce <= end; token += kAtOnce) {
    if (soon != nullptr) {
      const uint8_t* at = soon + token * layout.bytes();
      for (int i = 0; i < kAtOnce * layout.bytes(); i += 64) FetchSoon(at + i);
    }
    ScoreVectors<kHeads, kVectors, kVnni>(codes, layout, q, token, scores);
  }
  for (; token < end; token += kLanes)
    ScoreVectors<kHeads, 1, kVnni>(codes, layout, q, token, scores);
}

template <int kHeads>
void ScoreHeads(const uint8_t* codes, const CodeLayout& layout, const PackedQueries& q, int heads,
                int first, int last, const uint8_t* soon, float* scores) {
  if constexpr (kHeads > 1) {
    if (heads < kHeads)
      return ScoreHeads<kHeads - 1>(codes, layout, q, heads, first, last, soon, scores);
  }
  if (HasVnni()) return ScoreTiles<kHeads, true>(codes, layout, q, first, last, soon, scores);
  return ScoreTiles<kHeads, false>(codes, layout, q, first, last, soon, scores);
}

void ScoreCodes(const uint8_t* codes, const CodeLayout& layout, const PackedQueries& q, int heads,
                int first, int last, const uint8_t* soon, float* scores) {
  ScoreHeads<8>(codes, layout, q, heads, first, last, soon, scores);
}

// 2^y for y <= 0, with a relative error below 5e-5. Where 2^y is below 2^-29, -infinity included, the
// result is too.
HWY_INLINE hn::Vec<D> PowerOf2(hn::Vec<D> y) {
  const D d;
#if HWY_TARGET == HWY_AVX3
  const hn::Vec<D> f{_mm512_reduce_ps(y.raw, 0)};  // y less the nearest integer; 0 of an infinity
#else
  const DI di;
  y = hn::Max(y, hn::Set(d, -30.f));
  const auto n = hn::Round(y);
  const auto f = hn::Sub(y, n);
#endif
  auto p = hn::MulAdd(f, hn::Set(d, kPower4), hn::Set(d, kPower3));
  p = hn::MulAdd(f, p, hn::Set(d, kPower2));
  p = hn::MulAdd(f, p, hn::Set(d, kPower1));
  p = hn::MulAdd(f, p, hn::Set(d, 1.f));
#if HWY_TARGET == HWY_AVX3
  return hn::Vec<D>{_mm512_scalef_ps(p.raw, hn::Sub(y, f).raw)};
#else
  return hn::BitCast(d, hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(hn::ConvertTo(di, n))));
#endif
}

// Turns scores [256] into fp16 estimates [256] relative to the largest score, which it returns; *mass
// is the sum of the estimates. Only tokens outside the middle have estimate 0: all others must have a
// chance to be drawn.
template <bool kWhole>
float EstimateScores(const float* scores, uint16_t* estimate, float* mass) {
  const D d;
  const hn::Rebind<hwy::float16_t, D> half;
  auto most = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int i = 0; i < kBlockTokens; i += kLanes) most = hn::Max(most, hn::LoadU(d, scores + i));
  const float shift = hn::GetLane(hn::MaxOfLanes(d, most));
  const auto by = hn::Set(d, kLog2E), least = hn::Set(d, kLeastEstimate);
  auto sum = hn::Zero(d);
  for (int i = 0; i < kBlockTokens; i += kLanes) {
    const auto score = hn::LoadU(d, scores + i);
    auto e = hn::Max(PowerOf2(hn::Mul(hn::Sub(score, hn::Set(d, shift)), by)), least);
    e = hn::IfThenElse(hn::Eq(score, hn::Set(d, kOutlierScore)), hn::Set(d, kOutlierEstimate), e);
    if (!kWhole) {
      e = hn::IfThenElseZero(hn::Gt(score, hn::Set(d, -std::numeric_limits<float>::infinity())), e);
    }
    const auto rounded = hn::DemoteTo(half, e);
    hn::StoreU(rounded, half, reinterpret_cast<hwy::float16_t*>(estimate) + i);
    sum = hn::Add(sum, hn::Max(hn::PromoteTo(d, rounded), hn::Zero(d)));
  }
  *mass = hn::GetLane(hn::SumOfLanes(d, sum));
  return shift;
}

// whole: all tokens are in the middle.
float EstimateBlock(const float* scores, bool whole, uint16_t* estimate, float* mass) {
  return whole ? EstimateScores<true>(scores, estimate, mass)
               : EstimateScores<false>(scores, estimate, mass);
}

float HalfToFloat(uint16_t bits) {
  const D d;
  const hn::Rebind<hwy::float16_t, D> half;
  const hn::RebindToUnsigned<decltype(half)> du;
  return hn::GetLane(hn::PromoteTo(d, hn::BitCast(half, hn::Set(du, bits))));
}

}  // namespace vattn::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vattn::cpu {

HWY_EXPORT(ScoreCodes);
HWY_EXPORT(EstimateBlock);
HWY_EXPORT(HalfToFloat);

namespace {

constexpr int kTaskBlocks = 8;  // 2,048 tokens: small enough to share, large enough to pay

// One head's query: its projection y [dims] in int8 and what it takes to undo that.
void PackHead(const CodeLayout& code, const float* y, float offset, PackedQueries& out, int lane) {
  const int dims = code.dims();
  float most = 0;
  for (int j = 0; j < dims; ++j) most = std::max(most, std::abs(y[j]));
  const float scale = std::max(most / 127.f, kLeastDivisor);
  for (int r = 0; r < dims / 4; ++r) {
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) {
      const float level = std::nearbyint(std::max(std::min(127.f, y[4 * r + i] / scale), -127.f));
      word |= static_cast<uint32_t>(static_cast<uint8_t>(static_cast<int8_t>(level))) << (8 * i);
      offset += level * scale * code.middle(4 * r + i);
    }
    out.run[r][lane] = static_cast<int32_t>(word);
  }
  out.scale[lane] = scale;
  out.offset[lane] = offset;
}

// One head's query for codes that are signs. Only the signs of its projection are left too, so that the
// sum over dimensions is half of matches less mismatches.
void PackSigns(const CodeLayout& code, const float* y, float scale, float offset,
               PackedQueries& out, int lane) {
  for (int r = 0; r < code.runs(); ++r) {
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) {
      const bool positive = y[4 * r + i] >= 0;
      word |= (positive ? 0x01u : 0xffu) << (8 * i);
      offset -= .5f * (positive ? scale : -scale);
    }
    out.run[r][lane] = static_cast<int32_t>(word);
  }
  out.scale[lane] = scale;
  out.offset[lane] = offset;
}

const uint8_t* CodesOf(const Storage& s, const Group& group, int64_t token) {
  return reinterpret_cast<const uint8_t*>(CodesAt(s, group.blocks, group.kv_head, token));
}

// Whether the codes of 256 tokens lie together.
bool TogetherIn(const Storage& s) { return s.block.tokens % kBlockTokens == 0; }

// The codes of 256 tokens from `token` on, of which [begin, end) count: where they are, or, if
// they do not lie together, in `copy`.
const uint8_t* CodesOfBlock(const Storage& s, const Group& group, int64_t token, int begin, int end,
                            std::vector<uint8_t>& copy) {
  if (TogetherIn(s)) return CodesOf(s, group, token);
  const int64_t bytes = int64_t{kTileTokens} * s.code.bytes();
  copy.resize(static_cast<size_t>(bytes * kBlockTokens / kTileTokens));
  for (int t = begin; t < end; t += kTileTokens) {
    std::memcpy(copy.data() + t / kTileTokens * bytes, CodesOf(s, group, token + t),
                static_cast<size_t>(bytes));
  }
  return copy.data();
}

// The group with only `heads` of its query heads, from head `first` on, a multiple of 8. A scan works
// with this many at a time.
Group HeadsOf(const Storage& s, const Group& group, int first, int heads) {
  Group part = group;
  part.group_heads = heads;
  part.scratch.query += int64_t{first} * s.row.dim_k;
  part.scratch.packed += first / 8;
  part.scratch.prepared += int64_t{first} * PreparedFloats(s);
  if (part.external != nullptr) part.external += first;
  return part;
}

// Standard deviation of s - s^ over tokens, from products of the query: y [dims] with the
// directions of the code, one with the center, and [uncoded] with the noise of the others.
float NoiseOf(const IndexTables& index, int dims, int uncoded, const float* y) {
  float sum = 0;
  for (int j = 0; j < dims; ++j) sum += index.level_noise2[j] * y[j] * y[j];
  for (int j = dims + 1; j <= dims + uncoded; ++j) sum += y[j] * y[j];
  return std::sqrt(sum);
}

// Queries in the coordinates of one segment's codes.
void PackSegment(const Storage& s, const Group& group, int segment) {
  const IndexTables& index = TablesOf(group, segment);
  PackedQueries* const packed =
      group.scratch.packed + int64_t{segment} * group.scratch.packed_stride;
  constexpr int kMostRows = kMaxCodeDims + 1 + kMaxDim;
  const uint8_t* rows[kMostRows];
  const int dims = s.code.dims(), dim_k = s.row.dim_k;
  const int uncoded = s.code.kind == IndexKind::kBalanced ? dim_k - dims : 0;
  for (int j = 0; j < dims; ++j) {
    rows[j] = reinterpret_cast<const uint8_t*>(index.project + int64_t{j} * dim_k);
  }
  rows[dims] = reinterpret_cast<const uint8_t*>(index.center);
  for (int j = 0; j < uncoded; ++j) {
    rows[dims + 1 + j] = reinterpret_cast<const uint8_t*>(index.noise + int64_t{j} * dim_k);
  }
  const RowList list{
      .rows = rows, .count = dims + 1 + uncoded, .offset = 0, .dim = dim_k, .dtype = DType::kF32};
  float y[8 * kMostRows];
  for (int g = 0; g < group.group_heads; g += 8) {
    const int heads = std::min(8, group.group_heads - g);
    DotRows(list, group.scratch.query + int64_t{g} * dim_k, heads, y, kMostRows);
    for (int h = 0; h < heads; ++h) {
      const float* at = y + h * kMostRows;
      if (group.scratch.noise != nullptr) {
        group.scratch.noise[segment * group.group_heads + g + h] =
            NoiseOf(index, dims, uncoded, at);
      }
      if (s.code.dims1 > 0) {
        const float norm = QueryNorm(s, group, g + h);
        PackSigns(s.code, at, index.slope * norm, at[dims] + index.intercept * norm, packed[g / 8],
                  h);
      } else {
        PackHead(s.code, at, at[dims], packed[g / 8], h);
      }
    }
  }
}

}  // namespace

void PackQueries(const Storage& s, Group& group) {
  for (int k = 0; k < NumSegments(group.num_segments); ++k) PackSegment(s, group, k);
}

void ScoreLevels(const Storage& s, const Group& group, const BlockPart& part, float* scores) {
  static thread_local std::vector<uint8_t> copy;
  const uint8_t* const codes =
      CodesOfBlock(s, group, part.block * kBlockTokens, part.begin, part.end, copy);
  const PackedQueries* const packed =
      group.scratch.packed + int64_t{SegmentOf(group.segments, group.num_segments, part.block)} *
                                 group.scratch.packed_stride;
  for (int g = 0; g < group.group_heads; g += 8) {
    const bool fetch = g == 0 && part.soon >= 0 && TogetherIn(s);
    HWY_DYNAMIC_DISPATCH(ScoreCodes)
    (codes, s.code, packed[g / 8], std::min(8, group.group_heads - g), part.begin / kTileTokens,
     part.end / kTileTokens, fetch ? CodesOf(s, group, part.soon * kBlockTokens) : nullptr,
     scores + int64_t{g} * kBlockTokens);
  }
}

void ScoreBlock(const Storage& s, IndexKind kind, const Group& group, int64_t token, float* scores,
                int64_t soon) {
  const int begin = static_cast<int>(std::max(group.middle_begin - token, int64_t{0}));
  const int end = static_cast<int>(std::min(group.middle_end - token, int64_t{kBlockTokens}));
  const int heads = group.group_heads;
  if (begin > 0 || end < kBlockTokens) {
    std::fill(scores, scores + int64_t{heads} * kBlockTokens,
              -std::numeric_limits<float>::infinity());
  }
  FunctionsOf(kind).score(
      s, group, {.block = token / kBlockTokens, .begin = begin, .end = end, .soon = soon}, scores);
}

void ScanEstimates(const Storage& s, IndexKind kind, const Group& group, Workers* workers) {
  const int heads = group.group_heads;
  const int64_t blocks = NumBlocks(group), first = FirstBlock(group);
  ParallelFor(workers, (blocks + kTaskBlocks - 1) / kTaskBlocks, [&](int64_t task) {
    constexpr int kHeadsAtOnce = 64;
    alignas(64) float scores[kHeadsAtOnce * kBlockTokens];
    for (int64_t b = task * kTaskBlocks; b < std::min(blocks, (task + 1) * kTaskBlocks); ++b) {
      const int64_t soon = b + 1 < blocks ? first + b + 1 : -1;
      const int64_t token = (first + b) * kBlockTokens;
      const bool whole = token >= group.middle_begin && token + kBlockTokens <= group.middle_end;
      for (int h = 0; h < heads; h += kHeadsAtOnce) {
        const Group part = HeadsOf(s, group, h, std::min(kHeadsAtOnce, heads - h));
        ScoreBlock(s, kind, part, token, scores, h == 0 ? soon : -1);
        for (int g = 0; g < part.group_heads; ++g) {
          const int64_t at = b * heads + h + g;
          // The next block's estimates are written soon.
          const uint16_t* next = group.scratch.estimate + (at + heads) * kBlockTokens;
          for (int i = 0; i < kBlockTokens; i += 32)
            __builtin_prefetch(next + i, /*rw=*/1, /*locality=*/2);
          group.scratch.shift[at] = HWY_DYNAMIC_DISPATCH(EstimateBlock)(
              scores + g * kBlockTokens, whole, group.scratch.estimate + at * kBlockTokens,
              group.scratch.mass + at);
        }
      }
    }
  });
}

void ScanScores(const Storage& s, IndexKind kind, const Group& group, Workers* workers) {
  const int heads = group.group_heads;
  ParallelFor(workers, NumBlocks(group), [&](int64_t b) {
    constexpr int kHeadsAtOnce = 64;
    alignas(64) float scores[kHeadsAtOnce * kBlockTokens];
    const int64_t token = (FirstBlock(group) + b) * kBlockTokens;
    const int64_t begin = std::max(group.middle_begin, token);
    const int64_t end = std::min(group.middle_end, token + kBlockTokens);
    for (int h = 0; h < heads; h += kHeadsAtOnce) {
      const Group part = HeadsOf(s, group, h, std::min(kHeadsAtOnce, heads - h));
      ScoreBlock(s, kind, part, token, scores);
      for (int g = 0; g < part.group_heads; ++g) {
        // In a ranking outliers come first.
        std::replace_copy(
            scores + g * kBlockTokens + (begin - token), scores + g * kBlockTokens + (end - token),
            group.scratch.score + (h + g) * group.scratch.stride + (begin - group.middle_begin),
            kOutlierScore, -kOutlierScore);
      }
    }
  });
}

float EstimateOf(const Group& group, int64_t token, int head) {
  const int64_t b = token / kBlockTokens - FirstBlock(group);
  return HWY_DYNAMIC_DISPATCH(HalfToFloat)(
      group.scratch.estimate[(b * group.group_heads + head) * kBlockTokens + token % kBlockTokens]);
}

}  // namespace vattn::cpu
#endif
