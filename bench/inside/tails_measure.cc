#include "bench/inside/tails_measure.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <span>
#include <utility>

#include "bench/cli/dtype.h"
#include "bench/cli/failure.h"
#include "bench/inside/index_view.h"
#include "bench/inside/tail_tables.h"
#include "bench/inside/tail_terms.h"
#include "kernels/cpu/values.h"

namespace vattn::bench {
namespace {

constexpr int64_t kPage = 16;  // Rectified SpaAttn
constexpr int32_t kClusters = 1024;

using States = std::array<HeadState, kTails>;

vattn_options WithValueCodes(vattn_options options) {
  options.value_bits = 2;
  return options;
}

// Centroids in fp32 are index_bytes a token at 16,384 of them.
vattn_options WithClusters(vattn_options options) {
  options.index = VATTN_INDEX_CLUSTERS;
  options.index_bytes = options.head_dim_k * 4 * kClusters / 16384;
  return options;
}

std::vector<float> LoadRows(const Tensor& tensor, int64_t layer, int64_t head, int64_t count) {
  const int64_t dim = tensor.shape[3];
  std::vector<float> rows(count * dim);
  for (int64_t t = 0; t < count; ++t) {
    ToFloat(tensor.dtype, tensor.Row(layer, head, t), dim, &rows[t * dim]);
  }
  return rows;
}

// What stands for the rows of one KV head, whatever the query.
struct Tables {
  std::vector<float> keys, values;  // [tokens][dim] of the whole prompt
  TailTable mean, pages, clusters, codes;
  std::vector<int32_t> own;  // a row's own value
};

// A step's scores of the middle, of all heads of a group.
struct Scores {
  std::vector<float> exact, predicted, coarse;  // coarse: of the token's centroid
};

class Tails {
 public:
  Tails(const Trace& trace, const TailPlan& plan)
      : trace_(trace),
        plan_(plan),
        view_(trace, plan.layers, WithValueCodes(plan.options)),
        clusters_(trace, plan.layers, WithClusters(plan.options)) {
    if (clusters_.storage().code.centroids != kClusters) {
      throw Failure(trace.path + ": there is no index of so many clusters for its head_dim");
    }
  }

  void MeasureGroup(int64_t l, int64_t h) {
    const Tables tables = MakeTables(l, h);
    const int64_t heads = trace_.q_heads / trace_.kv_heads;
    std::vector<States> states(heads);
    for (States& of : states) {
      for (HeadState& state : of) state.cos2 = -1;
    }
    for (const int64_t step : plan_.steps) {
      Group group = view_.Prepare(l, h, step), clustered = clusters_.Prepare(l, h, step);
      Scores scores;
      scores.exact = view_.ExactScores(group);
      scores.predicted = view_.PredictedScores(group, scores.exact);
      scores.coarse = clusters_.PredictedScores(clustered, scores.exact);
      for (int64_t g = 0; g < heads; ++g) {
        const auto number = static_cast<uint64_t>(l * trace_.q_heads + h * heads + g);
        random_.seed(plan_.options.seed << 48 | number << 32 | static_cast<uint64_t>(step));
        MeasureHead(tables, group, g, scores, &states[g]);
      }
    }
  }

  std::array<TailFigures, kTails> Finish() {
    const Group group = view_.Prepare(0, 0, 0);
    const auto n = static_cast<double>(group.middle_end - group.middle_begin);
    const auto key = static_cast<double>(trace_.head_dim_k);
    const auto value = static_cast<double>(trace_.head_dim_v);
    figures_[kMean].bytes = 2 * value / n;
    figures_[kValueCodes].bytes = static_cast<double>(view_.storage().value_code_bytes);
    figures_[kPages].bytes = 2 * value / kPage;
    figures_[kClusterMeans].bytes = 2 + kClusters * 2 * value / n;
    figures_[kLinear].bytes = 4 * key * (value + 1) / n;
    figures_[kProduct].bytes = 2 + kClusters * 4 * key / n;
    return std::move(figures_);
  }

 private:
  Tables MakeTables(int64_t l, int64_t h) {
    Tables t;
    t.keys = LoadRows(trace_.k, plan_.layers[l], h, trace_.prompt_tokens);
    t.values = LoadRows(trace_.v, plan_.layers[l], h, trace_.prompt_tokens);
    const Group coded = view_.Prepare(l, h, 0), clustered = clusters_.Prepare(l, h, 0);
    const Storage& s = clusters_.storage();
    const int64_t begin = coded.middle_begin, n = coded.middle_end - begin, dim = trace_.head_dim_v;
    t.own.resize(n);
    std::iota(t.own.begin(), t.own.end(), 0);
    t.codes.rows.resize(n * dim);
    t.codes.entry = t.own;
    std::vector<int32_t> nearest(n);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t token = begin + i, place = token % kBlockTokens;
      const uint8_t* code = cpu::ValueCodeOf(view_.storage(), coded, static_cast<uint32_t>(token));
      cpu::DecodeValues(view_.storage(), coded.index, &code, 1, &t.codes.rows[i * dim]);
      const std::byte* block = s.base + clustered.blocks[token / kBlockTokens] * s.block.bytes;
      uint16_t centroid;  // tokens of a tile one after the other, and tiles too
      std::memcpy(&centroid, block + s.block.codes + place * sizeof(centroid), sizeof(centroid));
      nearest[i] = centroid;
    }
    const float* values = &t.values[begin * dim];
    t.mean = MeanTable(values, dim, Pages(n, n));
    t.pages = MeanTable(values, dim, Pages(n, kPage));
    t.clusters = MeanTable(values, dim, std::move(nearest));
    return t;
  }

