// Softmax states on the CPU (kernels/softmax.h), and rows of exponentials.
#ifndef VATTN_KERNELS_CPU_SOFTMAX_H_
#define VATTN_KERNELS_CPU_SOFTMAX_H_

#include "kernels/softmax.h"

namespace vattn::cpu {

void ResetState(SoftmaxState state, int dim_v);
// Brings the state to the unit exp(max); max at least its own.
void RescaleState(SoftmaxState state, int dim_v, float max);
// into += from.
void MergeState(SoftmaxState from, int dim_v, SoftmaxState into);

// out[i] = exp(x[i] - shift) for count elements, in whole vectors: both hold a multiple of 16.
// Returns the sum of the count.
float ExpRow(const float* x, int count, float shift, float* out);
// Largest of count > 0 elements.
float MaxRow(const float* x, int count);

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_SOFTMAX_H_
