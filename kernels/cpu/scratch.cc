// Carves a group's working memory from one range. ScratchBytes counts with the same code that
// carves, so that both agree.
#include "kernels/cpu/scratch.h"

#include <algorithm>

#include "kernels/cpu/softmax.h"
#include "kernels/params.h"
#include "kernels/sampling.h"

namespace vattn {
namespace {

// Hands out pieces of memory; with a null base it only counts.
struct Carver {
  std::byte* base;
  size_t used = 0;

  template <class T>
  T* Take(int64_t count) {
    T* at = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;  // a vector of slack
    return at;
  }
};

Scratch Carve(const Storage& s, const Promise& promise, int64_t tokens, int group_heads,
              Carver& c) {
  const int64_t heads = group_heads;
  const int64_t blocks = BlocksFor(tokens) + 1;
  const int64_t n = blocks * kBlockTokens;
  const int64_t segments = blocks / cpu::kSegmentBlocks + 2;
  const int64_t sparse = n + segments * cpu::kDrawSlack;
  const bool ranking = promise.policy == Policy::kTopK || promise.policy == Policy::kTopKUniform;
  Scratch w;
  w.stride = n;
  w.estimate = c.Take<uint16_t>(blocks * heads * kBlockTokens);
  w.shift = c.Take<float>(blocks * heads);
  w.mass = c.Take<float>(blocks * heads);
  w.score = c.Take<float>(ranking ? heads * n : 0);
  w.token = c.Take<uint32_t>(n);
  w.weight = c.Take<float>(n);
  w.sparse_token = c.Take<uint32_t>(sparse);
  w.sparse_weight = c.Take<float>(sparse);
  w.logit = c.Take<float>(heads * n);
  w.predicted_e = c.Take<float>(s.value_bits > 0 ? heads * n : 0);
  w.scaled = c.Take<float>(heads * n);
  w.residual = c.Take<float>(heads * n);
  w.dot = c.Take<float>(heads * n);
  w.value_norm2 = c.Take<float>(n);
  const int64_t coded = s.value_bits > 0 ? n : 0;
  w.code_norm2 = c.Take<float>(coded);
  w.cross = c.Take<float>(coded);
  w.code_dot = c.Take<float>(heads * coded);
  w.row = c.Take<const uint8_t*>(n);
  w.tail = c.Take<uint32_t>(n);
  w.query = c.Take<float>(heads * s.row.dim_k);
  const bool balanced = s.code.kind == IndexKind::kBalanced;
  const int64_t index_segments = balanced ? std::min<int64_t>(kMaxSegments, blocks) : 1;
  w.packed_stride = static_cast<int32_t>((heads + 7) / 8);
  w.packed = c.Take<PackedQueries>(index_segments * w.packed_stride);
  if (balanced) w.noise = c.Take<float>(index_segments * heads);
  if (balanced) w.sure = c.Take<float>(index_segments * heads);
  w.prepared = c.Take<float>(heads * PreparedFloats(s));
  w.head = c.Take<HeadWork>(heads);
  w.tops = c.Take<float>(heads * kTopBins);
  w.log_gain = c.Take<float>(heads);
  w.floor = c.Take<float>(heads);
  w.state = c.Take<float>((n / cpu::kSegmentTokens + 2) * heads * StateFloats(s.row.dim_v));
  w.sums = c.Take<float>(segments * (heads + 2));
  w.work = c.Take<float>(5 * heads * StateFloats(s.row.dim_v));
  return w;
}

}  // namespace

size_t ScratchBytes(const Storage& s, const Promise& promise, int64_t tokens, int group_heads) {
  Carver c{nullptr};
  Carve(s, promise, tokens, group_heads, c);
  return c.used;
}

Scratch CarveScratch(const Storage& s, const Promise& promise, int64_t tokens, int group_heads,
                     std::byte* memory) {
  Carver c{memory};
  return Carve(s, promise, tokens, group_heads, c);
}

}  // namespace vattn
