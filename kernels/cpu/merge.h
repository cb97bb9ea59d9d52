// Merging the records of several ranks (kernels/merge.h).
#ifndef VATTN_KERNELS_CPU_MERGE_H_
#define VATTN_KERNELS_CPU_MERGE_H_

#include "kernels/merge.h"

namespace vattn::cpu {

// The joint output o' [dim_v] of one head from the records of `ranks` ranks, `stride` floats apart, and
// the sums of its certificate. Returns |o'|^2.
float MergeRecords(const float* records, int64_t stride, int ranks, int dim_v, float* output,
                   JointSums& sums);

// Output, lse, verdict and error of every head from the records of all ranks.
void Merge(const MergeParams& params);

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_MERGE_H_
