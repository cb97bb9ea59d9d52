// Poisson sampling of the middle (METHOD.md, "Selection"): predicted variance of given multipliers,
// and the draw.
#ifndef VATTN_KERNELS_CPU_SAMPLE_H_
#define VATTN_KERNELS_CPU_SAMPLE_H_

#include "kernels/params.h"

namespace vattn::cpu {

// What inclusion probabilities are made of. With e^ = estimate * exp(shift) of a token and head,
//   weight^2 = sum_h (gain_h * e^_h + floor_h)^2,   pi = min(1, scale * weight),
// gain and floor hold the square root of the head's multiplier.
// and pi = 1 where ln e^_h >= sure_h of the token's segment for any head.
struct Inclusion {
  const float* log_gain = nullptr;  // [G]
  const float* floor = nullptr;     // [G]
  const float* sure = nullptr;      // [segments][G], or null: no token is sure
  float scale = 1;
};

// The same for one block, with its shift: gain_h e^_h = gain [G] * estimate, and pi = 1 where
// estimate >= sure [G].
struct BlockWeights {
  const float* gain = nullptr;
  const float* sure = nullptr;
  const float* floor = nullptr;
};

// One tile of 16 tokens in `stride` is looked at, starting with tile `phase`; sums are scaled up.
//   variance[h] = sum_i (gain_h e^_hi)^2 (1 - pi_i) / pi_i    (to be divided by the multiplier)
// Returns the expected number of tokens drawn.
float PredictVariance(const Group& group, const Inclusion& inclusion, int stride, int phase,
                      float* variance, Stream stream);

// Appends the tokens with previous_scale * weight <= u < scale * weight, ascending, with their
// weights to scratch.token and scratch.weight after the first `count`; previous_scale 0: all below
// scale * weight. Returns the new count. A draw that may be followed by others of the same weights
// and random numbers gets `kept`, 0 at first: it then leaves its candidates in the sparse arrays,
// and draws of scales up to *kept need no more than those. They find the same tokens in the same
// order.
int64_t DrawTokens(const Group& group, const Inclusion& inclusion, float previous_scale,
                   Randomness randomness, int64_t count, Stream stream, float* kept = nullptr);

// Makes the first `count` drawn tokens exact: each has inclusion probability 1 from now on, and its
// estimate leaves the scan, so that no later draw meets it.
void FixDrawn(const Group& group, int64_t count);

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_SAMPLE_H_
