#include "kernels/cpu/encode.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/cpu/rows.h"
#include "kernels/cpu/workers.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/encode.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace vattn::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));

// x [16][padded] = encode^T (key - center), keys centred already, [16][dim_k].
void Transform(const float* keys, int dim_k, const float* encode, int padded, float* x) {
  const D d;
  constexpr int kTokens = 4;
  for (int t = 0; t < kTileTokens; t += kTokens) {
    for (int j = 0; j < padded; j += kLanes) {
      auto a0 = hn::Zero(d), a1 = a0, a2 = a0, a3 = a0;
      const float* k = keys + t * dim_k;
      for (int c = 0; c < dim_k; ++c) {
        const auto e = hn::LoadU(d, encode + c * padded + j);
        a0 = hn::MulAdd(hn::Set(d, k[c]), e, a0);
        a1 = hn::MulAdd(hn::Set(d, k[c + dim_k]), e, a1);
        a2 = hn::MulAdd(hn::Set(d, k[c + 2 * dim_k]), e, a2);
        a3 = hn::MulAdd(hn::Set(d, k[c + 3 * dim_k]), e, a3);
      }
      float* out = x + t * padded + j;
      hn::StoreU(a0, d, out);
      hn::StoreU(a1, d, out + padded);
      hn::StoreU(a2, d, out + 2 * padded);
      hn::StoreU(a3, d, out + 3 * padded);
    }
  }
}

// Elements of a value code byte lie 16 apart, so one load of 16 bytes gives runs of 16 elements.
template <int kBits>
void AddValueChunk(const uint8_t* codes, int stride, const uint16_t* weights, int64_t ld, int count,
                   int heads, float* sum, int sum_ld) {
  const D d;
  const hn::RebindToSigned<D> di;
  const hn::Rebind<uint8_t, D> d8;
  const hn::Rebind<hwy::float16_t, D> d16;
  constexpr int kRuns = 8 / kBits;
  for (int lane = 0; lane < 16; lane += kLanes) {
    for (int g = 0; g < heads; ++g) {
      hn::Vec<D> acc[kRuns];
      for (int r = 0; r < kRuns; ++r) acc[r] = hn::LoadU(d, sum + g * sum_ld + 16 * r + lane);
      for (int first = 0; first < count; first += kLanes) {
        float w[kLanes];
        hn::StoreU(hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(
                                                       weights + g * ld + first))),
                   d, w);
        for (int i = 0; i < kLanes && first + i < count; ++i) {
          const auto word = hn::PromoteTo(di, hn::LoadU(d8, codes + (first + i) * stride + lane));
          const auto weight = hn::Set(d, w[i]);
          for (int r = 0; r < kRuns; ++r) {
            const auto level = hn::And(hn::ShiftRightSame(word, r * kBits),
                                       hn::Set(di, (1 << kBits) - 1));
            acc[r] = hn::MulAdd(hn::ConvertTo(d, level), weight, acc[r]);
          }
        }
      }
      for (int r = 0; r < kRuns; ++r) hn::StoreU(acc[r], d, sum + g * sum_ld + 16 * r + lane);
    }
  }
}

void AddLevels(int bits, const uint8_t* codes, int stride, const uint16_t* weights, int64_t ld,
               int count, int heads, float* sum, int sum_ld) {
  const int chunk = 128 / bits;
  for (int b = 0; b < stride / 16; ++b) {
    if (bits == 2) {
      AddValueChunk<2>(codes + 16 * b, stride, weights, ld, count, heads, sum + b * chunk, sum_ld);
    } else {
      AddValueChunk<4>(codes + 16 * b, stride, weights, ld, count, heads, sum + b * chunk, sum_ld);
    }
  }
}

}  // namespace vattn::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vattn::cpu {

HWY_EXPORT(Transform);
HWY_EXPORT(AddLevels);

