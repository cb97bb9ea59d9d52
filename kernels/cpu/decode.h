// One decode step of a batch of groups: scan, plan, draw, attend, verify, look again, fall back.
#ifndef VATTN_KERNELS_CPU_DECODE_H_
#define VATTN_KERNELS_CPU_DECODE_H_

#include "kernels/params.h"

namespace vattn::cpu {

class Workers;

void Decode(const DecodeParams& params, Workers* workers);
void Select(const SelectParams& params, Workers* workers);

// Attention over all rows for the listed heads of a group, ascending: states [num_heads][dim_v + 3] whose
// numerators are divided. scratch.query is used up.
void AttendWhole(const Storage& storage, const Group& group, const int32_t* heads, int num_heads,
                 float* states, Workers* workers, bool value_norms);
// Attention over all rows for the listed heads of a group, exact, written out with `verdict`.
void DecodeDense(const Storage& storage, const Group& group, const int32_t* heads, int num_heads,
                 Verdict verdict, Workers* workers);
// The same for every head.
void DecodeAllDense(const Storage& storage, Group& group, Verdict verdict, Workers* workers);

// States [G][dim_v + 3] of sinks and window, from scratch.query.
void AttendFixed(const Storage& storage, const Group& group, float* states, Workers* workers);

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_DECODE_H_
