// Sizes that an operation and the working memory carved for it (scratch.cc) have to agree on.
#ifndef VATTN_KERNELS_CPU_SCRATCH_H_
#define VATTN_KERNELS_CPU_SCRATCH_H_

#include <cstdint>

#include "kernels/geometry.h"

namespace vattn::cpu {

// A pass over estimates sums this many blocks at a time. The cut is the same whatever the number of
// threads, so that sums do not depend on it.
constexpr int kSegmentBlocks = 16;

// Places behind the places of a segment's tokens: a draw writes whole vectors, past its last token.
constexpr int kDrawSlack = 64;

// Dense attention sums this many tokens at a time, whatever the number of threads.
constexpr int64_t kSegmentTokens = 2048;

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_SCRATCH_H_
