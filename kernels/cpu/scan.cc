#include "kernels/cpu/scan.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/rows.h"
#include "kernels/cpu/workers.h"
#include "kernels/sampling.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/scan.cc"
#include <hwy/foreach_target.h>
#include <hwy/cache_control.h>
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

// scores [heads][256] of tiles [first, last) of a block.
template <int kHeads, bool kVnni>
void ScoreTiles(const uint8_t* codes, const CodeLayout& layout, const PackedQueries& q, int first,
                int last, float* scores) {
  const D d;
  const DI di;
  const int words8 = layout.dims8 / 4, words4 = layout.dims4 / 8, words2 = layout.dims2 / 16;
  const int tile_bytes = layout.words() * kTileTokens * 4;
  for (int tile = first; tile < last; ++tile) {
    for (int lane = 0; lane < kTileTokens; lane += kLanes) {
      const int32_t* at = reinterpret_cast<const int32_t*>(codes + tile * tile_bytes) + lane;
      const int32_t(*run)[8] = q.run;
      VI acc[kHeads];
      for (int g = 0; g < kHeads; ++g) acc[g] = hn::Zero(di);
      for (int w = 0; w < words8; ++w, at += kTileTokens, ++run) {
        const VI word = hn::LoadU(di, at);
        for (int g = 0; g < kHeads; ++g) acc[g] = DotBytes<kVnni>(acc[g], word, run[0][g]);
      }
      const VI nibble = hn::Set(di, 0x0F0F0F0F);
      for (int w = 0; w < words4; ++w, at += kTileTokens, run += 2) {
        const VI word = hn::LoadU(di, at);
        const VI low = hn::And(word, nibble), high = hn::And(hn::ShiftRight<4>(word), nibble);
        for (int g = 0; g < kHeads; ++g) {
          acc[g] = DotBytes<kVnni>(DotBytes<kVnni>(acc[g], low, run[0][g]), high, run[1][g]);
        }
      }
      const VI pair = hn::Set(di, 0x03030303);
      for (int w = 0; w < words2; ++w, at += kTileTokens, run += 4) {
        const VI word = hn::LoadU(di, at);
        const VI c0 = hn::And(word, pair), c1 = hn::And(hn::ShiftRight<2>(word), pair);
        const VI c2 = hn::And(hn::ShiftRight<4>(word), pair);
        const VI c3 = hn::And(hn::ShiftRight<6>(word), pair);
        for (int g = 0; g < kHeads; ++g) {
          acc[g] = DotBytes<kVnni>(DotBytes<kVnni>(acc[g], c0, run[0][g]), c1, run[1][g]);
          acc[g] = DotBytes<kVnni>(DotBytes<kVnni>(acc[g], c2, run[2][g]), c3, run[3][g]);
        }
      }
      for (int g = 0; g < kHeads; ++g) {
        const auto s = hn::MulAdd(hn::ConvertTo(d, acc[g]), hn::Set(d, q.scale[g]),
                                  hn::Set(d, q.offset[g]));
        hn::StoreU(s, d, scores + g * kBlockTokens + tile * kTileTokens + lane);
      }
    }
  }
}

template <int kHeads>
void ScoreHeads(const uint8_t* codes, const CodeLayout& layout, const PackedQueries& q, int heads,
                int first, int last, float* scores) {
  if constexpr (kHeads > 1) {
    if (heads < kHeads) return ScoreHeads<kHeads - 1>(codes, layout, q, heads, first, last, scores);
  }
  if (HasVnni()) return ScoreTiles<kHeads, true>(codes, layout, q, first, last, scores);
  return ScoreTiles<kHeads, false>(codes, layout, q, first, last, scores);
}

void ScoreCodes(const uint8_t* codes, const CodeLayout& layout, const PackedQueries& q, int heads,
                int first, int last, float* scores) {
  ScoreHeads<8>(codes, layout, q, heads, first, last, scores);
}

// exp(x) for x <= 0, relative error below 5e-5 (the fp16 it is rounded to has 5e-4); 0 below e^-20.
HWY_INLINE hn::Vec<D> ExpNegative(hn::Vec<D> x) {
  const D d;
  const DI di;
  const auto y = hn::Max(hn::Mul(x, hn::Set(d, 1.44269504f)), hn::Set(d, -30.f));
  const auto n = hn::Round(y);
  const auto f = hn::Sub(y, n);
  auto p = hn::MulAdd(f, hn::Set(d, .00961813f), hn::Set(d, .05550411f));
  p = hn::MulAdd(f, p, hn::Set(d, .24022651f));
  p = hn::MulAdd(f, p, hn::Set(d, .69314718f));
  p = hn::MulAdd(f, p, hn::Set(d, 1.f));
  const auto e = hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(hn::ConvertTo(di, n)));
  return hn::IfThenElseZero(hn::Gt(y, hn::Set(d, -29.f)), hn::BitCast(d, e));
}

