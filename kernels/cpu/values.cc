#include "kernels/cpu/values.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/values.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace vattn::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));

// Elements of a value code byte lie 16 apart, so one load of 16 bytes gives runs of 16 elements.
// sum [heads][sum_ld] += weight * level for one chunk of `count` tokens; weights fp32 [heads][ld].
template <int kBits, int kHeads>
void AddChunk(const uint8_t* codes, int stride, const float* weights, int64_t ld, int count,
              float* sum, int sum_ld) {
  const D d;
  const hn::RebindToSigned<D> di;
  const hn::Rebind<uint8_t, D> d8;
  constexpr int kRuns = 8 / kBits;
  const auto mask = hn::Set(di, (1 << kBits) - 1);
  for (int lane = 0; lane < 16; lane += kLanes) {
    hn::Vec<D> acc[kHeads][kRuns];
    for (int g = 0; g < kHeads; ++g) {
      for (int r = 0; r < kRuns; ++r) acc[g][r] = hn::LoadU(d, sum + g * sum_ld + 16 * r + lane);
    }
    for (int i = 0; i < count; ++i) {
      const auto word = hn::PromoteTo(di, hn::LoadU(d8, codes + i * stride + lane));
      hn::Vec<D> level[kRuns];
      for (int r = 0; r < kRuns; ++r) {
        level[r] = hn::ConvertTo(d, hn::And(hn::ShiftRightSame(word, r * kBits), mask));
      }
      for (int g = 0; g < kHeads; ++g) {
        const auto weight = hn::Set(d, weights[g * ld + i]);
        for (int r = 0; r < kRuns; ++r) acc[g][r] = hn::MulAdd(level[r], weight, acc[g][r]);
      }
    }
    for (int g = 0; g < kHeads; ++g) {
      for (int r = 0; r < kRuns; ++r) hn::StoreU(acc[g][r], d, sum + g * sum_ld + 16 * r + lane);
    }
  }
}

template <int kBits>
void AddChunks(const uint8_t* codes, int stride, const float* weights, int64_t ld, int count,
               int heads, float* sum, int sum_ld) {
  constexpr int kChunk = 128 / kBits;
  for (int b = 0; b < stride / 16; ++b, codes += 16, sum += kChunk) {
    int g = 0;
    for (; g + 4 <= heads; g += 4)
      AddChunk<kBits, 4>(codes, stride, weights + g * ld, ld, count, sum + g * sum_ld, sum_ld);
    for (; g < heads; ++g)
      AddChunk<kBits, 1>(codes, stride, weights + g * ld, ld, count, sum + g * sum_ld, sum_ld);
  }
}

// weights [heads][ld] in fp16; at most a block of tokens and 8 heads at a time.
void AddLevels(int bits, const uint8_t* codes, int stride, const uint16_t* weights, int64_t ld,
               int count, int heads, float* sum, int sum_ld) {
  const D d;
  const hn::Rebind<hwy::float16_t, D> half;
  alignas(64) float wide[8 * kBlockTokens];
  for (int g = 0; g < heads; ++g) {
    for (int i = 0; i < count; i += kLanes) {
      const auto* at = reinterpret_cast<const hwy::float16_t*>(weights + g * ld + i);
      hn::StoreU(hn::PromoteTo(d, hn::LoadU(half, at)), d, wide + g * kBlockTokens + i);
    }
  }
  if (bits == 2) {
    AddChunks<2>(codes, stride, wide, kBlockTokens, count, heads, sum, sum_ld);
  } else {
    AddChunks<4>(codes, stride, wide, kBlockTokens, count, heads, sum, sum_ld);
  }
}

// One token's levels as values: mean + (level + middle) * step, dim elements.
void DecodeLevels(int bits, const uint8_t* codes, const float* mean, const float* step, int dim,
                  float* out) {
  const D d;
  const hn::RebindToSigned<D> di;
  const hn::Rebind<uint8_t, D> d8;
  const int runs = 8 / bits;
  const auto mask = hn::Set(di, (1 << bits) - 1);
  const auto middle = hn::Set(d, .5f - static_cast<float>(1 << (bits - 1)));
  for (int at = 0; at < dim; codes += 16) {
    for (int r = 0; r < runs && at < dim; ++r, at += 16) {
      for (int lane = 0; lane < 16; lane += kLanes) {
        const auto word = hn::PromoteTo(di, hn::LoadU(d8, codes + lane));
        const auto level = hn::ConvertTo(d, hn::And(hn::ShiftRightSame(word, r * bits), mask));
        const auto value = hn::MulAdd(hn::Add(level, middle), hn::LoadU(d, step + at + lane),
                                      hn::LoadU(d, mean + at + lane));
        hn::StoreU(value, d, out + at + lane);
      }
    }
  }
}

