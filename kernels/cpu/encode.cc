#include "kernels/cpu/encode.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "kernels/cpu/index.h"
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

}  // namespace vattn::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vattn::cpu {

HWY_EXPORT(Transform);
HWY_EXPORT(AddLevels);
HWY_EXPORT(DecodeLevels);

namespace {

uint8_t Level(float x, int bits) {
  const int half = 1 << (bits - 1);
  const float level = std::floor(x) + static_cast<float>(half);
  // NaN becomes level 0.
  return static_cast<uint8_t>(std::min(std::max(0.f, level), static_cast<float>(2 * half - 1)));
}

// The errors of a key that IndexTables limits. x [dims] are its coordinates in the code, rest [dim_k -
// dims] the others. Every backend sums in this order, without fused operations.
CodeErrors ErrorsOf(const Storage& s, const IndexTables& index, const float* x, const float* rest) {
  const int dims = s.code.dims();
  CodeErrors errors;
  const auto add = [&](int j, float r2) {
    errors.residual2 += r2;
    errors.noise2 += index.weight[j] * r2;
  };
  for (int j = 0; j < dims; ++j) {
    const float half = s.code.half(j);
    // With NaN any level will do, because r is NaN.
    const float level = std::min(std::max(-half, std::floor(x[j])), half - 1) + .5f;
    const float r = (x[j] - level) * index.step[j];
    add(j, r * r);
  }
  for (int j = dims; j < s.row.dim_k; ++j) add(j, rest[j - dims] * rest[j - dims]);
  return errors;
}

// A code of all 0 says that the token is an outlier.
void SetOutlier(const CodeLayout& code, int token, uint8_t* tile) {
  for (int w = 0; w < code.words(); ++w) std::memset(tile + (w * kTileTokens + token) * 4, 0, 4);
}

// Makes outliers of the tokens whose value is over the limit. values [16][dim_v].
void SetHugeOutliers(const Storage& s, const IndexTables& index, const float* values,
                     uint8_t* tile) {
  for (int t = 0; t < kTileTokens; ++t) {
    float norm2 = 0;
    for (int j = 0; j < s.row.dim_v; ++j)
      norm2 += values[t * s.row.dim_v + j] * values[t * s.row.dim_v + j];
    if (!(norm2 <= index.value_limit)) SetOutlier(s.code, t, tile);
  }
}

void CountOutliers(const CodeLayout& code, const uint8_t* tile, uint64_t* outliers) {
  uint64_t found = 0;
  for (int t = 0; t < kTileTokens; ++t) {
    uint32_t any = 0;
    for (int w = 0; w < code.words(); ++w) {
      uint32_t word;
      std::memcpy(&word, tile + (w * kTileTokens + t) * 4, 4);
      any |= word;
    }
    found += any == 0;
  }
  if (found > 0) std::atomic_ref<uint64_t>(*outliers).fetch_add(found, std::memory_order_relaxed);
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
          bytes[i % 4] |=
              static_cast<uint8_t>(Level(x[t * padded + dim + i], stored) << (i / 4 * bits));
        }
      }
      dim += 4 * 8 / bits;
    }
  };
  pack(8, code.dims8 / 4);
  pack(4, code.dims4 / 8);
  pack(2, code.dims2 / 16);
  pack(1, code.dims1 / 32);
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
  uint8_t* tile = reinterpret_cast<uint8_t*>(block) + s.block.codes + int64_t{in} * s.code.bytes();
  alignas(64) float keys[kTileTokens * kMaxDim];
  LoadRows(
      {.rows = rows, .count = kTileTokens, .offset = 0, .dim = s.row.dim_k, .dtype = s.row.dtype},
      keys);
  if (s.code.bytes() > 0) {
    for (int t = 0; t < kTileTokens; ++t) {
      for (int c = 0; c < s.row.dim_k; ++c) keys[t * s.row.dim_k + c] -= p.index.center[c];
    }
    FunctionsOf(s.code.kind).encode(s, p.index, keys, tile);
  }
  const bool has_outliers = s.code.kind == IndexKind::kBalanced;
  if (!has_outliers && s.value_bits == 0) return;
  float* values = keys;
  LoadRows({.rows = rows,
            .count = kTileTokens,
            .offset = s.row.v_offset,
            .dim = s.row.dim_v,
            .dtype = s.row.dtype},
           values);
  if (has_outliers) SetHugeOutliers(s, p.index, values, tile);
  if (has_outliers && p.outliers != nullptr) CountOutliers(s.code, tile, p.outliers);
  if (s.value_bits == 0) return;
  uint8_t* codes = reinterpret_cast<uint8_t*>(block) + s.block.value_codes;
  for (int t = 0; t < kTileTokens; ++t) {
    PackValue(s, p.index, values + t * s.row.dim_v, codes + int64_t{in + t} * s.value_code_bytes);
  }
}

}  // namespace

