#include "kernels/cpu/topk.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/cpu/attend.h"
#include "kernels/cpu/decode.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/scan.h"
#include "kernels/cpu/softmax.h"
#include "kernels/sampling.h"

namespace vattn::cpu {
namespace {

// Flags in scratch.tail, which has one word for each token of the middle.
constexpr uint32_t kHeadTop = 1;  // is in this head's top-k
constexpr uint32_t kRead = 2;     // was read by some head

// Adds listed tokens (numbers within the middle) to one head's state with one weight for all.
void AttendListed(const Storage& s, const Group& group, const uint32_t* tokens, int64_t count,
                  int head, float log_weight, float* state) {
  const uint8_t* rows[kTileRows];
  float weights[kTileRows];
  std::fill(weights, weights + kTileRows, log_weight);
  for (int64_t i = 0; i < count; i += kTileRows) {
    const int n = static_cast<int>(std::min<int64_t>(kTileRows, count - i));
    for (int r = 0; r < n; ++r) {
      rows[r] = RowOf(s, group, group.middle_begin + tokens[i + r]);
      group.scratch.tail[tokens[i + r]] |= kRead;
    }
    AttendRows(s, rows, n, n, group.scratch.query + int64_t{head} * s.row.dim_k, 1,
               log_weight == 0 ? nullptr : weights, state, /*value_norms=*/false);
  }
}

// The k best of the middle for one head, ascending, ties to the lower token, into list [n].
void TopK(const Group& group, int head, int64_t n, int64_t k, uint32_t* list) {
  const float* score = group.scratch.score + head * group.scratch.stride;
  std::iota(list, list + n, 0u);
  const auto better = [&](uint32_t a, uint32_t b) {
    return score[a] != score[b] ? score[a] > score[b] : a < b;
  };
  if (k < n) std::nth_element(list, list + k, list + n, better);
  std::sort(list, list + k);
}

// Lists the first `count` tokens of `order` that are not in the head's top-k; returns the number found.
int64_t TakeResidual(const Group& group, const uint32_t* order, int64_t n, int64_t count,
                     uint32_t* list) {
  int64_t found = 0;
  for (int64_t i = 0; i < n && found < count; ++i) {
    if ((group.scratch.tail[order[i]] & kHeadTop) == 0) list[found++] = order[i];
  }
  return found;
}

SampleMoments Moments(const Storage& s, const Group& group, const uint32_t* sample, int64_t count,
                      int head, float shift, double* mean_ev) {
  SampleMoments m;
  const int dim = s.row.dim_v;
  std::fill(mean_ev, mean_ev + dim, 0.0);
  float v[kMaxDim];
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* row = RowOf(s, group, group.middle_begin + sample[i]);
    const RowList key{
        .rows = &row, .count = 1, .offset = 0, .dim = s.row.dim_k, .dtype = s.row.dtype};
    const RowList value{
        .rows = &row, .count = 1, .offset = s.row.v_offset, .dim = dim, .dtype = s.row.dtype};
    float logit, norm2;
    DotRows(key, group.scratch.query + int64_t{head} * s.row.dim_k, 1, &logit, 1);
    NormRows(value, &norm2);
    LoadRows(value, v);
    const double e = std::exp(static_cast<double>(logit) - shift);
    m.e += e;
    m.e2 += e * e;
    m.ev2 += e * e * norm2;
    for (int j = 0; j < dim; ++j) mean_ev[j] += e * v[j];
  }
  const double inverse = count > 0 ? 1.0 / static_cast<double>(count) : 0;
  m.e *= inverse, m.e2 *= inverse, m.ev2 *= inverse;
  for (int j = 0; j < dim; ++j) {
    mean_ev[j] *= inverse;
    m.ev_norm2 += mean_ev[j] * mean_ev[j];
  }
  return m;
}

// Tokens of the middle in the order of their u, the first `need` of them sorted.
void OrderByUniform(const Promise& promise, const Group& group, int64_t n, int64_t need,
                    uint32_t* order) {
  float* u = group.scratch.sparse_weight;
  for (int64_t i = 0; i < n; ++i) {
    u[i] = TokenUniform(group.key, static_cast<uint32_t>(group.middle_begin + i), group.step,
                        promise.refresh);
  }
  std::iota(order, order + n, 0u);
  const auto less = [&](uint32_t a, uint32_t b) { return u[a] != u[b] ? u[a] < u[b] : a < b; };
  std::partial_sort(order, order + std::min(need, n), order + n, less);
}

// Base sample, budget and final sample of one head; true if the whole residual was read.
bool AddUniform(const Storage& s, const Promise& promise, const Group& group, const uint32_t* order,
                int64_t n, int64_t k, int head, uint32_t* list, float* state_floats) {
  const SoftmaxState state(state_floats, s.row.dim_v);
  const int64_t residual = n - k;
  const int64_t base = BaseSample(promise, n, k);
  TakeResidual(group, order, n, base, list);
  double mean_ev[kMaxDim];
  const SampleMoments m = Moments(s, group, list, base, head, state.max(), mean_ev);
  double norm2 = 0;
  for (int j = 0; j < s.row.dim_v; ++j) {
    const double sum = state.numerator[j] + static_cast<double>(residual) * mean_ev[j];
    norm2 += sum * sum;
  }
  const int64_t budget =
      SampleBudget(promise.target, promise.epsilon, promise.normal_quantile, residual, base, m,
                   state.denominator() + static_cast<double>(residual) * m.e, std::sqrt(norm2));
  const int64_t drawn = TakeResidual(group, order, n, budget, list);
  std::sort(list, list + drawn);
  AttendListed(s, group, list, drawn, head,
               drawn == residual ? 0.f
                                 : static_cast<float>(std::log(static_cast<double>(residual) /
                                                               static_cast<double>(drawn))),
               state_floats);
  return drawn == residual;
}

}  // namespace

