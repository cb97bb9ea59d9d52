#include "runtime/index/index_kinds.h"

#include <Eigen/Cholesky>
#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "kernels/cpu/index.h"
#include "kernels/rng.h"

namespace vattn {
namespace {

using Rows =
    Eigen::Map<const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>;

constexpr Eigen::Index kFitQueries = 64;
constexpr int64_t kFitKeys = 2048;  // evenly spread over the sample
constexpr int kRounds = 6;          // of k-means; more move few keys

// Counter-based: number `at` of stream `of`.
float Normal(uint32_t of, uint32_t at) {
  const Philox4 r = Philox({{at, of, 0, 0}}, 0x7369676eu, 0x6d617073u);
  constexpr float kTurn = 6.28318531f;
  return std::sqrt(-2 * std::log(UnitFloat(r.word[0]))) * std::cos(kTurn * UnitFloat(r.word[1]));
}

// Least squares of score = slope * raw + intercept, over pairs in units of |q|.
class Line {
 public:
  void Add(double raw, double score) {
    ++count_;
    raw_ += raw, score_ += score;
    raw2_ += raw * raw, cross_ += raw * score;
  }
  // Slope 1 where pairs do not determine one.
  void Solve(float* fit) const {
    const double n = std::max<double>(1, static_cast<double>(count_));
    const double spread = raw2_ - raw_ * raw_ / n, slope = (cross_ - raw_ * score_ / n) / spread;
    const bool determined = spread > 1e-9 * raw2_ && std::isfinite(slope);
    fit[0] = determined ? static_cast<float>(slope) : 1.f;
    fit[1] = determined ? static_cast<float>((score_ - slope * raw_) / n) : 0.f;
  }