// scores [256] -> fp16 estimates [256] relative to the largest; returns it, and the sum in *mass. Only
// tokens outside the middle have estimate 0: the others must all have a chance to be drawn.
float EstimateBlock(const float* scores, uint16_t* estimate, float* mass) {
  const D d;
  const hn::Rebind<hwy::float16_t, D> half;
  auto most = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int i = 0; i < kBlockTokens; i += kLanes) most = hn::Max(most, hn::LoadU(d, scores + i));
  const float shift = hn::GetLane(hn::MaxOfLanes(d, most));
  auto sum = hn::Zero(d);
  for (int i = 0; i < kBlockTokens; i += kLanes) {
    const auto score = hn::LoadU(d, scores + i);
    const auto inside = hn::Gt(score, hn::Set(d, -std::numeric_limits<float>::infinity()));
    const auto e = hn::Max(ExpNegative(hn::Sub(score, hn::Set(d, shift))), hn::Set(d, kLeastEstimate));
    const auto rounded = hn::DemoteTo(half, hn::IfThenElseZero(inside, e));
    hn::StoreU(rounded, half, reinterpret_cast<hwy::float16_t*>(estimate) + i);
    sum = hn::Add(sum, hn::PromoteTo(d, rounded));
  }
  *mass = hn::GetLane(hn::SumOfLanes(d, sum));
  return shift;
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

// Levels of dimension j stand for level + .5 - half of its precision.
float LevelOffset(const CodeLayout& code, int j) {
  if (j < code.dims8) return .5f - 64.f;
  return j < code.dims8 + code.dims4 ? .5f - 8.f : .5f - 2.f;
}

// One head's query: its projection y [dims] in int8 and what it takes to undo that.
void PackHead(const CodeLayout& code, const float* y, float offset, PackedQueries& out, int lane) {
  const int dims = code.dims();
  float most = 0;
  for (int j = 0; j < dims; ++j) most = std::max(most, std::abs(y[j]));
  const float scale = std::max(most / 127.f, 1e-30f);
  for (int r = 0; r < dims / 4; ++r) {
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) {
      const float level = std::nearbyint(std::max(std::min(127.f, y[4 * r + i] / scale), -127.f));
      word |= static_cast<uint32_t>(static_cast<uint8_t>(static_cast<int8_t>(level))) << (8 * i);
      offset += level * scale * LevelOffset(code, 4 * r + i);
    }
    out.run[r][lane] = static_cast<int32_t>(word);
  }
  out.scale[lane] = scale;
  out.offset[lane] = offset;
}

// The codes of a block of the sequence, on their way while the block before is scored.
void PrefetchCodes(const Storage& s, const Group& group, int64_t block) {
  const std::byte* codes = s.base + group.blocks[block] * s.block.bytes + s.block.codes;
  for (int64_t i = 0; i < int64_t{kBlockTokens} * s.code.bytes(); i += 64) hwy::Prefetch(codes + i);
}

}  // namespace

void PackQueries(const Storage& s, Group& group) {
  const uint8_t* rows[kMaxCodeDims + 1];
  const int dims = s.code.dims(), dim_k = s.row.dim_k;
  for (int j = 0; j < dims; ++j) {
    rows[j] = reinterpret_cast<const uint8_t*>(group.index.project + int64_t{j} * dim_k);
  }
  rows[dims] = reinterpret_cast<const uint8_t*>(group.index.center);
  const RowList list{.rows = rows, .count = dims + 1, .offset = 0, .dim = dim_k, .dtype = DType::kF32};
  float y[8 * (kMaxCodeDims + 1)];
  for (int g = 0; g < group.q_heads; g += 8) {
    const int heads = std::min(8, group.q_heads - g);
    DotRows(list, group.scratch.query + int64_t{g} * dim_k, heads, y, kMaxCodeDims + 1);
    for (int h = 0; h < heads; ++h) {
      const float* at = y + h * (kMaxCodeDims + 1);
      PackHead(s.code, at, at[dims], group.scratch.packed[g / 8], h);
    }
  }
}

