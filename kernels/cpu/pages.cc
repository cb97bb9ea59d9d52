// kPage (Quest, Tang et al., ICML 2024) and kPooled (the compressed keys of NSA and InfLLM-v2):
// codes that speak for a tile of 16 tokens. Quest's bound sum_c max(q_c least_c, q_c largest_c) is
// the product of
// | positive elements of q | negative ones | with | largest | least |, so both kinds score rows in
// bf16.
#include <algorithm>
#include <bit>
#include <cstring>

#include "kernels/cpu/index.h"
#include "kernels/cpu/rows.h"

namespace vattn::cpu {
namespace {

constexpr int kTiles = kBlockTokens / kTileTokens;

// The nearest bf16 that is not below x; NaN and infinities stay what they are.
uint16_t RoundUp(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  // Positive and finite: truncation lowers it
  const bool up = (bits & 0xffff) != 0 && bits < 0x7f800000u;
  return static_cast<uint16_t>((bits >> 16) + (up ? 1 : 0));
}
uint16_t RoundDown(float x) { return RoundUp(-x) ^ 0x8000; }

}  // namespace

void EncodeBounds(const Storage& s, const IndexTables&, const float* keys, uint8_t* tile) {
  const int dim = s.row.dim_k;
  uint16_t bounds[2 * kMaxDim];
  for (int c = 0; c < dim; ++c) {
    float least = keys[c], largest = keys[c];
    for (int t = 1; t < kTileTokens; ++t) {
      least = std::min(least, keys[t * dim + c]);
      largest = std::max(largest, keys[t * dim + c]);
    }
    bounds[c] = RoundUp(largest);
    bounds[dim + c] = RoundDown(least);
  }
  std::memcpy(tile, bounds, static_cast<size_t>(dim) * 2 * sizeof(uint16_t));
}

void EncodeMeans(const Storage& s, const IndexTables&, const float* keys, uint8_t* tile) {
  const int dim = s.row.dim_k;
  float mean[kMaxDim];
  for (int c = 0; c < dim; ++c) {
    float sum = 0;
    for (int t = 0; t < kTileTokens; ++t) sum += keys[t * dim + c];
    mean[c] = sum / kTileTokens;
  }
  StoreRow(mean, dim, DType::kBF16, tile);
}

void PreparePages(const Storage& s, Group& group) {
  const int dim = s.row.dim_k, floats = PreparedFloats(s);
  const IndexTables& index = group.index;
  for (int g = 0; g < group.group_heads; ++g) {
    const float* q = group.scratch.query + int64_t{g} * dim;
    float* out = group.scratch.prepared + int64_t{g} * floats;
    float offset = index.intercept * QueryNorm(s, group, g);
    for (int c = 0; c < dim; ++c) {
      offset += q[c] * index.center[c];
      out[c] = index.slope * q[c];
      if (floats == dim) continue;
      out[dim + c] = index.slope * std::min(q[c], 0.f);
      out[c] = index.slope * std::max(q[c], 0.f);
    }
    group.scratch.packed[g / 8].offset[g % 8] = offset;
  }
}

void ScorePages(const Storage& s, const Group& group, const BlockPart& part, float* scores) {
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(
      s.base + group.blocks[part.block] * s.block.bytes + s.block.codes);
  const int first = part.begin / kTileTokens, count = part.end / kTileTokens - first;
  const uint8_t* rows[kTiles];
  for (int t = 0; t < count; ++t)
    rows[t] = codes + int64_t{first + t} * kTileTokens * s.code.bytes();
  constexpr int kHeads = 8;
  float raw[kHeads * kTiles];
  for (int g = 0; g < group.group_heads; g += kHeads) {
    const int heads = std::min(kHeads, group.group_heads - g);
    DotRows({.rows = rows,
             .count = count,
             .offset = 0,
             .dim = PreparedFloats(s),
             .dtype = DType::kBF16},
            group.scratch.prepared + int64_t{g} * PreparedFloats(s), heads, raw, kTiles);
    for (int h = 0; h < heads; ++h) {
      const float offset = group.scratch.packed[g / 8].offset[h];
      for (int t = 0; t < count; ++t) {
        std::fill_n(scores + (g + h) * kBlockTokens + part.begin + t * kTileTokens, kTileTokens,
                    raw[h * kTiles + t] + offset);
      }
    }
  }
}

}  // namespace vattn::cpu