void EncodeLevels(const Storage& s, const IndexTables& index, const float* keys, uint8_t* tile) {
  alignas(64) float x[kTileTokens * kMaxCodeDims];
  const int padded = s.code.padded_dims();
  HWY_DYNAMIC_DISPATCH(Transform)(keys, s.row.dim_k, index.encode, padded, x);
  PackTile(s.code, x, padded, tile);
}

namespace {

// The coordinates of a tile's keys [16][dim_k]: x [16][padded_dims] are those in the code, rest
// [16][padded_rest] the others.
void TransformTile(const Storage& s, const IndexTables& index, const float* keys, float* x,
                   float* rest) {
  const int padded_rest = s.code.padded_rest(s.row.dim_k);
  HWY_DYNAMIC_DISPATCH(Transform)(keys, s.row.dim_k, index.encode, s.code.padded_dims(), x);
  if (padded_rest > 0)
    HWY_DYNAMIC_DISPATCH(Transform)(keys, s.row.dim_k, index.rest, padded_rest, rest);
}

}  // namespace

bool CodeTells(const IndexTables& index, const CodeErrors& errors) {
  return errors.residual2 <= index.residual_limit && errors.noise2 <= index.noise_limit;
}

void EncodeBalanced(const Storage& s, const IndexTables& index, const float* keys, uint8_t* tile) {
  alignas(64) float x[kTileTokens * kMaxCodeDims], rest[kTileTokens * kMaxDim];
  const int padded = s.code.padded_dims(), padded_rest = s.code.padded_rest(s.row.dim_k);
  TransformTile(s, index, keys, x, rest);
  PackTile(s.code, x, padded, tile);
  for (int t = 0; t < kTileTokens; ++t) {
    if (!CodeTells(index, ErrorsOf(s, index, x + t * padded, rest + t * padded_rest)))
      SetOutlier(s.code, t, tile);
  }
}

void FindCodeErrors(const Storage& s, const IndexTables& index, const float* keys, int64_t count,
                    CodeErrors* out) {
  alignas(64) float tile[kTileTokens * kMaxDim], x[kTileTokens * kMaxCodeDims],
      rest[kTileTokens * kMaxDim];
  const int dim = s.row.dim_k, padded = s.code.padded_dims(), padded_rest = s.code.padded_rest(dim);
  for (int64_t i = 0; i < count; i += kTileTokens) {
    const int n = static_cast<int>(std::min<int64_t>(kTileTokens, count - i));
    std::copy_n(keys + i * dim, n * dim, tile);
    std::fill(tile + n * dim, tile + kTileTokens * dim, 0.f);
    TransformTile(s, index, tile, x, rest);
    for (int t = 0; t < n; ++t)
      out[i + t] = ErrorsOf(s, index, x + t * padded, rest + t * padded_rest);
  }
}

void Encode(const EncodeParams& p, Workers* workers) {
  ParallelFor(workers, (p.end - p.begin) / kTileTokens,
              [&](int64_t tile) { EncodeTile(p, p.begin + tile * kTileTokens); });
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
