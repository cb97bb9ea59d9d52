#include "bench/inside/tail_terms.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/sampling.h"

namespace vattn::bench {
namespace {

constexpr int kHalvings = 50;

// The x in [low, high] where the rising f reaches `goal`, on a logarithmic scale.
template <class F>
double Reach(double low, double high, double goal, F&& f) {
  for (int i = 0; i < kHalvings; ++i) {
    const double middle = std::sqrt(low * high);
    (f(middle) < goal ? low : high) = middle;
  }
  return high;
}

double Expected(const std::vector<double>& weight, double scale) {
  double sum = 0;
  for (const double w : weight) sum += std::min(1., scale * w);
  return sum;
}

// Mean squared cosine between distinct ones of kRankDraws residuals [tail][dim], taken
// systematically in proportion to their terms of the variance; negative if there are no two.
double MeanCos2(const std::vector<double>& residual, const std::vector<double>& term,
                double variance, int64_t dim) {
  std::vector<size_t> places;
  double passed = 0;
  for (size_t t = 0; t < term.size() && places.size() < kRankDraws; ++t) {
    passed += term[t];
    while (places.size() < kRankDraws &&
           (static_cast<double>(places.size()) + .5) / kRankDraws * variance <= passed) {
      places.push_back(t);
    }
  }
  const auto dot = [&](size_t a, size_t b) {
    return std::inner_product(&residual[a * dim], &residual[a * dim] + dim, &residual[b * dim], 0.);
  };
  double sum = 0;
  int64_t pairs = 0;
  for (size_t a = 0; a < places.size(); ++a) {
    for (size_t b = 0; b < a; ++b) {
      const double norms2 = dot(places[a], places[a]) * dot(places[b], places[b]);
      if (places[a] == places[b] || norms2 == 0) continue;
      const double product = dot(places[a], places[b]);
      sum += product * product / norms2;
      ++pairs;
    }
  }
  return pairs > 0 ? sum / static_cast<double>(pairs) : -1;
}

}  // namespace

std::vector<double> DrawWeights(const std::vector<double>& guess, double rows) {
  const auto n = static_cast<double>(guess.size());
  if (rows >= n) return std::vector<double>(guess.size(), 1.);
  const double floor = kDefensive * std::accumulate(guess.begin(), guess.end(), 0.) / n;
  std::vector<double> weight(guess.size());
  std::transform(guess.begin(), guess.end(), weight.begin(), [&](double g) { return g + floor; });
  const double most = 1 / *std::min_element(weight.begin(), weight.end());
  const double scale =
      Reach(most * 1e-15, most, rows, [&](double x) { return Expected(weight, x); });
  for (double& w : weight) w *= scale;
  return weight;
}

TailEstimator::TailEstimator(const TailHead& head, const StandIn& stand_in)
    : head_(head),
      stand_in_(stand_in),
      numerator_(head.numerator),
      denominator_(head.denominator),
      exact_numerator_(head.numerator),
      exact_denominator_(head.denominator) {
  double norm2 = head.value_norm2;
  for (int64_t i = 0; i < head.n; ++i) {
    const float* v = head.values + i * head.dim;
    const double e = head.e[i];
    exact_denominator_ += e;
    for (int64_t j = 0; j < head.dim; ++j) {
      exact_numerator_[j] += e * v[j];
      norm2 += e * v[j] * v[j];
    }
    if (stand_in.guess.empty()) continue;
    const float* in_place = stand_in.table + stand_in.entry[i] * head.dim;
    denominator_ += stand_in.guess[i];
    for (int64_t j = 0; j < head.dim; ++j) numerator_[j] += stand_in.guess[i] * in_place[j];
  }
  exact_norm2_ = norm2 / exact_denominator_;
  exact_ = exact_numerator_;
  for (double& o : exact_) o /= exact_denominator_;
}

double TailEstimator::Residual(int64_t i, const double* o, double* r) const {
  const float* v = head_.values + i * head_.dim;
  const double e = head_.e[i];
  for (int64_t j = 0; j < head_.dim; ++j) r[j] = e * (v[j] - o[j]);
  if (!stand_in_.guess.empty()) {
    const float* in_place = stand_in_.table + stand_in_.entry[i] * head_.dim;
    const double guess = stand_in_.guess[i];
    for (int64_t j = 0; j < head_.dim; ++j) r[j] -= guess * (in_place[j] - o[j]);
  }
  return std::inner_product(r, r + head_.dim, r, 0.);
}

double TailEstimator::Ref(const Promise& promise, const std::vector<double>& output,
                          double value_norm2) {
  const double norm =
      std::sqrt(std::inner_product(output.begin(), output.end(), output.begin(), 0.));
  return promise.norm == Norm::kOutput
             ? norm
             : std::max(norm, promise.norm_floor * std::sqrt(value_norm2));
}

TailAnswer TailEstimator::Estimate(const TailDraw& draw, const Promise& promise,
                                   HeadState* state) const {
  const int64_t dim = head_.dim;
  TailAnswer answer{.numerator = numerator_, .output = {}, .denominator = denominator_};
  // |v|^2 is summed over rows alone, so it has a mass of its own.
  double norm2 = head_.value_norm2, mass = head_.denominator, seen = 0;
  for (size_t k = 0; k < draw.token.size(); ++k) {
    const int64_t i = draw.token[k];
    const float* v = head_.values + i * dim;
    const double e = head_.e[i] / draw.pi[k];
    mass += e;
    answer.denominator += e;
    for (int64_t j = 0; j < dim; ++j) {
      answer.numerator[j] += e * v[j];
      norm2 += e * v[j] * v[j];
    }
    if (stand_in_.guess.empty()) continue;
    const float* in_place = stand_in_.table + stand_in_.entry[i] * dim;
    const double guess = stand_in_.guess[i] / draw.pi[k];
    answer.denominator -= guess;
    seen += guess;
    for (int64_t j = 0; j < dim; ++j) answer.numerator[j] -= guess * in_place[j];
  }
  // What was corrected too far is no denominator; the library's least one.
  answer.denominator = std::max(answer.denominator, 1e-30);
  answer.output = answer.numerator;
  for (double& o : answer.output) o /= answer.denominator;

  TailSums sums;
  sums.coded = denominator_ - head_.denominator;
  std::vector<double> residuals, terms;
  for (size_t k = 0; k < draw.token.size(); ++k) {
    if (draw.pi[k] >= 1) continue;
    const int64_t i = draw.token[k];
    residuals.resize(residuals.size() + dim);
    const double error2 = Residual(i, answer.output.data(), &residuals[residuals.size() - dim]);
    TailToken token;
    token.e = static_cast<float>(head_.e[i]);
    token.pi = static_cast<float>(draw.pi[k]);
    token.error2 = static_cast<float>(error2);
    const double term = MakeTailTerm(token, static_cast<float>(answer.denominator)).variance;
    terms.push_back(term);
    sums.variance += term;
    sums.squares += term * term;
    sums.own += term * term * token.pi;
  }
  const double cos2 = sums.variance > 0 ? MeanCos2(residuals, terms, sums.variance, dim) : -1;
  HeadWork work;
  work.denominator = static_cast<float>(answer.denominator);
  work.unseen = static_cast<float>(sums.coded - seen);
  work.least_ref = static_cast<float>(Ref(promise, answer.output, mass > 0 ? norm2 / mass : 0));
  const bool exact = terms.empty() && static_cast<int64_t>(draw.token.size()) == head_.n;
  const double output2 =
      std::inner_product(answer.output.begin(), answer.output.end(), answer.output.begin(), 0.);
  JudgeHead(promise, /*look=*/1, sums, static_cast<float>(cos2), static_cast<int64_t>(terms.size()),
            exact, static_cast<float>(output2), *state, work);
  answer.z = work.z;
  answer.bound = work.bound;
  return answer;
}

double TailEstimator::RowsNeeded(const std::vector<double>& weight, const Promise& promise,
                                 double z) const {
  std::vector<double> residual2(head_.n), r(head_.dim);
  for (int64_t i = 0; i < head_.n; ++i) residual2[i] = Residual(i, exact_.data(), r.data());
  const double root = promise.epsilon * ExactRef(promise) * exact_denominator_ / z;
  const auto precision = [&](double scale) {  // 1 / variance
    double variance = 1e-300;
    for (int64_t i = 0; i < head_.n; ++i) {
      const double pi = std::min(1., scale * weight[i]);
      variance += residual2[i] * (1 - pi) / pi;
    }
    return 1 / variance;
  };
  const double most = 1 / *std::min_element(weight.begin(), weight.end());
  return Expected(weight, Reach(most * 1e-15, most, 1 / (root * root), precision));
}

}  // namespace vattn::bench
