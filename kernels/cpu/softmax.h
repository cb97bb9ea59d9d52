// Online softmax states: sums of e v and e relative to a running maximum, which merge.
#ifndef VATTN_KERNELS_CPU_SOFTMAX_H_
#define VATTN_KERNELS_CPU_SOFTMAX_H_

#include <cstdint>

namespace vattn::cpu {

// State of one query head over some tokens, in units of exp(max): a view of dim_v + 3 floats.
struct SoftmaxState {
  float* numerator;  // [dim_v] sum of e v
  float* tail;       // max, sum of e, sum of e |v|^2

  SoftmaxState(float* at, int dim_v) : numerator(at), tail(at + dim_v) {}
  float& max() const { return tail[0]; }
  float& denominator() const { return tail[1]; }
  float& value_norm2() const { return tail[2]; }
};

constexpr int64_t StateFloats(int dim_v) { return dim_v + 3; }

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