// The value code of v [dim], dim a multiple of 16: levels floor((v - mean) / step), NaN level 0.
template <int kBits>
void PackLevels(const float* v, const float* mean, const float* step, int dim, uint8_t* out) {
  const D d;
  const hn::RebindToSigned<D> di;
  const hn::Rebind<uint8_t, D> d8;
  constexpr int kRuns = 8 / kBits;
  const auto zero = hn::Zero(d), half = hn::Set(d, static_cast<float>(1 << (kBits - 1))),
             most = hn::Set(d, static_cast<float>((1 << kBits) - 1));
  for (int at = 0; at < dim; at += 16 * kRuns, out += 16) {
    const int runs = std::min(kRuns, (dim - at) / 16);
    for (int lane = 0; lane < 16; lane += kLanes) {
      auto byte = hn::Zero(di);
      for (int r = runs - 1; r >= 0; --r) {
        const int j = at + 16 * r + lane;
        const auto x =
            hn::Div(hn::Sub(hn::LoadU(d, v + j), hn::LoadU(d, mean + j)), hn::LoadU(d, step + j));
        const auto level = hn::Add(hn::Floor(x), half);
        const auto kept = hn::Min(hn::IfThenElseZero(hn::Gt(level, zero), level), most);
        byte = hn::Or(hn::ShiftLeft<kBits>(byte), hn::ConvertTo(di, kept));
      }
      hn::StoreU(hn::DemoteTo(d8, byte), d8, out + lane);
    }
  }
}

void PackValue(int bits, const float* v, const float* mean, const float* step, int dim,
               uint8_t* out) {
  if (bits == 2) {
    PackLevels<2>(v, mean, step, dim, out);
  } else {
    PackLevels<4>(v, mean, step, dim, out);
  }
}

}  // namespace vattn::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vattn::cpu {

HWY_EXPORT(AddLevels);
HWY_EXPORT(DecodeLevels);
HWY_EXPORT(PackValue);

void EncodeValues(const Storage& s, const IndexTables& index, const float* values, int count,
                  uint8_t* out) {
  for (int i = 0; i < count; ++i) {
    HWY_DYNAMIC_DISPATCH(PackValue)
    (s.value_bits, values + i * s.row.dim_v, index.value_mean, index.value_step, s.row.dim_v,
     out + int64_t{i} * s.value_code_bytes);
  }
}

void DecodeValues(const Storage& s, const IndexTables& index, const uint8_t* const* codes,
                  int count, float* out) {
  for (int i = 0; i < count; ++i) {
    HWY_DYNAMIC_DISPATCH(DecodeLevels)
    (s.value_bits, codes[i], index.value_mean, index.value_step, s.row.dim_v,
     out + i * s.row.dim_v);
  }
}

void AddValueCodes(const Storage& s, const IndexTables& index, const uint8_t* codes,
                   const uint16_t* weights, int64_t ld, int count, int heads, const float* factors,
                   float* sum, int64_t sum_ld) {
  const int bits = s.value_bits;
  const int padded = s.value_code_bytes / 16 * (128 / bits);
  constexpr int kHeads = 8;
  alignas(64) float levels[kHeads * kMaxDim];
  const float middle = .5f - static_cast<float>(1 << (bits - 1));
  for (int g = 0; g < heads; g += kHeads) {
    const int n = std::min(kHeads, heads - g);
    std::fill(levels, levels + n * padded, 0.f);
    HWY_DYNAMIC_DISPATCH(AddLevels)
    (bits, codes, s.value_code_bytes, weights + g * ld, ld, count, n, levels, padded);
    for (int h = 0; h < n; ++h) {
      const float f = factors[2 * (g + h)], mass = factors[2 * (g + h) + 1];
      for (int j = 0; j < s.row.dim_v; ++j) {
        sum[(g + h) * sum_ld + j] +=
            f * (mass * index.value_mean[j] +
                 (levels[h * padded + j] + middle * mass) * index.value_step[j]);
      }
    }
  }
}

}  // namespace vattn::cpu
#endif