 private:
  int64_t count_ = 0;
  double raw_ = 0, score_ = 0, raw2_ = 0, cross_ = 0;
};

}  // namespace

Eigen::MatrixXf DrawQueries(const Eigen::MatrixXd& moment) {
  const Eigen::Index dim = moment.rows();
  Eigen::MatrixXd regular = moment;
  regular.diagonal().array() += 1e-4 * moment.diagonal().mean() + 1e-12;
  Eigen::MatrixXf normal(dim, kFitQueries);
  for (Eigen::Index i = 0; i < kFitQueries; ++i) {
    for (Eigen::Index c = 0; c < dim; ++c)
      normal(c, i) = Normal(static_cast<uint32_t>(i), static_cast<uint32_t>(c));
  }
  const Eigen::MatrixXf low =
      Eigen::LLT<Eigen::MatrixXd>(regular).matrixL().toDenseMatrix().cast<float>();
  return low * normal;
}

void FillSigns(const CodeLayout& code, int dim, SignMap map, float* encode, float* project) {
  const int padded = code.padded_dims();
  std::fill(encode, encode + dim * padded, 0.f);
  for (int j = 0; j < code.dims(); ++j) {
    for (int c = 0; c < dim; ++c) {
      const float random = Normal(static_cast<uint32_t>(j) + (1u << 16), static_cast<uint32_t>(c));
      encode[c * padded + j] = map.key == nullptr ? random : map.key[j * dim + c];
      project[j * dim + c] = map.query == nullptr ? random : map.query[j * dim + c];
    }
  }
}

void FillHadamard(const CodeLayout& code, const KeySample& sample, double step, float* encode,
                  float* project) {
  const int dim = sample.dim, dims = code.dims(), padded = code.padded_dims();
  Eigen::MatrixXf rotation(dim, dims);
  for (int c = 0; c < dim; ++c) {
    for (int j = 0; j < dims; ++j) {
      const bool minus = std::popcount(static_cast<unsigned>(c & j)) % 2 == 1;
      rotation(c, j) = (minus ? -1.f : 1.f) / std::sqrt(static_cast<float>(dims));
    }
  }
  Eigen::ArrayXd square = Eigen::ArrayXd::Zero(dims);
  const Rows keys(sample.keys, sample.count, dim);
  constexpr Eigen::Index kRows = 1024;
  for (Eigen::Index i = 0; i < keys.rows(); i += kRows) {
    const Eigen::MatrixXf x = keys.middleRows(i, std::min(kRows, keys.rows() - i)) * rotation;
    square += x.array().square().colwise().sum().transpose().cast<double>();
  }
  for (int j = 0; j < dims; ++j) {
    double width = step * std::sqrt(square(j) / static_cast<double>(sample.count));
    if (!(width > 1e-9) || !std::isfinite(width)) width = 1e-9;
    for (int c = 0; c < dim; ++c) {
      encode[c * padded + j] = static_cast<float>(rotation(c, j) / width);
      project[j * dim + c] = static_cast<float>(rotation(c, j) * width);
    }
  }
}

void FitSigns(const CodeLayout& code, const KeySample& sample, const Eigen::MatrixXf& queries,
              const float* encode, const float* project, float* fit) {
  const int dim = sample.dim, dims = code.dims();
  const int64_t stride = (sample.count + kFitKeys - 1) / kFitKeys, count = sample.count / stride;
  const Eigen::Map<const Rows::PlainObject, 0, Eigen::OuterStride<>> keys(
      sample.keys, count, dim, Eigen::OuterStride<>(stride * dim));
  const auto sign = [](float x) { return x >= 0 ? .5f : -.5f; };
  const Eigen::MatrixXf of_keys =
      (keys * Rows(encode, dim, code.padded_dims()).leftCols(dims)).unaryExpr(sign);
  const Eigen::MatrixXf of_queries = (Rows(project, dims, dim) * queries).unaryExpr(sign) * 2;
  const Eigen::MatrixXf raw = of_keys * of_queries, score = keys * queries;
  Line line;
  for (Eigen::Index q = 0; q < queries.cols(); ++q) {
    const double norm = queries.col(q).norm();
    for (Eigen::Index i = 0; i < count && norm > 0; ++i) line.Add(raw(i, q), score(i, q) / norm);
  }
  line.Solve(fit);
}

void FitBounds(const KeySample& sample, const Eigen::MatrixXf& queries, float* fit) {
  const int64_t tiles = sample.count / kTileTokens;
  const int64_t stride = std::max<int64_t>(1, tiles * kTileTokens / kFitKeys);
  const Eigen::MatrixXf above = queries.cwiseMax(0.f), below = queries.cwiseMin(0.f);
  Line line;
  for (int64_t tile = 0; tile < tiles; tile += stride) {
    const Rows keys(sample.keys + tile * kTileTokens * sample.dim, kTileTokens, sample.dim);
    const Eigen::MatrixXf score = keys * queries;
    const Eigen::RowVectorXf bound =
        keys.colwise().maxCoeff() * above + keys.colwise().minCoeff() * below;
    for (Eigen::Index q = 0; q < queries.cols(); ++q) {
      const double norm = queries.col(q).norm();
      for (Eigen::Index i = 0; i < kTileTokens && norm > 0; ++i)
        line.Add(bound(q) / norm, score(i, q) / norm);
    }
  }
  line.Solve(fit);
}

void FillCentroids(const Storage& s, const KeySample& sample, float* centroids) {
  const int dim = sample.dim, all = s.code.centroids;
  for (int i = 0; i < all; ++i) {
    std::copy_n(sample.keys + i * sample.count / all * dim, dim, centroids + int64_t{i} * dim);
  }
  const IndexTables tables{.centroids = centroids};
  for (int round = 0; round < kRounds; ++round) {
    std::vector<double> sum(static_cast<size_t>(all) * dim, 0.0);
    std::vector<int64_t> members(all, 0);
    for (int64_t i = 0; i + kTileTokens <= sample.count; i += kTileTokens) {
      uint16_t nearest[kTileTokens];
      cpu::EncodeClusters(s, tables, sample.keys + i * dim, reinterpret_cast<uint8_t*>(nearest));
      for (int t = 0; t < kTileTokens; ++t) {
        ++members[nearest[t]];
        for (int c = 0; c < dim; ++c)
          sum[int64_t{nearest[t]} * dim + c] += sample.keys[(i + t) * dim + c];
      }
    }
    for (int i = 0; i < all; ++i) {
      for (int c = 0; c < dim && members[i] > 0; ++c) {
        centroids[int64_t{i} * dim + c] =
            static_cast<float>(sum[int64_t{i} * dim + c] / static_cast<double>(members[i]));
      }
    }
  }
}

}  // namespace vattn
