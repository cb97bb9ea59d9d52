#include "runtime/quantiles.h"

#include <algorithm>
#include <boost/math/distributions/chi_squared.hpp>
#include <boost/math/distributions/normal.hpp>
#include <cmath>

namespace vattn {
namespace {

constexpr double kFirstShare = .7, kSecondShare = .2;
constexpr double kPilotShare = .05, kAfterPilotShare = .85;
constexpr double kMaxRank = 1024;  // 1 / rank of bin 0

}  // namespace

double LookDelta(double delta, int look, int max_looks, bool pilot) {
  const double first = pilot ? kPilotShare : kFirstShare,
               second = pilot ? kAfterPilotShare : kSecondShare;
  if (max_looks == 1) return delta;
  if (look == 1) return first * delta;
  if (max_looks == 2) return (1 - first) * delta;
  if (look == 2) return second * delta;
  return (1 - first - second) * delta / ((look - 1) * (look - 2)) / (1 - 1.0 / (max_looks - 1));
}

double SharpQuantile(double delta, double rank) {
  const boost::math::chi_squared_distribution<double> chi2(rank);
  return std::sqrt(boost::math::quantile(boost::math::complement(chi2, delta)) / rank);
}

double SafeQuantile(double delta) { return std::max(1.0, TwoSidedNormalQuantile(delta)); }

double TwoSidedNormalQuantile(double delta) {
  return boost::math::quantile(
      boost::math::complement(boost::math::normal_distribution<double>(), delta / 2));
}

void FillQuantiles(Bound bound, double delta, int max_looks, bool pilot,
                   float (*table)[kQuantileBins + 1]) {
  for (int look = 1; look <= max_looks; ++look) {
    const double spent = LookDelta(delta, look, max_looks, pilot);
    for (int bin = 0; bin <= kQuantileBins; ++bin) {
      const double rank = bin == 0 ? kMaxRank : static_cast<double>(kQuantileBins) / bin;
      table[look - 1][bin] = static_cast<float>(bound == Bound::kSafe ? SafeQuantile(spent)
                                                                      : SharpQuantile(spent, rank));
    }
  }
}

}  // namespace vattn
