// A decode step of a slice of a context, whose other slices other ranks have (METHOD.md, "Several
// ranks"): the same work as decode.h, cut where the ranks exchange their records.
#ifndef VATTN_KERNELS_CPU_RANKS_H_
#define VATTN_KERNELS_CPU_RANKS_H_

#include "kernels/params.h"

namespace vattn::cpu {

class Workers;

// Scans every group and writes what it expects to its records (kernels/merge.h).
void Forecast(const DecodeParams& params, Workers* workers);

// Goes on from the records of all ranks, group.gathered: takes the first look, or judges the last one,
// and either writes the answer (slice->next is kDone then), looks again or reads the slice whole.
// Renews the records.
void LookOn(const DecodeParams& params, Workers* workers);

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_RANKS_H_
