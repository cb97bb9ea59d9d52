#include "runtime/index/index.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/encode.h"
#include "kernels/cpu/products.h"
#include "runtime/index/index_basis.h"
#include "runtime/index/index_kinds.h"

namespace vattn {
namespace {

using Matrix = Eigen::MatrixXd;
using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr int64_t kMostPicks = 512;
// A moment has the weight of at most this many tokens: from then on each more fades the others by
// 1 / kMostWeight, a half-life of 8,192 tokens.
const double kMostWeight = 8192 / std::log(2.);
// A token is an outlier if its |v|^2 is over kHugeValue times its mean and above this quantile of the
// sample: at most 0.25 % are.
constexpr double kHugeValue = 16, kMarkedQuantile = .9975;

// Mean of x x^T over rows, in parts so that fp32 sums stay short.
Matrix Moment(const float* rows, int64_t count, int dim) {
  Matrix sum = Matrix::Zero(dim, dim);
  Eigen::MatrixXf part(dim, dim);
  constexpr int64_t kRows = 1024;
  for (int64_t i = 0; i < count; i += kRows) {
    part.setZero();
    cpu::AddOuterProducts(rows + i * dim, std::min(kRows, count - i), dim, part.data());
    sum += part.cast<double>();
  }
  return sum / static_cast<double>(count);
}

// Mean of each column, row by row: Eigen's sum goes down one column after the other.
Eigen::VectorXd ColumnMeans(const float* rows, int64_t count, int dim) {
  Eigen::VectorXd sum = Eigen::VectorXd::Zero(dim);
  for (int64_t i = 0; i < count; ++i)
    sum += Eigen::Map<const Eigen::VectorXf>(rows + i * dim, dim).cast<double>();
  return sum / static_cast<double>(count);
}

float QuantileOf(Eigen::ArrayXf x, double q) {
  const Eigen::Index at = static_cast<Eigen::Index>(q * static_cast<double>(x.size() - 1));
  std::nth_element(x.data(), x.data() + at, x.data() + x.size());
  return x(at);
}

float ValueLimit(const Eigen::ArrayXf& norm2) {
  if (!norm2.allFinite()) return std::numeric_limits<float>::max();
  return std::max(static_cast<float>(kHugeValue * norm2.cast<double>().mean()),
                  QuantileOf(norm2, kMarkedQuantile));
}

// Mean and level width by dimension, and the mean squared residual of values [count][dim].
double FillValues(const RowMajor& values, int bits, const Eigen::VectorXd& mean, float* out_mean,
                  float* out_step) {
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

bool IsFitted(IndexKind kind) { return kind == IndexKind::kSign || kind == IndexKind::kPage; }

// Floats of IndexTables::step, rest, weight, level_noise2 and noise.
int64_t BasisFloats(const CodeLayout& code, int dim_k) {
  if (code.kind != IndexKind::kBalanced) return 0;
  return 2 * code.dims() + int64_t{dim_k} * (code.padded_rest(dim_k) + 1 + dim_k - code.dims());
}

// Numbers of a kind behind the three of values.
int NumScalars(IndexKind kind) { return kind == IndexKind::kBalanced ? 3 : IsFitted(kind) ? 2 : 0; }

// What scores are predicted with, of centred keys [count][dim_k] and second moments.
void FillScores(const Storage& s, const RowMajor& centred, const Matrix& keys,
                const Matrix& queries, SignMap map, float* encode, float* project, float* centroids,
                float* basis, float* fit) {
  const int dim = s.row.dim_k;
  const KeySample sample{centred.data(), centred.rows(), dim};
  switch (s.code.kind) {
    case IndexKind::kBalanced: {
      float* rest = basis + s.code.dims();
      float* weight = rest + dim * s.code.padded_rest(dim);
      FillBasis(s.code, sample, keys, queries,
                {.encode = encode,
                 .project = project,
                 .step = basis,
                 .rest = rest,
                 .weight = weight,
                 .level_noise2 = weight + dim,
                 .noise = weight + dim + s.code.dims(),
                 .residual_limit = fit,
                 .noise_limit = fit + 1});
      break;
    }
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

int64_t QueryMoment::NumPicks(int64_t tokens, int group_heads) {
  return std::min(tokens * group_heads, kMostPicks);
}

QueryMoment::Pick QueryMoment::PickAt(int64_t i, int64_t tokens, int group_heads) {
  return {i * tokens / NumPicks(tokens, group_heads), static_cast<int>(i % group_heads)};
}

void QueryMoment::Add(const float* queries, int64_t count, int64_t tokens) {
  const Matrix mean = Moment(queries, count, dim_);
  if (!mean.allFinite()) return;
  if (sum_.empty()) sum_.assign(static_cast<size_t>(dim_) * dim_, 0.0);
  Eigen::Map<Matrix> sum(sum_.data(), dim_, dim_);
  sum += static_cast<double>(tokens) * mean;
  weight_ += static_cast<double>(tokens);
  if (weight_ <= kMostWeight) return;
  sum *= kMostWeight / weight_;
  weight_ = kMostWeight;
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

std::shared_ptr<const Index> Index::Make(const Storage& s, const float* keys, const float* values,
                                         int64_t count, const QueryMoment& moment, SignMap map) {
  const int dim_k = s.row.dim_k, dim_v = s.row.dim_v;
  std::vector<float> floats(NumFloats(s));
  float* center = floats.data();
  float* encode = center + dim_k;
  float* project = encode + dim_k * s.code.padded_dims();
  float* centroids = project + s.code.dims() * dim_k;
  float* basis = centroids + s.code.centroids * dim_k;
  float* value_mean = basis + BasisFloats(s.code, dim_k);
  float* value_step = value_mean + dim_v;
  float* rest = value_step + dim_v;

  RowMajor k = Eigen::Map<const RowMajor>(keys, count, dim_k);
  const Eigen::VectorXd mean = ColumnMeans(keys, count, dim_k);
  for (int c = 0; c < dim_k; ++c) center[c] = static_cast<float>(mean(c));
  if (s.code.bytes() > 0) {
    k.rowwise() -= mean.cast<float>().transpose();
    Matrix key_moment = Moment(k.data(), count, dim_k);
    Matrix query_moment = Matrix::Identity(dim_k, dim_k);
    if (!moment.empty())
      query_moment = Eigen::Map<const Matrix>(moment.Mean().data(), dim_k, dim_k);
    // Keys or queries with Inf or NaN cannot be calibrated on; any basis is valid.
    if (!key_moment.allFinite()) key_moment = Matrix::Identity(dim_k, dim_k);
    if (!query_moment.allFinite()) query_moment = Matrix::Identity(dim_k, dim_k);
    FillScores(s, k, key_moment, query_moment, map, encode, project, centroids, basis, rest + 3);
  }
  const RowMajor v = Eigen::Map<const RowMajor>(values, count, dim_v);
  const Eigen::VectorXd v_mean = ColumnMeans(values, count, dim_v);
  const double norm2 = v.cast<double>().rowwise().squaredNorm().mean();
  rest[0] = s.value_bits > 0
                ? static_cast<float>(FillValues(v, s.value_bits, v_mean, value_mean, value_step))
                : 0.f;
  rest[1] = static_cast<float>(norm2 - v_mean.squaredNorm());
  rest[2] = static_cast<float>(norm2);
  if (s.code.kind == IndexKind::kBalanced) rest[5] = ValueLimit(v.rowwise().squaredNorm().array());
  return std::shared_ptr<const Index>(new Index(s, std::move(floats)));
}

std::shared_ptr<const Index> Index::Recentre(const Storage& s, const Index& base, const float* keys,
                                             const float* values, int64_t count, double* flooded) {
  std::vector<float> floats = base.floats_;
  Eigen::Map<Eigen::VectorXf>(floats.data(), s.row.dim_k) =
      ColumnMeans(keys, count, s.row.dim_k).cast<float>();
  *flooded = base.RaiseLimits(s, keys, values, count, floats);
  return std::shared_ptr<const Index>(new Index(s, std::move(floats)));
}

std::shared_ptr<const Index> Index::WithLimitsOf(const Storage& s, const float* keys,
                                                 const float* values, int64_t count) const {
  std::vector<float> floats = floats_;
  RaiseLimits(s, keys, values, count, floats);
  return std::shared_ptr<const Index>(new Index(s, std::move(floats)));
}

double Index::RaiseLimits(const Storage& s, const float* keys, const float* values, int64_t count,
                          std::vector<float>& floats) const {
  const IndexTables tables = TablesAt(floats.data());
  RowMajor k = Eigen::Map<const RowMajor>(keys, count, s.row.dim_k);
  k.rowwise() -= Eigen::Map<const Eigen::RowVectorXf>(tables.center, s.row.dim_k);
  std::vector<cpu::CodeErrors> errors(static_cast<size_t>(count));
  cpu::FindCodeErrors(s, tables, k.data(), count, errors.data());
  Eigen::ArrayXf residual2(count), noise2(count);
  int64_t over = 0;
  for (int64_t i = 0; i < count; ++i) {
    residual2(i) = errors[i].residual2, noise2(i) = errors[i].noise2;
    over += !cpu::CodeTells(tables, errors[i]);
  }
  const Eigen::Map<const RowMajor> v(values, count, s.row.dim_v);
  float* const limits = floats.data() + floats.size() - NumScalars(s.code.kind);
  const auto raise = [](float& limit, const Eigen::ArrayXf& x) {
    if (x.allFinite()) limit = std::max(limit, QuantileOf(x, kMarkedQuantile));
  };
  raise(limits[0], residual2);
  raise(limits[1], noise2);
  raise(limits[2], v.rowwise().squaredNorm().array());
  return static_cast<double>(over) / static_cast<double>(count);
}

std::shared_ptr<const Index> Index::WithValuesOf(const Storage& s, const Index& first) const {
  std::vector<float> floats = floats_;
  const int64_t at = tables().value_mean - floats_.data();
  // And the mean squared residual
  std::copy_n(first.floats_.data() + at, 2 * s.row.dim_v + 1, floats.data() + at);
  return std::shared_ptr<const Index>(new Index(s, std::move(floats)));
}

std::shared_ptr<const Index> Index::FromFloats(const Storage& s, std::vector<float> floats) {
  return std::shared_ptr<const Index>(new Index(s, std::move(floats)));
}

int64_t Index::NumFloats(const Storage& s) {
  return s.row.dim_k +
         int64_t{s.row.dim_k} * (s.code.padded_dims() + s.code.dims() + s.code.centroids) +
         BasisFloats(s.code, s.row.dim_k) + 2 * s.row.dim_v + 3 + NumScalars(s.code.kind);
}

Index::Index(const Storage& s, std::vector<float> floats)
    : dim_k_(s.row.dim_k), dim_v_(s.row.dim_v), code_(s.code), floats_(std::move(floats)) {}

IndexTables Index::TablesAt(const float* base) const {
  IndexTables t;
  t.center = base;
  t.encode = t.center + dim_k_;
  t.project = t.encode + dim_k_ * code_.padded_dims();
  t.centroids = t.project + code_.dims() * dim_k_;
  t.step = t.centroids + int64_t{code_.centroids} * dim_k_;
  t.rest = t.step + code_.dims();
  t.weight = t.rest + (code_.kind == IndexKind::kBalanced ? dim_k_ * code_.padded_rest(dim_k_) : 0);
  t.level_noise2 = t.weight + dim_k_;
  t.noise = t.level_noise2 + code_.dims();
  t.value_mean = t.step + BasisFloats(code_, dim_k_);
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
    t.noise_limit = rest[4];
    t.value_limit = rest[5];
  }
  return t;
}

}  // namespace vattn
