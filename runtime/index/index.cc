#include "runtime/index/index.h"

#include <Eigen/Cholesky>
#include <Eigen/Dense>
#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/encode.h"
#include "runtime/index/index_kinds.h"

namespace vattn {
namespace {

using Matrix = Eigen::MatrixXd;
using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr double kHalfLife = 512;     // query tokens
constexpr double kKeyRidge = 1e-4;    // of the mean diagonal
constexpr double kQueryRidge = 1e-2;
// Uniform quantisers with least squared error for a Gaussian, in standard deviations.
constexpr double kStep7 = .0625, kStep4 = .3352, kStep2 = .9957;
constexpr double kOutlierQuantile = .99975;
// Tokens are marked whose squared residual is above the mean by this, by so many standard deviations, and
// above this quantile of the calibration keys: at most so many are, and 8 standard deviations of a
// direction do not hide in the others. |v|^2 likewise, over so many times its mean.
constexpr double kHidden = 64, kHiddenDeviations = 6, kMarkedQuantile = .9975, kHugeValue = 16;

void AddRidge(Matrix& m, double share) { m.diagonal().array() += share * m.diagonal().mean() + 1e-12; }

// Mean of x x^T over rows, in blocks so that fp32 sums stay short.
Matrix Moment(const RowMajor& rows) {
  Matrix sum = Matrix::Zero(rows.cols(), rows.cols());
  constexpr Eigen::Index kRows = 1024;
  for (Eigen::Index i = 0; i < rows.rows(); i += kRows) {
    const auto part = rows.middleRows(i, std::min(kRows, rows.rows() - i));
    sum += (part.transpose() * part).cast<double>();
  }
  return sum / static_cast<double>(rows.rows());
}

double StepOf(const CodeLayout& code, int j) {
  if (j < code.dims8) return kStep7;
  return j < code.dims8 + code.dims4 ? kStep4 : kStep2;
}

// The width of a level for whitened coordinates x of standard deviation 1. The Gaussian step, but
// wide enough that the levels reach the outliers: the few keys that lie far out are the ones that a
// query looks for (induction heads), and clipping them hides them from the scan.
double LevelWidth(const CodeLayout& code, int j, Eigen::VectorXf x) {
  const double gaussian = StepOf(code, j);
  if (j >= code.dims8 + code.dims4) return gaussian;
  const Eigen::Index outlier = static_cast<Eigen::Index>(kOutlierQuantile * static_cast<double>(x.size() - 1));
  x = x.cwiseAbs();
  std::nth_element(x.data(), x.data() + outlier, x.data() + x.size());
  return std::max(gaussian, x(outlier) / (j < code.dims8 ? 64. : 8.));
}

float QuantileOf(Eigen::ArrayXf x, double q) {
  const Eigen::Index at = static_cast<Eigen::Index>(q * static_cast<double>(x.size() - 1));
  std::nth_element(x.data(), x.data() + at, x.data() + x.size());
  return x(at);
}

// Of what is finite; everything is within the limit if nothing is.
float ResidualLimit(const Eigen::ArrayXf& residual2) {
  if (!residual2.allFinite()) return std::numeric_limits<float>::max();
  const double mean = residual2.cast<double>().mean();
  const double deviation = std::sqrt((residual2.cast<double>() - mean).square().mean());
  return static_cast<float>(std::max(mean + std::max(kHidden, kHiddenDeviations * deviation),
                                     double{QuantileOf(residual2, kMarkedQuantile)}));
}

float ValueLimit(const Eigen::ArrayXf& norm2) {
  if (!norm2.allFinite()) return std::numeric_limits<float>::max();
  return std::max(static_cast<float>(kHugeValue * norm2.cast<double>().mean()), QuantileOf(norm2, kMarkedQuantile));
}

// encode [dim_k][padded] and project [dims][dim_k] of the balanced basis: x = diag(sqrt lambda) U^T
// L^-1 (k - mu) has covariance diag(lambda), so U^T L^-1 whitens. step and rest as IndexTables has them;
// returns its residual_limit. centred [count][dim_k].
float FillBasis(const CodeLayout& code, const RowMajor& centred, const Matrix& keys, const Matrix& queries,
                float* encode, float* project, float* steps, float* rest) {
  const Eigen::Index dim = keys.rows();
  const Matrix low = Eigen::LLT<Matrix>(keys).matrixL();
  const Eigen::SelfAdjointEigenSolver<Matrix> solved(low.transpose() * queries * low);
  const Matrix inverse = low.triangularView<Eigen::Lower>().solve(Matrix::Identity(dim, dim));
  const int padded = code.padded_dims();
  std::fill(encode, encode + dim * padded, 0.f);
  const int padded_rest = code.padded_rest(static_cast<int>(dim));
  std::fill(rest, rest + dim * padded_rest, 0.f);
  Eigen::ArrayXf residual2 = Eigen::ArrayXf::Zero(centred.rows());
  for (int j = 0; j < dim; ++j) {
    const Eigen::VectorXd u = solved.eigenvectors().col(dim - 1 - j);  // eigenvalues ascend
    const Eigen::VectorXd whiten = inverse.transpose() * u, back = low * u;
    const Eigen::VectorXf x = centred * whiten.cast<float>();
    if (j >= code.dims()) {
      for (Eigen::Index c = 0; c < dim; ++c) rest[c * padded_rest + j - code.dims()] = static_cast<float>(whiten(c));
      residual2 += x.array().square();
      continue;
    }
    const double step = LevelWidth(code, j, x);
    const float half = j < code.dims8 ? 64 : j < code.dims8 + code.dims4 ? 8 : 2, width = static_cast<float>(step);
    const Eigen::ArrayXf level = (x.array() / width).floor().max(-half).min(half - 1) + .5f;
    residual2 += (x.array() - level * width).square();
    steps[j] = width;
    for (Eigen::Index c = 0; c < dim; ++c) {
      encode[c * padded + j] = static_cast<float>(whiten(c) / step);
      project[j * dim + c] = static_cast<float>(back(c) * step);
    }
  }
  return ResidualLimit(residual2);
}

// Mean and level width by dimension, and the mean squared residual of values [count][dim].
double FillValues(const RowMajor& values, int bits, const Eigen::VectorXd& mean, float* out_mean, float* out_step) {
  const double width = bits == 2 ? kStep2 : kStep4;
  const int half = bits == 2 ? 2 : 8;
  double residual = 0;
  for (Eigen::Index j = 0; j < values.cols(); ++j) {
    const Eigen::ArrayXd x = values.col(j).cast<double>().array() - mean(j);
    const double step = width * std::sqrt(x.square().mean()) + 1e-12;
    out_mean[j] = static_cast<float>(mean(j));
    out_step[j] = static_cast<float>(step);
    const Eigen::ArrayXd level = (x / step).floor().max(-half).min(half - 1);
    residual += (x - (level + .5) * step).square().mean();
  }
  return residual;
}

// Floats of IndexTables::step and rest.
int64_t MarkFloats(const CodeLayout& code, int dim_k) {
  return code.kind == IndexKind::kBalanced ? code.dims() + int64_t{dim_k} * code.padded_rest(dim_k) : 0;
}

bool IsFitted(IndexKind kind) { return kind == IndexKind::kSign || kind == IndexKind::kPage; }

// What scores are predicted with, of centred keys [count][dim_k] and second moments.
void FillScores(const Storage& s, const RowMajor& centred, Matrix keys, Matrix queries, SignMap map, float* encode,
                float* project, float* centroids, float* marks, float* fit) {
  const int dim = s.row.dim_k;
  const KeySample sample{centred.data(), centred.rows(), dim};
  switch (s.code.kind) {
    case IndexKind::kBalanced:
      AddRidge(keys, kKeyRidge);
      AddRidge(queries, kQueryRidge);
      fit[0] = FillBasis(s.code, centred, keys, queries, encode, project, marks, marks + s.code.dims());
      break;
    case IndexKind::kSign:
      FillSigns(s.code, dim, map, encode, project);
      FitSigns(s.code, sample, DrawQueries(queries), encode, project, fit);
      break;
    case IndexKind::kHadamard2:
      FillHadamard(s.code, sample, kStep2, encode, project);
      break;
    case IndexKind::kPage:
      FitBounds(sample, DrawQueries(queries), fit);
      break;
    case IndexKind::kClusters:
      FillCentroids(s, sample, centroids);
      break;
    case IndexKind::kPooled:
    case IndexKind::kExact:
    case IndexKind::kExternal:
      break;
  }
}

}  // namespace

void QueryMoment::Add(const float* queries, int64_t count, int group) {
  const Eigen::Map<const RowMajor> q(queries, count, dim_);
  if (sum_.empty()) sum_.assign(static_cast<size_t>(dim_) * dim_, 0.0);
  Eigen::Map<Matrix> sum(sum_.data(), dim_, dim_);
  const double keep = std::exp2(-static_cast<double>(count) / group / kHalfLife);
  sum = keep * sum + static_cast<double>(count) * Moment(q);
  weight_ = keep * weight_ + static_cast<double>(count);
}

QueryMoment QueryMoment::FromMean(int dim, std::vector<double> mean) {
  QueryMoment moment(dim);
  moment.sum_ = std::move(mean);
  moment.weight_ = 1;
  return moment;
}

std::vector<double> QueryMoment::Mean() const {
  std::vector<double> mean = sum_;
  for (double& x : mean) x /= weight_;
  return mean;
}

std::vector<double> QueryMoment::Save() const {
  std::vector<double> saved = sum_;
  saved.resize(static_cast<size_t>(dim_) * dim_, 0.0);
  saved.push_back(weight_);
  return saved;
}

QueryMoment QueryMoment::Load(int dim, const std::vector<double>& saved) {
  QueryMoment moment(dim);
  moment.sum_.assign(saved.begin(), saved.end() - 1);
  moment.weight_ = saved.back();
  return moment;
}

std::shared_ptr<const Index> Index::Make(const Storage& s, const float* keys, const float* values, int64_t count,
                                         const QueryMoment& moment, SignMap map) {
  const int dim_k = s.row.dim_k, dim_v = s.row.dim_v;
  std::vector<float> floats(NumFloats(s));
  float* center = floats.data();
  float* encode = center + dim_k;
  float* project = encode + dim_k * s.code.padded_dims();
  float* centroids = project + s.code.dims() * dim_k;
  float* marks = centroids + s.code.centroids * dim_k;
  float* value_mean = marks + MarkFloats(s.code, dim_k);
  float* value_step = value_mean + dim_v;
  float* rest = value_step + dim_v;

  RowMajor k = Eigen::Map<const RowMajor>(keys, count, dim_k);
  const Eigen::VectorXd mean = k.cast<double>().colwise().mean();
  for (int c = 0; c < dim_k; ++c) center[c] = static_cast<float>(mean(c));
  if (s.code.bytes() > 0) {
    k.rowwise() -= mean.cast<float>().transpose();
    Matrix key_moment = Moment(k);
    Matrix query_moment = Matrix::Identity(dim_k, dim_k);
    if (!moment.empty()) query_moment = Eigen::Map<const Matrix>(moment.Mean().data(), dim_k, dim_k);
    // Keys or queries with Inf or NaN cannot be calibrated on; any basis is valid.
    if (!key_moment.allFinite()) key_moment = Matrix::Identity(dim_k, dim_k);
    if (!query_moment.allFinite()) query_moment = Matrix::Identity(dim_k, dim_k);
    FillScores(s, k, key_moment, query_moment, map, encode, project, centroids, marks, rest + 3);
  }
  const RowMajor v = Eigen::Map<const RowMajor>(values, count, dim_v);
  const Eigen::VectorXd v_mean = v.cast<double>().colwise().mean();
  const double norm2 = v.cast<double>().rowwise().squaredNorm().mean();
  rest[0] = s.value_bits > 0 ? static_cast<float>(FillValues(v, s.value_bits, v_mean, value_mean, value_step)) : 0.f;
  rest[1] = static_cast<float>(norm2 - v_mean.squaredNorm());
  rest[2] = static_cast<float>(norm2);
  if (s.code.kind == IndexKind::kBalanced) rest[4] = ValueLimit(v.rowwise().squaredNorm().array());
  return std::shared_ptr<const Index>(new Index(s, std::move(floats)));
}

std::shared_ptr<const Index> Index::Recentre(const Storage& s, const Index& base, const float* keys,
                                             const float* values, int64_t count, double* flooded) {
  std::vector<float> floats = base.floats_;
  RowMajor k = Eigen::Map<const RowMajor>(keys, count, s.row.dim_k);
  const Eigen::RowVectorXf mean = k.cast<double>().colwise().mean().cast<float>();
  std::copy_n(mean.data(), s.row.dim_k, floats.data());
  k.rowwise() -= mean;
  Eigen::ArrayXf residual2(count);
  const IndexTables tables = base.TablesAt(floats.data());
  cpu::SquaredResiduals(s, tables, k.data(), count, residual2.data());
  *flooded = static_cast<double>((!(residual2 <= tables.residual_limit)).cast<int>().sum()) / static_cast<double>(count);
  const Eigen::Map<const RowMajor> v(values, count, s.row.dim_v);
  const Eigen::ArrayXf norm2 = v.rowwise().squaredNorm().array();
  float* const limits = floats.data() + floats.size() - 2;
  if (residual2.allFinite()) limits[0] = std::max(limits[0], QuantileOf(residual2, kMarkedQuantile));
  if (norm2.allFinite()) limits[1] = std::max(limits[1], QuantileOf(norm2, kMarkedQuantile));
  return std::shared_ptr<const Index>(new Index(s, std::move(floats)));
}

std::shared_ptr<const Index> Index::WithValuesOf(const Storage& s, const Index& first) const {
  std::vector<float> floats = floats_;
  const int64_t at = tables().value_mean - floats_.data();
  std::copy_n(first.floats_.data() + at, 2 * s.row.dim_v + 1, floats.data() + at);  // and the mean squared residual
  return std::shared_ptr<const Index>(new Index(s, std::move(floats)));
}

std::shared_ptr<const Index> Index::FromFloats(const Storage& s, std::vector<float> floats) {
  return std::shared_ptr<const Index>(new Index(s, std::move(floats)));
}

int64_t Index::NumFloats(const Storage& s) {
  return s.row.dim_k + int64_t{s.row.dim_k} * (s.code.padded_dims() + s.code.dims() + s.code.centroids) +
         MarkFloats(s.code, s.row.dim_k) + 2 * s.row.dim_v + 3 +
         (IsFitted(s.code.kind) || s.code.kind == IndexKind::kBalanced ? 2 : 0);
}

Index::Index(const Storage& s, std::vector<float> floats)
    : dim_k_(s.row.dim_k),
      dim_v_(s.row.dim_v),
      code_(s.code),
      floats_(std::move(floats)) {}

IndexTables Index::TablesAt(const float* base) const {
  IndexTables t;
  t.center = base;
  t.encode = t.center + dim_k_;
  t.project = t.encode + dim_k_ * code_.padded_dims();
  t.centroids = t.project + code_.dims() * dim_k_;
  t.step = t.centroids + int64_t{code_.centroids} * dim_k_;
  t.rest = t.step + code_.dims();
  t.value_mean = t.step + MarkFloats(code_, dim_k_);
  t.value_step = t.value_mean + dim_v_;
  const float* rest = floats_.data() + (t.value_step + dim_v_ - base);
  t.value_residual = rest[0];
  t.value_spread = rest[1];
  t.value_norm2 = rest[2];
  if (IsFitted(code_.kind)) {
    t.slope = rest[3];
    t.intercept = rest[4];
  }
  if (code_.kind == IndexKind::kBalanced) {
    t.residual_limit = rest[3];
    t.value_limit = rest[4];
  }
  return t;
}

}  // namespace vattn