  void MeasureHead(const Tables& tables, const Group& group, int64_t g, const Scores& scores,
                   States* states) {
    const int64_t begin = group.middle_begin, end = group.middle_end, n = end - begin;
    const int64_t dim = trace_.head_dim_v, dim_k = trace_.head_dim_k;
    const float* query = group.scratch.query + g * dim_k;
    const std::span exact = std::span(scores.exact).subspan(g * n, n);
    std::vector<std::pair<int64_t, double>> fixed;  // tokens of the exact sets and their scores
    double shift = *std::max_element(exact.begin(), exact.end());
    for (int64_t t = 0; t < group.tokens; ++t) {
      if (t == begin) t = end;
      fixed.emplace_back(t, std::inner_product(query, query + dim_k, &tables.keys[t * dim_k], 0.));
      shift = std::max(shift, fixed.back().second);
    }
    TailHead head{.n = n,
                  .dim = dim,
                  .values = &tables.values[begin * dim],
                  .e = {},
                  .numerator = std::vector<double>(dim)};
    for (const auto& [token, score] : fixed) {
      const double e = std::exp(score - shift);
      head.denominator += e;
      for (int64_t j = 0; j < dim; ++j) {
        const double v = tables.values[token * dim + j];
        head.numerator[j] += e * v;
        head.value_norm2 += e * v * v;
      }
    }
    const auto unit = [&](std::span<const float> all) {
      std::vector<double> e;
      for (const float score : all.subspan(g * n, n)) e.push_back(std::exp(score - shift));
      return e;
    };
    head.e = unit(scores.exact);
    const std::vector<double> guess = unit(scores.predicted);
    const double rows = plan_.rows * static_cast<double>(n);
    const std::vector<double> weight = DrawWeights(guess, rows);
    const auto stand_in = [&](const TailTable& table) {
      return StandIn{guess, table.rows.data(), table.entry.data()};
    };
    std::vector<float> unscaled(query, query + dim_k);
    for (float& q : unscaled) q /= view_.storage().scale;
    std::array<StandIn, kTails> in_place;
    in_place[kMean] = stand_in(tables.mean);
    in_place[kValueCodes] = stand_in(tables.codes);
    in_place[kPages] = stand_in(tables.pages);
    in_place[kClusterMeans] = stand_in(tables.clusters);
    in_place[kLinear] = {
        LinearGuess(unscaled.data(), &tables.keys[begin * dim_k], dim_k, guess, weight),
        head.values, tables.own.data()};
    const std::vector<double> by_product = DrawWeights(unit(scores.coarse), rows);
    const uint64_t seed = random_();
    for (int tail = 0; tail < kTails; ++tail) {
      random_.seed(seed);  // the same rows for every term
      MeasureTerm(TailEstimator(head, in_place[tail]), tail == kProduct ? by_product : weight,
                  &(*states)[tail], &figures_[tail]);
    }
  }

  void MeasureTerm(const TailEstimator& estimator, const std::vector<double>& weight,
                   HeadState* state, TailFigures* figures) {
    const Promise& promise = view_.promise();
    const double ref = estimator.ExactRef(promise);
    double z = 0;
    for (int32_t k = 0; k < plan_.draws; ++k) {
      const TailDraw draw =
          DrawTail(weight, [&] { return (static_cast<double>(random_() >> 11) + .5) * 0x1p-53; });
      const TailAnswer answer = estimator.Estimate(draw, promise, state);
      double distance2 = 0;
      for (size_t j = 0; j < answer.output.size(); ++j) {
        distance2 += std::pow(answer.output[j] - estimator.exact()[j], 2);
      }
      const double error = std::sqrt(distance2) / ref;
      figures->errors.push_back(error);
      if (answer.bound <= promise.epsilon) {
        ++figures->certified;
        figures->off += error > promise.epsilon;
      }
      z += answer.z / plan_.draws;
    }
    figures->needed.push_back(estimator.RowsNeeded(weight, promise, z) /
                              static_cast<double>(weight.size()));
  }

  const Trace& trace_;
  const TailPlan& plan_;
  IndexView view_, clusters_;
  std::mt19937_64 random_;
  std::array<TailFigures, kTails> figures_;
};

}  // namespace

std::array<TailFigures, kTails> MeasureTails(const Trace& trace, const TailPlan& plan,
                                             Progress* progress) {
  Tails tails(trace, plan);
  const int64_t groups = static_cast<int64_t>(plan.layers.size()) * trace.kv_heads;
  for (int64_t i = 0; i < groups; ++i) {
    tails.MeasureGroup(i / trace.kv_heads, i % trace.kv_heads);
    progress->Count(i + 1, groups);
  }
  return tails.Finish();
}

}  // namespace vattn::bench
