// The few statistics that the reports are made of.
#ifndef VATTN_BENCH_CLI_STATISTICS_H_
#define VATTN_BENCH_CLI_STATISTICS_H_

#include <cstdint>
#include <vector>

namespace vattn::bench {

// NaN for an empty list.
double Mean(const std::vector<double>& values);
// Linear between the two nearest order statistics, as numpy does. q in [0, 1]; NaN for an empty
// list.
double Quantile(std::vector<double> values, double q);
// Exact one-sided upper bound on a probability after `failures` of `trials` (Clopper-Pearson). 1
// without trials.
double ClopperPearsonUpper(int64_t failures, int64_t trials, double confidence);
// The same for clusters whose trials depend on each other: `failed` is the sum over independent
// clusters of each one's share of failures. Bentkus (2004): the tail of a sum of independent
// variables within [0, 1] is at most e times that of the binomial with its mean.
double ClusterUpper(double failed, int64_t clusters, double confidence);
// How much of the allowed error is used: epsilon over the (1 - delta) quantile of the errors, 1 is
// ideal and more is waste. NaN without errors.
double Sharpness(const std::vector<double>& errors, double epsilon, double delta);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_CLI_STATISTICS_H_
