// Compiled without contraction of a * b + c (CMakeLists.txt): only what is written as MulAdd is
// fused, as on every backend.
#include "kernels/cpu/encode.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "kernels/cpu/index.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/values.h"
#include "kernels/cpu/workers.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/encode.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace vattn::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Sums of a token go over its dimensions in order, so a tile's 16 tokens are the lanes of what
// follows, of kVectors vectors. "Turned" says that a matrix lies so, [dim][16].
using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));
constexpr int kVectors = kTileTokens / kLanes;

using D4 = hn::FixedTag<float, 4>;
using V4 = hn::Vec<D4>;

// Four rows become four columns.
HWY_INLINE void Turn(V4& a, V4& b, V4& c, V4& d) {
  const D4 d4;
  const hn::RepartitionToWide<D4> wide;
  const auto ab = hn::BitCast(wide, hn::InterleaveLower(d4, a, b)),
             ab2 = hn::BitCast(wide, hn::InterleaveUpper(d4, a, b)),
             cd = hn::BitCast(wide, hn::InterleaveLower(d4, c, d)),
             cd2 = hn::BitCast(wide, hn::InterleaveUpper(d4, c, d));
  a = hn::BitCast(d4, hn::InterleaveLower(wide, ab, cd));
  b = hn::BitCast(d4, hn::InterleaveUpper(wide, ab, cd));
  c = hn::BitCast(d4, hn::InterleaveLower(wide, ab2, cd2));
  d = hn::BitCast(d4, hn::InterleaveUpper(wide, ab2, cd2));
}

// turned [dim][16] = rows [16][dim], dim a multiple of 4.
void TurnTile(const float* rows, int dim, float* turned) {
  const D4 d;
  for (int t = 0; t < kTileTokens; t += 4) {
    const float* row = rows + t * dim;
    for (int c = 0; c < dim; c += 4, row += 4) {
      V4 v0 = hn::LoadU(d, row), v1 = hn::LoadU(d, row + dim), v2 = hn::LoadU(d, row + 2 * dim),
         v3 = hn::LoadU(d, row + 3 * dim);
      Turn(v0, v1, v2, v3);
      float* out = turned + c * kTileTokens + t;
      hn::StoreU(v0, d, out);
      hn::StoreU(v1, d, out + kTileTokens);
      hn::StoreU(v2, d, out + 2 * kTileTokens);
      hn::StoreU(v3, d, out + 3 * kTileTokens);
    }
  }
}

// rows [16][dim] -= center.
void Centre(const float* center, int dim, float* rows) {
  const D d;
  for (int t = 0; t < kTileTokens; ++t, rows += dim) {
    for (int c = 0; c < dim; c += kLanes)
      hn::StoreU(hn::Sub(hn::LoadU(d, rows + c), hn::LoadU(d, center + c)), d, rows + c);
  }
}

// norm2[t] = |row t|^2 of rows [16][dim].
void SquaredNorms(const float* rows, int dim, float* norm2) {
  const D4 d;
  constexpr int kRuns = kTileTokens / 4;
  V4 sum[kRuns];
  for (int r = 0; r < kRuns; ++r) sum[r] = hn::Zero(d);
  for (int c = 0; c < dim; c += 4) {
    for (int r = 0; r < kRuns; ++r) {
      const float* row = rows + 4 * r * dim + c;
      V4 v0 = hn::LoadU(d, row), v1 = hn::LoadU(d, row + dim), v2 = hn::LoadU(d, row + 2 * dim),
         v3 = hn::LoadU(d, row + 3 * dim);
      Turn(v0, v1, v2, v3);
      sum[r] = hn::Add(sum[r], hn::Mul(v0, v0));
      sum[r] = hn::Add(sum[r], hn::Mul(v1, v1));
      sum[r] = hn::Add(sum[r], hn::Mul(v2, v2));
      sum[r] = hn::Add(sum[r], hn::Mul(v3, v3));
    }
  }
  for (int r = 0; r < kRuns; ++r) hn::StoreU(sum[r], d, norm2 + 4 * r);
}

