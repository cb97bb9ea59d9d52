// Poisson sampling of the middle (METHOD.md, "Selection"): predicted variance of given multipliers,
// and the draw.
#ifndef VATTN_KERNELS_CPU_SAMPLE_H_
#define VATTN_KERNELS_CPU_SAMPLE_H_

#include "kernels/params.h"

namespace vattn::cpu {

class Workers;

// What the inclusion probability pi of a token is made of. With e^_h = estimate * exp(shift) of the
// token and head h,
//   weight^2 = sum_h (gain_h * e^_h + floor_h)^2,   pi = min(1, scale * weight),
// and pi = 1 if ln e^_h >= sure_h of the token's segment for any head. gain and floor contain the
// square root of the head's multiplier.
struct Inclusion {
  const float* log_gain = nullptr;  // [G]
  const float* floor = nullptr;     // [G]
  const float* sure = nullptr;      // [segments][G], or null: no token is sure
  float scale = 1;
};

// The same in the unit of one block's estimates: gain [G] * estimate is gain_h e^_h, and pi = 1 if
// estimate >= sure [G] for any head.
struct BlockWeights {
  const float* gain = nullptr;
  const float* sure = nullptr;
  const float* floor = nullptr;
};

// Predicts the variance of every head, times its multiplier,
//   variance[h] = sum_i (gain_h e^_hi)^2 (1 - pi_i) / pi_i,
// and returns the expected number of tokens drawn. It looks at one tile of 16 tokens in `stride`, from
// tile `phase` on, and scales the sums up.
float PredictVariance(const Group& group, const Inclusion& inclusion, int stride, int phase,
                      float* variance, Workers* workers);

// Appends the tokens with previous_scale * weight <= u < scale * weight, in ascending order, and their
// weights to scratch.token and scratch.weight after the first `count`. previous_scale 0: all tokens
// with u < scale * weight. Returns the new count.
//
// kept saves passes when other draws of the same weights and random numbers may follow: pass a
// pointer to 0 to the first draw and the same pointer to the others. The first draw then leaves
// candidates in the sparse arrays, and draws of scales up to *kept look at these alone. They find the
// same tokens in the same order as without `kept`.
int64_t DrawTokens(const Group& group, const Inclusion& inclusion, float previous_scale,
                   Randomness randomness, int64_t count, Workers* workers, float* kept = nullptr);

// Makes the first `count` drawn tokens exact: each has inclusion probability 1 from now on, and its
// estimate is taken out of the scan, so that no later draw finds it again.
void FixDrawn(const Group& group, int64_t count);

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_SAMPLE_H_