namespace {

constexpr int kMaxDim = 1024;

uint8_t Level(float x, int bits) {
  const int half = 1 << (bits - 1);
  const float level = std::floor(x) + static_cast<float>(half);
  return static_cast<uint8_t>(std::clamp(level, 0.f, static_cast<float>(2 * half - 1)));
}

// Packs one tile's transformed keys x [16][padded] into words of 4-dimension runs.
void PackTile(const CodeLayout& code, const float* x, int padded, uint8_t* out) {
  int dim = 0, word = 0;
  const auto pack = [&](int bits, int words) {
    const int stored = bits == 8 ? 7 : bits;
    for (int w = 0; w < words; ++w, ++word) {
      for (int t = 0; t < kTileTokens; ++t) {
        uint8_t* bytes = out + (word * kTileTokens + t) * 4;
        std::memset(bytes, 0, 4);
        for (int i = 0; i < 4 * 8 / bits; ++i) {
          bytes[i % 4] |= static_cast<uint8_t>(Level(x[t * padded + dim + i], stored) << (i / 4 * bits));
        }
      }
      dim += 4 * 8 / bits;
    }
  };
  pack(8, code.dims8 / 4);
  pack(4, code.dims4 / 8);
  pack(2, code.dims2 / 16);
}

void PackValue(const Storage& s, const IndexTables& index, const float* v, uint8_t* out) {
  const int bits = s.value_bits, chunk = 128 / bits;
  std::memset(out, 0, s.value_code_bytes);
  for (int j = 0; j < s.row.dim_v; ++j) {
    const uint8_t level = Level((v[j] - index.value_mean[j]) / index.value_step[j], bits);
    const int in = j % chunk;
    out[j / chunk * 16 + in % 16] |= static_cast<uint8_t>(level << (in / 16 * bits));
  }
}

void EncodeTile(const EncodeParams& p, int64_t token) {
  const Storage& s = p.storage;
  std::byte* block = s.base + p.blocks[token / kBlockTokens] * s.block.bytes;
  const int in = static_cast<int>(token % kBlockTokens);
  const uint8_t* rows[kTileTokens];
  for (int t = 0; t < kTileTokens; ++t) {
    rows[t] = reinterpret_cast<const uint8_t*>(block) + int64_t{in + t} * s.row.row_bytes;
  }
  alignas(64) float keys[kTileTokens * kMaxDim];
  alignas(64) float x[kTileTokens * kMaxCodeDims];
  const int padded = s.code.padded_dims();
  LoadRows({.rows = rows, .count = kTileTokens, .offset = 0, .dim = s.row.dim_k, .dtype = s.row.dtype}, keys);
  if (s.code.bytes() > 0) {
    for (int t = 0; t < kTileTokens; ++t) {
      for (int c = 0; c < s.row.dim_k; ++c) keys[t * s.row.dim_k + c] -= p.index.center[c];
    }
    HWY_DYNAMIC_DISPATCH(Transform)(keys, s.row.dim_k, p.index.encode, padded, x);
    PackTile(s.code, x, padded,
             reinterpret_cast<uint8_t*>(block) + s.block.codes + int64_t{in} * s.code.bytes());
  }
  if (s.value_bits == 0) return;
  LoadRows({.rows = rows, .count = kTileTokens, .offset = s.row.v_offset, .dim = s.row.dim_v, .dtype = s.row.dtype},
           keys);
  uint8_t* values = reinterpret_cast<uint8_t*>(block) + s.block.value_codes;
  for (int t = 0; t < kTileTokens; ++t) {
    PackValue(s, p.index, keys + t * s.row.dim_v, values + int64_t{in + t} * s.value_code_bytes);
  }
}

}  // namespace

void Encode(const EncodeParams& p, Stream stream) {
  ParallelFor(stream, (p.end - p.begin) / kTileTokens,
              [&](int64_t tile) { EncodeTile(p, p.begin + tile * kTileTokens); });
}

void DecodeValues(const Storage& s, const IndexTables& index, const uint8_t* const* codes, int count,
                  float* out) {
  const int bits = s.value_bits, chunk = 128 / bits;
  const float middle = .5f - static_cast<float>(1 << (bits - 1));
  for (int i = 0; i < count; ++i) {
    for (int j = 0; j < s.row.dim_v; ++j) {
      const int in = j % chunk;
      const int level = codes[i][j / chunk * 16 + in % 16] >> (in / 16 * bits) & ((1 << bits) - 1);
      out[i * s.row.dim_v + j] =
          index.value_mean[j] + (static_cast<float>(level) + middle) * index.value_step[j];
    }
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
    HWY_DYNAMIC_DISPATCH(AddLevels)(bits, codes, s.value_code_bytes, weights + g * ld, ld, count, n,
                                    levels, padded);
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