// kColumns columns of Transform.
template <int kColumns>
HWY_INLINE void TransformColumns(const float* keys, int dim_k, const float* map, int ld, float* x) {
  const D d;
  V sum[kColumns][kVectors];
  for (int j = 0; j < kColumns; ++j) {
    for (int v = 0; v < kVectors; ++v) sum[j][v] = hn::Zero(d);
  }
  for (int c = 0; c < dim_k; ++c) {
    V key[kVectors];
    for (int v = 0; v < kVectors; ++v) key[v] = hn::LoadU(d, keys + c * kTileTokens + v * kLanes);
    for (int j = 0; j < kColumns; ++j) {
      const V e = hn::Set(d, map[int64_t{c} * ld + j]);
      for (int v = 0; v < kVectors; ++v) sum[j][v] = hn::MulAdd(key[v], e, sum[j][v]);
    }
  }
  for (int j = 0; j < kColumns; ++j) {
    for (int v = 0; v < kVectors; ++v) hn::StoreU(sum[j][v], d, x + j * kTileTokens + v * kLanes);
  }
}

// x [columns][16] = map^T keys, of turned keys [dim_k][16] and map [dim_k][ld]; an even number of
// columns. As many at a time as there are registers for their sums: fewer would wait for their
// additions.
void Transform(const float* keys, int dim_k, const float* map, int columns, int ld, float* x) {
  constexpr int kColumns = kVectors == 1 ? 12 : kVectors == 2 ? 6 : 2;
  int j = 0;
  for (; j + kColumns <= columns; j += kColumns)
    TransformColumns<kColumns>(keys, dim_k, map + j, ld, x + j * kTileTokens);
  for (; j + 4 <= columns; j += 4)
    TransformColumns<4>(keys, dim_k, map + j, ld, x + j * kTileTokens);
  for (; j < columns; j += 2) TransformColumns<2>(keys, dim_k, map + j, ld, x + j * kTileTokens);
}

// Words of runs of 4 dimensions, lowest bits first (kernels/geometry.h), of turned coordinates x.
// A code of kBits bits has kUsed of them.
template <int kBits, int kUsed = kBits>
HWY_INLINE void PackWords(const float* x, int words, uint8_t* out) {
  const D d;
  const hn::RebindToSigned<D> di;
  constexpr int kRuns = 8 / kBits;
  const V zero = hn::Zero(d), half = hn::Set(d, static_cast<float>(1 << (kUsed - 1))),
          most = hn::Set(d, static_cast<float>((1 << kUsed) - 1));
  for (int w = 0; w < words; ++w, x += 4 * kRuns * kTileTokens, out += 4 * kTileTokens) {
    hn::Vec<decltype(di)> word[kVectors];
    for (int v = 0; v < kVectors; ++v) word[v] = hn::Zero(di);
    for (int i = 4 * kRuns - 1; i >= 0; --i) {
      const float* at = x + (i % kRuns * 4 + i / kRuns) * kTileTokens;
      for (int v = 0; v < kVectors; ++v) {
        const V level = hn::Add(hn::Floor(hn::LoadU(d, at + v * kLanes)), half);
        // NaN becomes level 0.
        const V kept = hn::Min(hn::IfThenElseZero(hn::Gt(level, zero), level), most);
        word[v] = hn::Or(hn::ShiftLeft<kBits>(word[v]), hn::ConvertTo(di, kept));
      }
    }
    for (int v = 0; v < kVectors; ++v)
      hn::StoreU(word[v], di, reinterpret_cast<int32_t*>(out) + v * kLanes);
  }
}

// The codes of a tile of turned coordinates x [dims][16].
void PackTile(const CodeLayout& code, const float* x, uint8_t* out) {
  PackWords<8, 7>(x, code.dims8 / 4, out);
  x += code.dims8 * kTileTokens, out += code.dims8 * kTileTokens;
  PackWords<4>(x, code.dims4 / 8, out);
  x += code.dims4 * kTileTokens, out += code.dims4 / 2 * kTileTokens;
  PackWords<2>(x, code.dims2 / 16, out);
  x += code.dims2 * kTileTokens, out += code.dims2 / 4 * kTileTokens;
  PackWords<1>(x, code.dims1 / 32, out);
}

