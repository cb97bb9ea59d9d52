// The baseline policies: top-k by index score, and vAttention (top-k plus a uniform sample, arXiv
// 2510.05688) as ALGORITHM 7 states it. Written plainly: they are yardsticks.
#ifndef VATTN_KERNELS_CPU_TOPK_H_
#define VATTN_KERNELS_CPU_TOPK_H_

#include "kernels/params.h"

namespace vattn::cpu {

void DecodeTopK(const Storage& storage, const Promise& promise, Group& group, Stream stream);

// Sums over a uniform sample of the residual (the middle without the head's top-k).
struct SampleMoments {
  double e = 0;         // mean of e
  double e2 = 0;        // mean of e^2
  double ev_norm2 = 0;  // |mean of e v|^2
  double ev2 = 0;       // mean of |e v|^2
};

// Rows to sample so that the target is met with probability 1 - delta (two-sided normal quantile z),
// from the moments of a base sample: residual tokens n, exact part plus n * mean as denominator and
// numerator norm. Finite population correction, at least `base`, at most n (then it is exact).
int64_t SampleBudget(Target target, float epsilon, float z, int64_t n, int64_t base,
                     const SampleMoments& moments, double denominator, double numerator_norm);

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_TOPK_H_
