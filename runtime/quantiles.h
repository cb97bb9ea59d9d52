// Quantiles behind the certificate (METHOD.md, "Certificate").
#ifndef VATTN_RUNTIME_QUANTILES_H_
#define VATTN_RUNTIME_QUANTILES_H_

#include "kernels/params.h"

namespace vattn {

// The share of delta that look `look` (from 1) of `max_looks` may spend; they sum to delta. The
// first two get fixed parts, the first of them little if it is a pilot for the second, look k of
// the others one in proportion to 1 / ((k - 1) (k - 2)).
double LookDelta(double delta, int look, int max_looks, bool pilot);

// Sharp: sqrt(chi2_r(1 - delta) / r), r the effective rank of the error. Safe: max(1, Phi^-1(1 -
// delta / 2)), valid for errors of any dimension while delta <= .215.
double SharpQuantile(double delta, double rank);
double SafeQuantile(double delta);

// Phi^-1(1 - delta / 2).
double TwoSidedNormalQuantile(double delta);

// Fills table[look - 1][bin] for Promise::quantile: bin / kQuantileBins = 1 / rank.
void FillQuantiles(Bound bound, double delta, int max_looks, bool pilot,
                   float (*table)[kQuantileBins + 1]);

}  // namespace vattn

#endif  // VATTN_RUNTIME_QUANTILES_H_
