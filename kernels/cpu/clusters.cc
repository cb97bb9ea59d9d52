// kClusters: a token's code is the number of its nearest centroid (RetroInfer, Tactic), whose score
// it has.
#include <algorithm>
#include <cstring>

#include "kernels/cpu/index.h"
#include "kernels/cpu/rows.h"

namespace vattn::cpu {
namespace {

constexpr int kAtOnce = 64;  // centroids

// f(first, count, products [heads][kAtOnce]) of the rows of `queries` with all centroids.
template <class F>
void ForCentroids(const Storage& s, const IndexTables& index, const float* queries, int heads,
                  float* products, F&& f) {
  for (int first = 0; first < s.code.centroids; first += kAtOnce) {
    const int count = std::min(kAtOnce, s.code.centroids - first);
    const uint8_t* rows[kAtOnce];
    for (int i = 0; i < count; ++i) {
      rows[i] =
          reinterpret_cast<const uint8_t*>(index.centroids + int64_t{first + i} * s.row.dim_k);
    }
    DotRows({.rows = rows, .count = count, .offset = 0, .dim = s.row.dim_k, .dtype = DType::kF32},
            queries, heads, products, kAtOnce);
    f(first, count);
  }
}

}  // namespace

void EncodeClusters(const Storage& s, const IndexTables& index, const float* keys, uint8_t* tile) {
  float products[kTileTokens * kAtOnce], best[kTileTokens];
  uint16_t nearest[kTileTokens] = {};
  ForCentroids(s, index, keys, kTileTokens, products, [&](int first, int count) {
    for (int i = 0; i < count; ++i) {
      const float* centroid = index.centroids + int64_t{first + i} * s.row.dim_k;
      float half = 0;
      for (int c = 0; c < s.row.dim_k; ++c) half += centroid[c] * centroid[c];
      half *= .5f;
      for (int t = 0; t < kTileTokens; ++t) {
        // Half of |key|^2 less its squared distance
        const float closeness = products[t * kAtOnce + i] - half;
        if (first + i == 0 || closeness > best[t]) {
          best[t] = closeness;
          nearest[t] = static_cast<uint16_t>(first + i);
        }
      }
    }
  });
  std::memcpy(tile, nearest, sizeof(nearest));
}

void PrepareClusters(const Storage& s, Group& group) {
  const int dim = s.row.dim_k, all = s.code.centroids;
  constexpr int kHeads = 8;
  float products[kHeads * kAtOnce];
  for (int g = 0; g < group.group_heads; g += kHeads) {
    const int heads = std::min(kHeads, group.group_heads - g);
    const float* queries = group.scratch.query + int64_t{g} * dim;
    float offset[kHeads];
    for (int h = 0; h < heads; ++h) {
      offset[h] = 0;
      for (int c = 0; c < dim; ++c) offset[h] += queries[h * dim + c] * group.index.center[c];
    }
    ForCentroids(s, group.index, queries, heads, products, [&](int first, int count) {
      for (int h = 0; h < heads; ++h) {
        float* out = group.scratch.prepared + int64_t{g + h} * all + first;
        for (int i = 0; i < count; ++i) out[i] = products[h * kAtOnce + i] + offset[h];
      }
    });
  }
}

void ScoreClusters(const Storage& s, const Group& group, const BlockPart& part, float* scores) {
  const std::byte* block = s.base + group.blocks[part.block] * s.block.bytes;
  const uint16_t* nearest = reinterpret_cast<const uint16_t*>(block + s.block.codes);
  for (int g = 0; g < group.group_heads; ++g) {
    const float* table = group.scratch.prepared + int64_t{g} * s.code.centroids;
    float* out = scores + int64_t{g} * kBlockTokens;
    for (int t = part.begin; t < part.end; ++t) out[t] = table[nearest[t]];
  }
}

}  // namespace vattn::cpu
