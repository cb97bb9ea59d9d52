#include "runtime/index/index_basis.h"

#include <Eigen/Cholesky>
#include <Eigen/Dense>
#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/products.h"

namespace vattn {
namespace {

using Matrix = Eigen::MatrixXd;
using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr double kKeyRidge = 1e-4;  // of the mean diagonal
constexpr double kQueryRidge = .3;
constexpr double kOutlierQuantile = .99975;
// A token is an outlier if its squared residual exceeds the mean by both kHidden and
// kHiddenDeviations standard deviations, or if its expected squared score error is over both
// kLeastNoise2 (nats^2) and kNoisy times the mean; but at most kMarkedShare of the sample by either
// rule. kHidden = 8^2, so that a key 8 standard deviations out in one direction shows among the
// others.
constexpr double kHidden = 64, kHiddenDeviations = 6, kNoisy = 9, kLeastNoise2 = 1,
                 kMarkedShare = .00125;
// The leverage of one key on the covariance at most; where there are fewer keys than dimensions it is
// 1.
constexpr double kMostLeverage = .9;

void AddRidge(Matrix& m, double share) {
  m.diagonal().array() += share * m.diagonal().mean() + 1e-12;
}

double StepOf(const CodeLayout& code, int j) {
  if (j < code.dims8) return kStep7;
  return j < code.dims8 + code.dims4 ? kStep4 : kStep2;
}

// The width of a level for whitened coordinates of standard deviation 1, x[0], x[stride], .... The
// Gaussian step, but wide enough that the levels reach the outliers: the few keys that lie far out
// are the ones that a query looks for (induction heads), and clipping them hides them from the
// scan.
double LevelWidth(const CodeLayout& code, int j, const float* x, int64_t stride,
                  std::vector<float>& sizes) {
  const double gaussian = StepOf(code, j);
  if (j >= code.dims8 + code.dims4) return gaussian;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const float size = std::abs(x[static_cast<int64_t>(i) * stride]);
    sizes[i] = std::isfinite(size) ? size : 0;
  }
  const auto outlier =
      sizes.begin() +
      static_cast<std::ptrdiff_t>(kOutlierQuantile * static_cast<double>(sizes.size() - 1));
  std::nth_element(sizes.begin(), outlier, sizes.end());
  return std::max(gaussian, *outlier / (j < code.dims8 ? 64. : 8.));
}

// The size that at most kMarkedShare of the sample, or one token, are over.
float MarkedQuantile(std::vector<float>& sizes) {
  const int64_t count = static_cast<int64_t>(sizes.size());
  const int64_t over =
      std::max<int64_t>(1, static_cast<int64_t>(kMarkedShare * static_cast<double>(count)));
  const auto at = sizes.begin() + std::max<int64_t>(0, count - 1 - over);
  std::nth_element(sizes.begin(), at, sizes.end());
  return *at;
}

// A limit on a positive quantity of each token, of which it is the largest that rule(mean,
// deviation) and MarkedQuantile give. Everything is within the limit if none of them is finite.
template <class Rule>
float Limit(std::vector<float> sizes, Rule&& rule) {
  std::erase_if(sizes, [](float x) { return !std::isfinite(x); });
  if (sizes.empty()) return std::numeric_limits<float>::max();
  double sum = 0, sum2 = 0;
  for (const float x : sizes) sum += x, sum2 += double{x} * x;
  const double n = static_cast<double>(sizes.size()), mean = sum / n;
  const double limit = rule(mean, std::sqrt(std::max(0., sum2 / n - mean * mean)));
  return std::max(static_cast<float>(limit), MarkedQuantile(sizes));
}

// By how much the squared error of every sampled key grows if the covariance is made without it: a
// key that is not in the sample is farther out than one that has bent the whitening to itself, by 1
// / (1 - |x|^2 / count) (Sherman and Morrison's formula for a matrix less one row).
std::vector<float> LeaveOneOut(const float* x, int64_t count, int dim) {
  std::vector<float> factors(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const double norm2 =
        Eigen::Map<const Eigen::VectorXf>(x + i * dim, dim).cast<double>().squaredNorm();
    factors[i] =
        static_cast<float>(1 / (1 - std::min(kMostLeverage, norm2 / static_cast<double>(count))));
  }
  return factors;
}

}  // namespace

