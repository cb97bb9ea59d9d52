#include "kernels/cpu/softmax.h"

#include <algorithm>
#include <cmath>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/softmax.cc"
// Highway's order, which is not the alphabet's.
// clang-format off
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include <hwy/contrib/math/math-inl.h>
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace vattn::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));

float ExpRow(const float* x, int count, float shift, float* out) {
  const D d;
  auto sum = hn::Zero(d);
  for (int i = 0; i < count; i += kLanes) {
    const auto e = hn::Exp(d, hn::Sub(hn::LoadU(d, x + i), hn::Set(d, shift)));
    hn::StoreU(e, d, out + i);
    sum = hn::Add(sum, hn::IfThenElseZero(hn::FirstN(d, count - i), e));
  }
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

float MaxRow(const float* x, int count) {
  const D d;
  auto most = hn::Set(d, x[0]);
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) most = hn::Max(hn::LoadU(d, x + i), most);
  float all = hn::GetLane(hn::MaxOfLanes(d, most));
  for (; i < count; ++i) all = std::max(all, x[i]);
  return all;
}

}  // namespace vattn::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vattn::cpu {

HWY_EXPORT(ExpRow);
HWY_EXPORT(MaxRow);

float ExpRow(const float* x, int count, float shift, float* out) {
  return HWY_DYNAMIC_DISPATCH(ExpRow)(x, count, shift, out);
}

float MaxRow(const float* x, int count) { return HWY_DYNAMIC_DISPATCH(MaxRow)(x, count); }

void ResetState(SoftmaxState state, int dim_v) {
  std::fill(state.numerator, state.numerator + dim_v, 0.f);
  state.max() = -std::numeric_limits<float>::infinity();
  state.denominator() = 0;
  state.value_norm2() = 0;
}

void RescaleState(SoftmaxState state, int dim_v, float max) {
  if (state.max() == max) return;
  const float factor = std::exp(state.max() - max);
  for (int j = 0; j < dim_v; ++j) state.numerator[j] *= factor;
  state.denominator() *= factor;
  state.value_norm2() *= factor;
  state.max() = max;
}

void MergeState(SoftmaxState from, int dim_v, SoftmaxState into) {
  if (from.denominator() == 0) return;
  RescaleState(into, dim_v, std::max(from.max(), into.max()));
  const float factor = MergeFactor(from.max(), from.denominator(), into.max());
  for (int j = 0; j < dim_v; ++j) into.numerator[j] += factor * from.numerator[j];
  into.denominator() += factor * from.denominator();
  into.value_norm2() += factor * from.value_norm2();
}

}  // namespace vattn::cpu
#endif
