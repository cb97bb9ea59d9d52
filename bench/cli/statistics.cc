#include "bench/cli/statistics.h"

#include <algorithm>
#include <boost/math/special_functions/beta.hpp>
#include <cmath>
#include <limits>
#include <numbers>
#include <numeric>

namespace vattn::bench {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

double Mean(const std::vector<double>& values) {
  if (values.empty()) return kNaN;
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double Quantile(std::vector<double> values, double q) {
  if (values.empty()) return kNaN;
  const double position = q * static_cast<double>(values.size() - 1);
  const auto below = values.begin() + static_cast<std::ptrdiff_t>(position);
  std::nth_element(values.begin(), below, values.end());
  const double low = *below, part = position - std::floor(position);
  if (part == 0) return low;
  const double high = *std::min_element(below + 1, values.end());
  return low + part * (high - low);
}

double ClopperPearsonUpper(int64_t failures, int64_t trials, double confidence) {
  if (failures >= trials) return 1;
  return boost::math::ibeta_inv(static_cast<double>(failures) + 1,
                                static_cast<double>(trials - failures), confidence);
}

double ClusterUpper(double failed, int64_t clusters, double confidence) {
  return ClopperPearsonUpper(static_cast<int64_t>(std::ceil(failed - 1e-9)), clusters,
                             1 - (1 - confidence) / std::numbers::e);
}

double Sharpness(const std::vector<double>& errors, double epsilon, double delta) {
  return epsilon / Quantile(errors, 1 - delta);
}

}  // namespace vattn::bench