void DecodeTopK(const Storage& s, const Promise& promise, Group& group, Workers* workers) {
  const Scratch& w = group.scratch;
  const int64_t n = group.middle_end - group.middle_begin, floats = StateFloats(s.row.dim_v);
  const int64_t k = ShareOf(promise.topk_share, n);
  const bool uniform = promise.policy == Policy::kTopKUniform;
  AttendFixed(s, group, w.work, workers);
  PrepareQueries(s, promise.index, group);
  ScanScores(s, promise.index, group, workers);
  std::fill(w.tail, w.tail + n, 0u);
  uint32_t* order = w.sparse_token;
  if (uniform) OrderByUniform(promise, group, n, n, order);
  uint32_t* list = w.token;
  for (int g = 0; g < group.group_heads; ++g) {
    float* at = w.work + g * floats;
    TopK(group, g, n, k, list);
    AttendListed(s, group, list, k, g, 0, at);
    bool exact = k == n;
    if (uniform && !exact) {
      for (int64_t i = 0; i < k; ++i) w.tail[list[i]] |= kHeadTop;
      exact = AddUniform(s, promise, group, order, n, k, g, list, at);
      for (int64_t i = 0; i < n; ++i) w.tail[i] &= ~kHeadTop;
    }
    const SoftmaxState state(at, s.row.dim_v);
    for (int j = 0; j < s.row.dim_v; ++j) state.numerator[j] /= state.denominator();
    WriteHead(s, group, g, state.numerator, std::log(state.denominator()) + state.max());
    SetVerdict(group, g, exact ? Verdict::kExact : Verdict::kBestEffort, 0);
  }
  for (int64_t i = 0; i < n; ++i) {
    if ((w.tail[i] & kRead) != 0)
      w.token[group.selected++] = static_cast<uint32_t>(group.middle_begin + i);
  }
  group.looks = 1;
  group.all_read = group.selected == n;
}

}  // namespace vattn::cpu