void FillBasis(const CodeLayout& code, const KeySample& sample, Matrix keys, Matrix queries,
               const BasisTables& out) {
  const int dim = sample.dim, dims = code.dims();
  AddRidge(keys, kKeyRidge);
  AddRidge(queries, kQueryRidge);
  // With keys = L L^T and L^T queries L = U diag(weight) U^T: x = U^T L^-1 (k - mean) has
  // covariance 1, and L U x is k - mean. So a query's part in direction j is (L U)_j . q, with mean
  // square weight_j.
  const Matrix low = Eigen::LLT<Matrix>(keys).matrixL();
  const Eigen::SelfAdjointEigenSolver<Matrix> solved(low.transpose() * queries * low);
  const Matrix u = solved.eigenvectors().rowwise().reverse();  // eigenvalues ascend
  const Matrix back = low.triangularView<Eigen::Lower>() * u;
  const RowMajor whiten = low.transpose().triangularView<Eigen::Upper>().solve(u).cast<float>();
  std::vector<float> x(static_cast<size_t>(sample.count) * dim);
  cpu::MapRows(sample.keys, sample.count, dim, whiten.data(), dim, x.data());

  const int padded = code.padded_dims(), padded_rest = code.padded_rest(dim);
  std::fill(out.encode, out.encode + dim * padded, 0.f);
  std::fill(out.rest, out.rest + dim * padded_rest, 0.f);
  std::vector<float> sizes(static_cast<size_t>(sample.count));
  for (int j = 0; j < dim; ++j) {
    out.weight[j] = static_cast<float>(std::max(0., solved.eigenvalues()(dim - 1 - j)));
    if (j >= dims) {
      for (int c = 0; c < dim; ++c) out.rest[c * padded_rest + j - dims] = whiten(c, j);
      continue;
    }
    const double step = LevelWidth(code, j, x.data() + j, dim, sizes);
    out.step[j] = static_cast<float>(step);
    for (int c = 0; c < dim; ++c) {
      out.encode[c * padded + j] = static_cast<float>(whiten(c, j) / step);
      out.project[j * dim + c] = static_cast<float>(back(c, j) * step);
    }
  }

  const std::vector<float> factors = LeaveOneOut(x.data(), sample.count, dim);
  cpu::SquareResiduals(code, out.step, sample.count, dim, x.data());
  for (int64_t i = 0; i < sample.count; ++i)
    Eigen::Map<Eigen::VectorXf>(x.data() + i * dim, dim) *= factors[i];
  std::vector<float> residual2(sizes.size()), noise2(sizes.size());
  cpu::WeighRows(x.data(), sample.count, dim, std::vector<float>(dim, 1.f).data(),
                 residual2.data());
  cpu::WeighRows(x.data(), sample.count, dim, out.weight, noise2.data());
  *out.residual_limit = Limit(residual2, [](double mean, double deviation) {
    return mean + std::max(kHidden, kHiddenDeviations * deviation);
  });
  *out.noise_limit =
      Limit(noise2, [](double mean, double) { return std::max(kLeastNoise2, kNoisy * mean); });
  Eigen::VectorXd mean2 = Eigen::VectorXd::Zero(dim);
  int64_t told = 0;
  for (int64_t i = 0; i < sample.count; ++i) {
    if (!(residual2[i] <= *out.residual_limit && noise2[i] <= *out.noise_limit)) continue;
    mean2 += Eigen::Map<const Eigen::VectorXf>(x.data() + i * dim, dim).cast<double>();
    ++told;
  }
  if (told > 0) mean2 /= static_cast<double>(told);
  for (int j = 0; j < dims; ++j) {
    out.level_noise2[j] = static_cast<float>(mean2(j)) / (out.step[j] * out.step[j]);
  }
  for (int j = dims; j < dim; ++j) {
    float* const row = out.noise + (j - dims) * dim;
    for (int c = 0; c < dim; ++c) row[c] = static_cast<float>(back(c, j) * std::sqrt(mean2(j)));
  }
}

}  // namespace vattn
