// The ranking part of the top-k policies on CUDA (kernels/cuda/rank.cuh) by itself, on given
// scores.
#ifndef VATTN_TESTS_CUDA_CUDA_RANK_H_
#define VATTN_TESTS_CUDA_CUDA_RANK_H_

#include <cstdint>
#include <vector>

#include "kernels/rng.h"

namespace vattn::test {

// A group of `heads` heads whose middle is [begin, end), ranked by `team` thread blocks: the best k
// by score, then of the rest the `base` first by random number, then those that make them `budget`.
struct RankInput {
  int heads = 1, team = 1;
  int64_t begin = 16, end = 16;
  uint32_t k = 0, base = 1;
  std::vector<uint32_t> budget = {};  // [heads], each at least base
  std::vector<float> score = {};      // [heads][end - begin]
  RandomKey key = {};
  uint64_t step = 0;
  uint32_t refresh = 64;
};

struct RankOutput {
  static constexpr int kLists = 3;
  std::vector<uint8_t> marked[kLists];  // [heads][end - begin] best; base sample; added to it
  std::vector<uint32_t> list[kLists];   // tokens that any head marked
  int64_t distinct = 0;                 // tokens in any list
};

// Throws if CUDA fails or the team is not resident at a time.
RankOutput RankOnDevice(const RankInput& input);

}  // namespace vattn::test

#endif  // VATTN_TESTS_CUDA_CUDA_RANK_H_
