// The plan of a draw (METHOD.md, "Selection"): multipliers for which every head is expected to meet
// its bound.
#ifndef VATTN_KERNELS_CPU_PLAN_H_
#define VATTN_KERNELS_CPU_PLAN_H_

#include "kernels/cpu/sample.h"
#include "kernels/params.h"
#include "kernels/sampling.h"

namespace vattn::cpu {

class Workers;

struct Plan {
  Inclusion inclusion;
  float expected = 0;    // tokens drawn
  bool feasible = true;  // false: more than max_selected_share of the middle would be needed
  // The sure tokens alone exceed that share: what codes leave out could hold anything.
  bool noisy = false;
};

// Sums the estimates of the scan: scratch.head[h].shift, mass, top, denominator and fixed_norm2. states
// [G][dim_v + 3] are those of sinks and window.
void SumEstimates(const Storage& storage, const Group& group, const float* states);

// Renews the multipliers in group.state and returns what to draw with. outlooks [G]: of the whole
// context, of which the group has a slice; null: the group has it whole.
Plan MakePlan(const Storage& storage, const Promise& promise, const Group& group, Workers* workers,
              const Outlook* outlooks = nullptr);

// Learns rho and z from the planned draw. Call it after the certificate of the first look.
void Learn(const Promise& promise, const Group& group);

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_PLAN_H_
