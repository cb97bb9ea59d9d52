#include "bench/inside/tail_tables.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace vattn::bench {
namespace {

// Softmax over the elements.
std::vector<double> Features(const float* x, int64_t dim) {
  const float most = *std::max_element(x, x + dim);
  std::vector<double> phi(dim);
  std::transform(x, x + dim, phi.begin(),
                 [&](float a) { return std::exp(static_cast<double>(a) - most); });
  const double sum = std::accumulate(phi.begin(), phi.end(), 0.);
  for (double& p : phi) p /= sum;
  return phi;
}

}  // namespace

TailTable MeanTable(const float* values, int64_t dim, std::vector<int32_t> entry) {
  const int64_t entries = entry.empty() ? 0 : *std::max_element(entry.begin(), entry.end()) + 1;
  std::vector<double> sum(entries * dim);
  std::vector<int64_t> count(entries);
  for (size_t i = 0; i < entry.size(); ++i) {
    ++count[entry[i]];
    for (int64_t j = 0; j < dim; ++j)
      sum[entry[i] * dim + j] += values[static_cast<int64_t>(i) * dim + j];
  }
  TailTable table;
  table.rows.resize(sum.size());
  for (size_t k = 0; k < sum.size(); ++k) {
    table.rows[k] =
        static_cast<float>(sum[k] / static_cast<double>(std::max<int64_t>(1, count[k / dim])));
  }
  table.entry = std::move(entry);
  return table;
}

std::vector<int32_t> Pages(int64_t n, int64_t page) {
  std::vector<int32_t> entry(n);
  for (int64_t i = 0; i < n; ++i) entry[i] = static_cast<int32_t>(i / page);
  return entry;
}

std::vector<double> LinearGuess(const float* q, const float* keys, int64_t dim,
                                const std::vector<double>& guess,
                                const std::vector<double>& weight) {
  const std::vector<double> phi = Features(q, dim);
  std::vector<double> linear(guess.size());
  double both = 0, square = 0;  // weighted by the variance of a row of size 1
  for (size_t i = 0; i < guess.size(); ++i) {
    const std::vector<double> other = Features(keys + static_cast<int64_t>(i) * dim, dim);
    linear[i] = std::inner_product(phi.begin(), phi.end(), other.begin(), 0.);
    const double variance = std::max(0., 1 / weight[i] - 1);
    both += variance * linear[i] * guess[i];
    square += variance * linear[i] * linear[i];
  }
  const double factor = square > 0 ? both / square : 0;
  for (double& x : linear) x *= factor;
  return linear;
}

}  // namespace vattn::bench