// What IndexTables limits, of 16 tokens, from their turned coordinates: x [dims][16] are those in
// the code, rest [dim_k - dims][16] the others. Every backend sums in this order.
void SumErrors(const CodeLayout& code, int dim_k, const IndexTables& index, const float* x,
               const float* rest, float* residual2, float* noise2) {
  const D d;
  const V one = hn::Set(d, 1.f), middle = hn::Set(d, .5f);
  V residual[kVectors], noise[kVectors];
  for (int v = 0; v < kVectors; ++v) residual[v] = noise[v] = hn::Zero(d);
  const int dims = code.dims();
  for (int j = 0; j < dims; ++j, x += kTileTokens) {
    const V half = hn::Set(d, code.half(j)), step = hn::Set(d, index.step[j]),
            weight = hn::Set(d, index.weight[j]);
    for (int v = 0; v < kVectors; ++v) {
      const V at = hn::LoadU(d, x + v * kLanes);
      // With NaN any level will do, because r is NaN.
      const V level = hn::Min(hn::Max(hn::Floor(at), hn::Neg(half)), hn::Sub(half, one));
      const V r = hn::Mul(hn::Sub(at, hn::Add(level, middle)), step), r2 = hn::Mul(r, r);
      residual[v] = hn::Add(residual[v], r2);
      noise[v] = hn::Add(noise[v], hn::Mul(weight, r2));
    }
  }
  for (int j = dims; j < dim_k; ++j, rest += kTileTokens) {
    const V weight = hn::Set(d, index.weight[j]);
    for (int v = 0; v < kVectors; ++v) {
      const V r = hn::LoadU(d, rest + v * kLanes), r2 = hn::Mul(r, r);
      residual[v] = hn::Add(residual[v], r2);
      noise[v] = hn::Add(noise[v], hn::Mul(weight, r2));
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    hn::StoreU(residual[v], d, residual2 + v * kLanes);
    hn::StoreU(noise[v], d, noise2 + v * kLanes);
  }
}

}  // namespace vattn::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vattn::cpu {

HWY_EXPORT(TurnTile);
HWY_EXPORT(Centre);
HWY_EXPORT(SquaredNorms);
HWY_EXPORT(Transform);
HWY_EXPORT(PackTile);
HWY_EXPORT(SumErrors);

namespace {

// The turned coordinates of a tile's keys, and what they say of its codes.
struct Tile {
  alignas(64) float keys[kTileTokens * kMaxDim];    // [dim_k][16]
  alignas(64) float x[kTileTokens * kMaxCodeDims];  // [dims][16]
  alignas(64) float rest[kTileTokens * kMaxDim];    // [dim_k - dims][16]
  alignas(64) float residual2[kTileTokens], noise2[kTileTokens];

  // keys [16][dim_k], centred.
  void Encode(const Storage& s, const IndexTables& index, const float* centred) {
    HWY_DYNAMIC_DISPATCH(TurnTile)(centred, s.row.dim_k, keys);
    HWY_DYNAMIC_DISPATCH(Transform)
    (keys, s.row.dim_k, index.encode, s.code.dims(), s.code.padded_dims(), x);
  }
  void FindErrors(const Storage& s, const IndexTables& index) {
    const int dim = s.row.dim_k;
    HWY_DYNAMIC_DISPATCH(Transform)
    (keys, dim, index.rest, dim - s.code.dims(), s.code.padded_rest(dim), rest);
    HWY_DYNAMIC_DISPATCH(SumErrors)(s.code, dim, index, x, rest, residual2, noise2);
  }
};

// A code of all 0 says that the token is an outlier.
void SetOutlier(const CodeLayout& code, int token, uint8_t* tile) {
  for (int w = 0; w < code.words(); ++w) std::memset(tile + (w * kTileTokens + token) * 4, 0, 4);
}

// Makes outliers of the tokens whose value is over the limit. values [16][dim_v].
void SetHugeOutliers(const Storage& s, const IndexTables& index, const float* values,
                     uint8_t* tile) {
  float norm2[kTileTokens];
  HWY_DYNAMIC_DISPATCH(SquaredNorms)(values, s.row.dim_v, norm2);
  for (int t = 0; t < kTileTokens; ++t) {
    if (!(norm2[t] <= index.value_limit)) SetOutlier(s.code, t, tile);
  }
}

void CountOutliers(const CodeLayout& code, const uint8_t* tile, uint64_t* outliers) {
  uint32_t any[kTileTokens] = {};
  for (int w = 0; w < code.words(); ++w) {
    uint32_t word[kTileTokens];
    std::memcpy(word, tile + w * kTileTokens * 4, sizeof(word));
    for (int t = 0; t < kTileTokens; ++t) any[t] |= word[t];
  }
  const auto found = static_cast<uint64_t>(std::count(any, any + kTileTokens, 0u));
  if (found > 0) std::atomic_ref<uint64_t>(*outliers).fetch_add(found, std::memory_order_relaxed);
}

std::byte* BlockOf(const EncodeParams& p, int64_t token) {
  return p.storage.base + p.blocks[token / kBlockTokens] * p.storage.block.bytes;
}

// Fetches the rows of a tile that is coded soon.
void FetchTile(const EncodeParams& p, int64_t token) {
  const std::byte* rows = BlockOf(p, token) + token % kBlockTokens * p.storage.row.row_bytes;
  for (int i = 0; i < kTileTokens * p.storage.row.row_bytes; i += 64) FetchSoon(rows + i);
}

void EncodeTile(const EncodeParams& p, int64_t token) {
  const Storage& s = p.storage;
  std::byte* block = BlockOf(p, token);
  const int in = static_cast<int>(token % kBlockTokens);
  const uint8_t* rows[kTileTokens];
  for (int t = 0; t < kTileTokens; ++t) {
    rows[t] = reinterpret_cast<const uint8_t*>(block) + int64_t{in + t} * s.row.row_bytes;
  }
  if (token + kTileTokens < p.end) FetchTile(p, token + kTileTokens);
  EncodeRows(s, p.index, rows,
             reinterpret_cast<uint8_t*>(block) + s.block.codes + int64_t{in} * s.code.bytes(),
             s.value_bits == 0 ? nullptr
                               : reinterpret_cast<uint8_t*>(block) + s.block.value_codes +
                                     int64_t{in} * s.value_code_bytes);
  if (s.code.kind == IndexKind::kBalanced && p.outliers != nullptr)
    CountOutliers(s.code,
                  reinterpret_cast<uint8_t*>(block) + s.block.codes + int64_t{in} * s.code.bytes(),
                  p.outliers);
}

}  // namespace

