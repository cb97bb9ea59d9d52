// The working memory of a group, carved from one range: by the host, and on the device for the steps
// over an engine's pool.
#ifndef VATTN_KERNELS_CUDA_SCRATCH_CUH_
#define VATTN_KERNELS_CUDA_SCRATCH_CUH_

#include "kernels/cuda/rank.cuh"
#include "kernels/cuda/team.cuh"
#include "kernels/cuda/values.h"

namespace vattn::cuda {

// Hands out pieces of memory; with a null base it only counts.
struct ScratchCarver {
  std::byte* base;
  size_t used = 0;

  template <class T>
  VATTN_HD void Take(int64_t count, T*& at) {
    at = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
  }
};

VATTN_HD inline bool Ranked(const Promise& promise) {
  return promise.policy == Policy::kTopK || promise.policy == Policy::kTopKUniform;
}

// A draw takes more rows than the plan expects by chance: kListMargin times as many, and kListSlack
// rows, have room (METHOD.md, "Speed"). A draw that does not fit fails its heads.
constexpr double kListMargin = 1.1;
constexpr int64_t kListSlack = 4096;

// Rows that a draw may hold. With top-k all tokens have room.
VATTN_HD inline int64_t ListCapacity(const Promise& promise, int64_t tokens) {
  if (Ranked(promise)) return tokens;
  const auto share =
      static_cast<int64_t>(kListMargin * promise.max_selected_share * static_cast<double>(tokens)) +
      kListSlack;
  return share < tokens ? share : tokens;
}

// Bytes of working memory of a group, and its parts carved from `memory` (null: nothing is carved).
VATTN_HD inline size_t CarveGroup(const Storage& s, const Promise& promise, int64_t tokens,
                                  int group_heads, int team, std::byte* memory, GroupScratch& w) {
  ScratchCarver c{memory};
  const int64_t heads = group_heads, blocks = BlocksFor(tokens);
  const int64_t floats = StateFloats(s.row.dim_v);
  w.capacity = (ListCapacity(promise, tokens) + 63) / 64 * 64;
  const bool ranks = Ranked(promise), uniform = promise.policy == Policy::kTopKUniform;
  const int64_t sampled = promise.policy == Policy::kVerified ? 1 : 0;
  c.Take(sampled * blocks * heads * kBlockTokens, w.estimate);
  c.Take(sampled * blocks * heads, w.shift);
  c.Take(sampled * blocks * heads, w.mass);
  c.Take(ranks || (sampled && ScoredBeforeScan(promise.index)) ? blocks * heads * kBlockTokens : 0,
         w.score);
  c.Take(sampled * blocks * kBlockTokens, w.candidate);
  c.Take(sampled * kMostSegments, w.candidates);
  c.Take(sampled * kMostSegments * (heads + 1), w.predicted);
  c.Take(heads, w.log_gain);
  c.Take(heads, w.floor);
  c.Take(w.capacity, w.token);
  c.Take(w.capacity, w.weight);
  c.Take(w.capacity, w.row);
  c.Take(w.capacity, w.slot);
  c.Take(w.capacity, w.norm2);
  c.Take(heads * w.capacity, w.logit);
  c.Take(sampled * heads * w.capacity, w.residual);
  c.Take(sampled * heads * w.capacity, w.term);
  c.Take(heads * s.row.dim_k, w.query);
  // An index has no more segments than there are blocks.
  const bool balanced = s.code.kind == IndexKind::kBalanced;
  const int64_t segments =
      balanced && blocks > 1 ? (blocks < kMaxSegments ? blocks : kMaxSegments) : 1;
  c.Take(segments * ((heads + 7) / 8), w.packed);
  if (balanced) c.Take(segments * heads, w.noise);
  if (balanced) c.Take(segments * heads, w.sure);
  c.Take(kFixedParts * heads * floats, w.fixed);
  c.Take((uniform ? kMostWalks : 1) * team * heads * floats, w.state);
  c.Take(int64_t{2} * team * MostTotals(group_heads), w.partial);
  c.Take(heads * s.row.dim_v, w.output);
  c.Take(heads, w.head);
  c.Take(heads, w.growth);
  c.Take(heads, w.state_of_token);
  c.Take(1, w.slice);
  c.Take(heads, w.outlook);
  c.Take(heads, w.log_others);
  c.Take(sampled * team * heads * s.row.dim_v, w.moment);
  const bool coded = s.value_bits > 0;
  const int64_t items = coded ? ValueItems(s, group_heads) : 0;
  c.Take(coded ? sampled * heads * w.capacity : 0, w.log_predicted_e);
  c.Take(coded ? sampled * heads * floats : 0, w.coded);
  c.Take(coded ? sampled * team * heads : 0, w.coded_mass);
  c.Take(sampled * items * kMostParts, w.value_part);
  c.Take(items, w.value_parts_done);
  const int64_t masks = ranks ? blocks * kMaskWords : 0;
  c.Take(heads * masks, w.top);
  c.Take(uniform ? heads * masks : 0, w.drawn);
  c.Take(masks, w.seen);
  c.Take(ranks ? kDigits * heads * kDigitBins : 0, w.histogram);
  c.Take(ranks ? team * kWarps * heads : 0, w.ties);
  c.Take(1, w.barrier);
  return c.used;
}

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_SCRATCH_CUH_
