// Online softmax states: sums over some tokens of e v, e and e |v|^2, with e = exp(s - max), which
// merge.
#ifndef VATTN_KERNELS_SOFTMAX_H_
#define VATTN_KERNELS_SOFTMAX_H_

#include <cmath>

#include "kernels/host_device.h"

namespace vattn {

// The floats of a state.
VATTN_HD constexpr int StateFloats(int dim_v) { return dim_v + 3; }

// A view of the state of one query head. F: float, or const float.
template <class F>
struct StateView {
  F* numerator;  // [dim_v] sum of e v
  F* sums;       // max, sum of e, sum of e |v|^2

  VATTN_HD StateView(F* at, int dim_v) : numerator(at), sums(at + dim_v) {}
  VATTN_HD F& max() const { return sums[0]; }
  VATTN_HD F& denominator() const { return sums[1]; }
  VATTN_HD F& value_norm2() const { return sums[2]; }
};
using SoftmaxState = StateView<float>;
using ConstSoftmaxState = StateView<const float>;

// States merge in the unit exp(unit), with `unit` the largest max of all: the sums of each, times this
// factor, are added. A state without tokens, whose denominator is 0, adds nothing, whatever its max.
VATTN_HD inline float MergeFactor(float max, float denominator, float unit) {
  return denominator == 0 ? 0 : std::exp(max - unit);
}

}  // namespace vattn

#endif  // VATTN_KERNELS_SOFTMAX_H_
