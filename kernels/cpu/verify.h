// The certificate (METHOD.md, "Certificate"): estimated error of a weighted draw, and how much more
// to draw.
#ifndef VATTN_KERNELS_CPU_VERIFY_H_
#define VATTN_KERNELS_CPU_VERIFY_H_

#include "kernels/params.h"
#include "kernels/sampling.h"

namespace vattn::cpu {

// A draw as the certificate sees it. Token i of the list has logit s_i, inclusion probability
// min(1, scale * weight_i) and, per head, e_i = exp(s_i - shift) and e^_i in the same unit.
struct Draw {
  int64_t count = 0;  // of scratch.token, weight, row, logit, predicted_e
  float scale = 1;
};

// Fills scratch.tail with the places of tokens with pi < 1; returns their number.
int64_t ListTail(const Group& group, const Draw& draw);

// v . o, and with value codes v^ . o, of each token of the tail and output o of outputs [G][dim_v], to
// scratch.dot and code_dot.
void DotTail(const Storage& storage, const Group& group, int64_t tail, const float* outputs);

// The sums of the certificate over the tail of one head with output o [dim_v], and the mean squared
// cosine of its residuals (-1 if there are no two). `dots` holds v . o of each token of the tail. Leaves
// residuals for Growth. Follows Estimate and needs what it left, as VerifyHead. weights [tail], unless
// null, gets c_i of kernels/merge.h, without value codes; it may be the place of the dots.
TailSums SumTail(const Storage& storage, const Group& group, const Draw& draw, int64_t tail,
                 int head, const float* output, const float* dots, float* cos2,
                 float* weights = nullptr);

// Writes variance, effective rank, z and bound of one head with output o [dim_v] to scratch.head[head],
// and renews the head's spread, eta2 and cos2 in group.state. `dots` holds v . o of each token of
// the tail. Follows Estimate and needs what it left: scratch.scaled = e / pi, or scratch.predicted_e with
// value codes, where scratch.code_dot must hold v^ . o of the tail as well. z comes from row `look`
// - 1 of the promise's quantiles.
void VerifyHead(const Storage& storage, const Promise& promise, const Group& group,
                const Draw& draw, int64_t tail, int look, int head, const float* output,
                const float* dots);

// The variance that one head is expected to have once all inclusion probabilities are `by` times what
// they are; from the residuals of SumTail.
float GrownVariance(const Group& group, const Draw& draw, int64_t tail, int head, float by);

// The least factor on all inclusion probabilities for which every head is expected to pass at look
// `look` (METHOD.md, "Looks"); at least 1.05, at most 64.
float Growth(const Promise& promise, const Group& group, const Draw& draw, int64_t tail, int look);

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_VERIFY_H_
