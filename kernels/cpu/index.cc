#include "kernels/cpu/index.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/encode.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/scan.h"

namespace vattn::cpu {
namespace {

void ScoreExact(const Storage& s, const Group& group, const BlockPart& part, float* scores) {
  const std::byte* block = s.base + group.blocks[part.block] * s.block.bytes;
  const uint8_t* rows[kBlockTokens];
  for (int t = part.begin; t < part.end; ++t) {
    rows[t] = reinterpret_cast<const uint8_t*>(block) + int64_t{t} * s.row.row_bytes;
  }
  DotRows({.rows = rows + part.begin,
           .count = part.end - part.begin,
           .offset = 0,
           .dim = s.row.dim_k,
           .dtype = s.row.dtype},
          group.scratch.query, group.group_heads, scores + part.begin, kBlockTokens);
}

// Minus infinity would mean that a token is not in the middle, and it would never be drawn.
void CopyExternal(const Storage&, const Group& group, const BlockPart& part, float* scores) {
  constexpr float kLeast = std::numeric_limits<float>::lowest();
  const int64_t first =
      (part.block * kBlockTokens + part.begin) * ElementBytes(group.external_dtype);
  for (int g = 0; g < group.group_heads; ++g) {
    const uint8_t* const from = static_cast<const uint8_t*>(group.external[g]) + first;
    float* const to = scores + int64_t{g} * kBlockTokens;
    LoadRows({.rows = &from,
              .count = 1,
              .offset = 0,
              .dim = part.end - part.begin,
              .dtype = group.external_dtype},
             to + part.begin);
    std::replace(to + part.begin, to + part.end, -INFINITY, kLeast);
  }
}

constexpr IndexFunctions kLevels = {EncodeLevels, PackQueries, ScoreLevels};
constexpr IndexFunctions kFunctions[] = {
    {EncodeBalanced, PackQueries, ScoreLevels},        // kBalanced
    {nullptr, nullptr, ScoreExact},                    // kExact
    kLevels,                                           // kSign
    kLevels,                                           // kHadamard2
    {EncodeBounds, PreparePages, ScorePages},          // kPage
    {EncodeMeans, PreparePages, ScorePages},           // kPooled
    {EncodeClusters, PrepareClusters, ScoreClusters},  // kClusters
    {nullptr, nullptr, CopyExternal},                  // kExternal
};

}  // namespace

const IndexFunctions& FunctionsOf(IndexKind kind) { return kFunctions[static_cast<int>(kind)]; }

void PrepareQueries(const Storage& s, IndexKind kind, Group& group) {
  if (FunctionsOf(kind).prepare != nullptr) FunctionsOf(kind).prepare(s, group);
}

float QueryNorm(const Storage& s, const Group& group, int head) {
  const float* q = group.scratch.query + int64_t{head} * s.row.dim_k;
  double sum = 0;
  for (int c = 0; c < s.row.dim_k; ++c) sum += static_cast<double>(q[c]) * q[c];
  return static_cast<float>(std::sqrt(sum));
}

}  // namespace vattn::cpu
