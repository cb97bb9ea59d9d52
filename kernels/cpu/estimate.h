// Attention over a weighted draw of the middle: logits of new rows, and the estimate of the output.
#ifndef VATTN_KERNELS_CPU_ESTIMATE_H_
#define VATTN_KERNELS_CPU_ESTIMATE_H_

#include "kernels/cpu/verify.h"
#include "kernels/params.h"

namespace vattn::cpu {

class Workers;

// Reads places [from, draw.count) of the list: their rows, logits and |v|^2, and with value codes |v^|^2
// and v . v^.
void ReadDraw(const Storage& storage, const Group& group, const Draw& draw, int64_t from,
              Workers* workers);

// Brings scratch.head[h].shift up to the largest logit of the draw, and the sums with it.
void RaiseShift(const Group& group, const Draw& draw);

// Sinks and window (states) and, with value codes, the codes' answer for the whole middle, as states
// base [G][dim_v + 3] in the unit of head.shift.
void MakeBase(const Storage& storage, const Group& group, const float* states, float* base);

// The outputs [G][dim_v] of base plus the draw with weights 1 / pi (METHOD.md, "Estimator"). Fills
// head.denominator, unseen, value_norm2 and least_ref.
void Estimate(const Storage& storage, const Promise& promise, const Group& group, const Draw& draw,
              const float* base, float* outputs);

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_ESTIMATE_H_