void EncodeRows(const Storage& s, const IndexTables& index,
                const uint8_t* const (&rows)[kTileTokens], uint8_t* tile, uint8_t* value_codes) {
  alignas(64) float keys[kTileTokens * kMaxDim];
  LoadRows(
      {.rows = rows, .count = kTileTokens, .offset = 0, .dim = s.row.dim_k, .dtype = s.row.dtype},
      keys);
  if (s.code.bytes() > 0) {
    HWY_DYNAMIC_DISPATCH(Centre)(index.center, s.row.dim_k, keys);
    FunctionsOf(s.code.kind).encode(s, index, keys, tile);
  }
  const bool has_outliers = s.code.kind == IndexKind::kBalanced;
  if (!has_outliers && value_codes == nullptr) return;
  float* values = keys;
  LoadRows({.rows = rows,
            .count = kTileTokens,
            .offset = s.row.v_offset,
            .dim = s.row.dim_v,
            .dtype = s.row.dtype},
           values);
  if (has_outliers) SetHugeOutliers(s, index, values, tile);
  if (value_codes != nullptr) EncodeValues(s, index, values, kTileTokens, value_codes);
}

void EncodeLevels(const Storage& s, const IndexTables& index, const float* keys, uint8_t* tile) {
  Tile t;
  t.Encode(s, index, keys);
  HWY_DYNAMIC_DISPATCH(PackTile)(s.code, t.x, tile);
}

bool CodeTells(const IndexTables& index, const CodeErrors& errors) {
  return errors.residual2 <= index.residual_limit && errors.noise2 <= index.noise_limit;
}

void EncodeBalanced(const Storage& s, const IndexTables& index, const float* keys, uint8_t* tile) {
  Tile t;
  t.Encode(s, index, keys);
  HWY_DYNAMIC_DISPATCH(PackTile)(s.code, t.x, tile);
  t.FindErrors(s, index);
  for (int i = 0; i < kTileTokens; ++i) {
    if (!CodeTells(index, {t.residual2[i], t.noise2[i]})) SetOutlier(s.code, i, tile);
  }
}

void FindCodeErrors(const Storage& s, const IndexTables& index, const float* keys, int64_t count,
                    CodeErrors* out) {
  alignas(64) float last[kTileTokens * kMaxDim];
  const int dim = s.row.dim_k;
  Tile t;
  for (int64_t i = 0; i < count; i += kTileTokens) {
    const int n = static_cast<int>(std::min<int64_t>(kTileTokens, count - i));
    const float* tile = keys + i * dim;
    if (n < kTileTokens) {
      std::copy_n(tile, n * dim, last);
      std::fill(last + n * dim, last + kTileTokens * dim, 0.f);
      tile = last;
    }
    t.Encode(s, index, tile);
    t.FindErrors(s, index);
    for (int j = 0; j < n; ++j) out[i + j] = {t.residual2[j], t.noise2[j]};
  }
}

void Encode(const EncodeParams& p, Workers* workers) {
  ParallelFor(workers, (p.end - p.begin) / kTileTokens,
              [&](int64_t tile) { EncodeTile(p, p.begin + tile * kTileTokens); });
}

}  // namespace vattn::cpu
#endif
