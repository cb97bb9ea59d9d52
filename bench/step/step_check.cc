#include "bench/step/step_check.h"

#include <algorithm>
#include <cmath>

#include "api/vattn.h"
#include "bench/cli/dtype.h"
#include "bench/cli/parallel.h"

namespace vattn::bench {
namespace {

constexpr int64_t kPiece = 4096;  // tokens that a thread takes at a time

// Softmax states of every answer over some tokens.
struct Sums {
  std::vector<double> most;  // [answers] largest score
  std::vector<double> mass;  // [answers] sum of e = exp(score - most)
  std::vector<double> norm;  // [answers] sum of e |v|^2
  std::vector<double> out;   // [answers, head_dim] sum of e v
};

class Piece {
 public:
  Piece(const DecodeShape& shape, const std::vector<HeadAnswer>& answers)
      : shape_(shape),
        answers_(answers),
        count_(answers.size()),
        queries_(shape.head_dim * count_),
        scores_(count_),
        value_(shape.head_dim) {
    const double scale = 1 / std::sqrt(static_cast<double>(shape.head_dim));
    for (size_t i = 0; i < count_; ++i) {
      for (int32_t d = 0; d < shape.head_dim; ++d) {
        queries_[d * count_ + i] = scale * answers[i].q[d];
      }
    }
    sums_ = {std::vector<double>(count_, -INFINITY), std::vector<double>(count_),
             std::vector<double>(count_), std::vector<double>(count_ * shape.head_dim)};
  }

  void Add(const DecodeData& data, const HeadPlace& kv_head, int64_t first, int64_t count) {
    std::vector<float> k(count * shape_.head_dim), v(k.size());
    data.Rows(kv_head, first, count, k.data(), v.data());
    Round(&k);
    Round(&v);
    for (int64_t i = 0; i < count; ++i) {
      AddToken(first + i, &k[i * shape_.head_dim], &v[i * shape_.head_dim]);
    }
  }

  Sums Take() { return std::move(sums_); }

 private:
  void Round(std::vector<float>* values) const {
    std::vector<std::byte> rounded(values->size() * ElementBytes(shape_.dtype));
    FromFloat(shape_.dtype, values->data(), values->size(), rounded.data());
    ToFloat(shape_.dtype, rounded.data(), values->size(), values->data());
  }

  void AddToken(int64_t token, const float* k, const float* v) {
    const int32_t dim = shape_.head_dim;
    std::fill(scores_.begin(), scores_.end(), 0.);
    for (int32_t d = 0; d < dim; ++d) {
      const double x = k[d];
      const double* q = &queries_[d * count_];
      for (size_t i = 0; i < count_; ++i) scores_[i] += x * q[i];
    }
    double norm2 = 0;
    for (int32_t d = 0; d < dim; ++d) {
      value_[d] = v[d];
      norm2 += value_[d] * value_[d];
    }
    for (size_t i = 0; i < count_; ++i) {
      if (token > shape_.tokens + answers_[i].step) continue;
      double* out = &sums_.out[i * dim];
      if (scores_[i] > sums_.most[i]) {
        const double keep = std::exp(sums_.most[i] - scores_[i]);
        sums_.most[i] = scores_[i];
        sums_.mass[i] *= keep;
        sums_.norm[i] *= keep;
        for (int32_t d = 0; d < dim; ++d) out[d] *= keep;
      }
      const double e = std::exp(scores_[i] - sums_.most[i]);
      sums_.mass[i] += e;
      sums_.norm[i] += e * norm2;
      for (int32_t d = 0; d < dim; ++d) out[d] += e * value_[d];
    }
  }

  const DecodeShape& shape_;
  const std::vector<HeadAnswer>& answers_;
  const size_t count_;
  std::vector<double> queries_;  // [head_dim, answers] scaled
  std::vector<double> scores_, value_;
  Sums sums_;
};

}  // namespace

int64_t AnswerErrors::VerifiedOver(double epsilon) const {
  return std::count_if(verified.begin(), verified.end(),
                       [epsilon](double error) { return !(error <= epsilon); });
}

double AnswerErrors::WorstExact() const {
  double worst = 0;
  for (const double error : exact) {
    if (!(error <= worst)) worst = error;
    if (std::isnan(worst)) break;
  }
  return worst;
}

void CheckAnswers(const DecodeShape& shape, const DecodeData& data, const HeadPlace& kv_head,
                  const std::vector<HeadAnswer>& answers, int32_t norm, double norm_floor,
                  int threads, AnswerErrors* errors) {
  int64_t tokens = 0;
  for (const HeadAnswer& answer : answers) {
    tokens = std::max(tokens, shape.tokens + answer.step + 1);
  }
  std::vector<Sums> parts((tokens + kPiece - 1) / kPiece);
  ParallelFor(threads, static_cast<int64_t>(parts.size()), [&](int64_t i) {
    Piece piece(shape, answers);
    piece.Add(data, kv_head, i * kPiece, std::min(kPiece, tokens - i * kPiece));
    parts[i] = piece.Take();
  });
  const size_t dim = shape.head_dim;
  for (size_t i = 0; i < answers.size(); ++i) {
    const HeadAnswer& answer = answers[i];
    double most = -INFINITY, mass = 0, norm2 = 0;
    for (const Sums& part : parts) most = std::max(most, part.most[i]);
    std::vector<double> out(dim);
    for (const Sums& part : parts) {
      const double weight = std::exp(part.most[i] - most);
      mass += weight * part.mass[i];
      norm2 += weight * part.norm[i];
      for (size_t d = 0; d < dim; ++d) out[d] += weight * part.out[i * dim + d];
    }
    double length2 = 0, distance2 = 0;
    for (size_t d = 0; d < dim; ++d) {
      const double o = out[d] / mass, off = answer.out[d] - o;
      length2 += o * o;
      distance2 += off * off;
    }
    double ref = std::sqrt(length2);
    if (norm == VATTN_NORM_VALUE) ref = std::max(ref, norm_floor * std::sqrt(norm2 / mass));
    const double error = std::sqrt(distance2) / ref;
    if (answer.verdict == VATTN_VERDICT_VERIFIED) errors->verified.push_back(error);
    if (answer.verdict == VATTN_VERDICT_EXACT || answer.verdict == VATTN_VERDICT_DENSE) {
      errors->exact.push_back(error);
    }
  }
}

}  // namespace vattn::bench