void ScoreBlock(const Storage& s, IndexKind kind, const Group& group, int64_t token, float* scores) {
  const std::byte* block = s.base + group.blocks[token / kBlockTokens] * s.block.bytes;
  const int begin = static_cast<int>(std::max(group.middle_begin - token, int64_t{0}));
  const int end = static_cast<int>(std::min(group.middle_end - token, int64_t{kBlockTokens}));
  const int heads = group.q_heads;
  if (begin > 0 || end < kBlockTokens) {
    std::fill(scores, scores + int64_t{heads} * kBlockTokens, -std::numeric_limits<float>::infinity());
  }
  if (kind == IndexKind::kExact) {
    const uint8_t* rows[kBlockTokens];
    for (int t = begin; t < end; ++t) {
      rows[t] = reinterpret_cast<const uint8_t*>(block) + int64_t{t} * s.row.row_bytes;
    }
    DotRows({.rows = rows + begin, .count = end - begin, .offset = 0, .dim = s.row.dim_k, .dtype = s.row.dtype},
            group.scratch.query, heads, scores + begin, kBlockTokens);
    return;
  }
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(block) + s.block.codes;
  for (int g = 0; g < heads; g += 8) {
    HWY_DYNAMIC_DISPATCH(ScoreCodes)
    (codes, s.code, group.scratch.packed[g / 8], std::min(8, heads - g), begin / kTileTokens,
     end / kTileTokens, scores + int64_t{g} * kBlockTokens);
  }
}

void ScanEstimates(const Storage& s, IndexKind kind, const Group& group, Stream stream) {
  const int heads = group.q_heads;
  const int64_t blocks = NumBlocks(group), first = FirstBlock(group);
  ParallelFor(stream, (blocks + kTaskBlocks - 1) / kTaskBlocks, [&](int64_t task) {
    constexpr int kHeadsAtOnce = 64;
    alignas(64) float scores[kHeadsAtOnce * kBlockTokens];
    for (int64_t b = task * kTaskBlocks; b < std::min(blocks, (task + 1) * kTaskBlocks); ++b) {
      if (b + 1 < blocks) PrefetchCodes(s, group, first + b + 1);
      for (int h = 0; h < heads; h += kHeadsAtOnce) {
        Group part = group;
        part.q_heads = std::min(kHeadsAtOnce, heads - h);
        part.scratch.query += int64_t{h} * s.row.dim_k;
        part.scratch.packed += h / 8;
        ScoreBlock(s, kind, part, (first + b) * kBlockTokens, scores);
        for (int g = 0; g < part.q_heads; ++g) {
          const int64_t at = b * heads + h + g;
          group.scratch.shift[at] = HWY_DYNAMIC_DISPATCH(EstimateBlock)(
              scores + g * kBlockTokens, group.scratch.estimate + at * kBlockTokens,
              group.scratch.mass + at);
        }
      }
    }
  });
}

void ScanScores(const Storage& s, IndexKind kind, const Group& group, Stream stream) {
  const int heads = group.q_heads;
  ParallelFor(stream, NumBlocks(group), [&](int64_t b) {
    constexpr int kHeadsAtOnce = 64;
    alignas(64) float scores[kHeadsAtOnce * kBlockTokens];
    const int64_t token = (FirstBlock(group) + b) * kBlockTokens;
    const int64_t begin = std::max(group.middle_begin, token);
    const int64_t end = std::min(group.middle_end, token + kBlockTokens);
    for (int h = 0; h < heads; h += kHeadsAtOnce) {
      Group part = group;
      part.q_heads = std::min(kHeadsAtOnce, heads - h);
      part.scratch.query += int64_t{h} * s.row.dim_k;
      part.scratch.packed += h / 8;
      ScoreBlock(s, kind, part, token, scores);
      for (int g = 0; g < part.q_heads; ++g) {
        std::copy(scores + g * kBlockTokens + (begin - token), scores + g * kBlockTokens + (end - token),
                  group.scratch.score + (h + g) * group.scratch.stride + (begin - group.middle_begin));
      }
    }
  });
}

float EstimateOf(const Group& group, int64_t token, int head) {
  const int64_t b = token / kBlockTokens - FirstBlock(group);
  return HWY_DYNAMIC_DISPATCH(HalfToFloat)(
      group.scratch.estimate[(b * group.q_heads + head) * kBlockTokens + token % kBlockTokens]);
}

}  // namespace vattn::cpu
#endif
