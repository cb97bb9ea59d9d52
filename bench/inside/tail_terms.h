// Tail terms (METHOD.md, "Tail terms") as difference estimators: something stands in for every row
// of the middle, and the drawn rows correct it. Sums in float64; the certificate is the library's
// (kernels/sampling.h).
#ifndef VATTN_BENCH_INSIDE_TAIL_TERMS_H_
#define VATTN_BENCH_INSIDE_TAIL_TERMS_H_

#include <cstdint>
#include <vector>

#include "kernels/params.h"

namespace vattn::bench {

// One query head in one step: a middle of n tokens and the sums of the exact sets. The unit of
// every e is the same, and such that the largest is near 1.
struct TailHead {
  int64_t n = 0;
  int64_t dim = 0;                // of values
  const float* values = nullptr;  // [n][dim]
  std::vector<double> e;          // [n] exp(score)
  std::vector<double> numerator;  // [dim] sum of e v over the exact sets
  double denominator = 0;         // sum of e
  double value_norm2 = 0;         // sum of e |v|^2
};

// What stands in for row i: guess[i] times row entry[i] of the table. No guess: nothing does.
struct StandIn {
  std::vector<double> guess;       // [n]
  const float* table = nullptr;    // [entries][dim]
  const int32_t* entry = nullptr;  // [n]
};

// A Poisson draw: token i with probability min(1, weight[i]), of `weight` [n].
struct TailDraw {
  std::vector<int32_t> token;  // ascending
  std::vector<double> pi;      // of those
};

// guess_i + .1 of the mean guess, scaled so that `rows` of the n tokens are expected; all n or
// more: 1 each.
std::vector<double> DrawWeights(const std::vector<double>& guess, double rows);
// u = uniform() in (0, 1), a number for each token.
template <class Uniform>
TailDraw DrawTail(const std::vector<double>& weight, Uniform&& uniform) {
  TailDraw draw;
  for (size_t i = 0; i < weight.size(); ++i) {
    if (uniform() >= weight[i]) continue;
    draw.token.push_back(static_cast<int32_t>(i));
    draw.pi.push_back(weight[i] < 1 ? weight[i] : 1);
  }
  return draw;
}

struct TailAnswer {
  std::vector<double> numerator, output;  // [dim]
  double denominator = 0;
  double z = 0;
  double bound = 0;  // on |output - o| over the reference, at the promise's delta
};

class TailEstimator {
 public:
  // Keeps references to both.
  TailEstimator(const TailHead& head, const StandIn& stand_in);

  // The corrected estimate and its certificate at the first look; `state` carries the rank from
  // step to step.
  TailAnswer Estimate(const TailDraw& draw, const Promise& promise, HeadState* state) const;

  // Expected rows of draws in proportion to `weight` of which the variance is just small enough for
  // the promise at quantile z: from every row, so free of chance.
  double RowsNeeded(const std::vector<double>& weight, const Promise& promise, double z) const;

  // Exact attention, and what errors are relative to.
  const std::vector<double>& exact() const { return exact_; }
  double ExactRef(const Promise& promise) const { return Ref(promise, exact_, exact_norm2_); }
  // Mean of the estimate's sums over draws: those of exact attention.
  const std::vector<double>& exact_numerator() const { return exact_numerator_; }
  double exact_denominator() const { return exact_denominator_; }

 private:
  // r = e (v - o) - guess (v^ - o) of token i; returns |r|^2.
  double Residual(int64_t i, const double* o, double* r) const;
  static double Ref(const Promise& promise, const std::vector<double>& output, double value_norm2);

  const TailHead& head_;
  const StandIn& stand_in_;
  std::vector<double> numerator_;  // of the exact sets and all stand-ins
  double denominator_ = 0;
  std::vector<double> exact_, exact_numerator_;
  double exact_denominator_ = 0, exact_norm2_ = 0;
};

}  // namespace vattn::bench

#endif  // VATTN_BENCH_INSIDE_TAIL_TERMS_H_
