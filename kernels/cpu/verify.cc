#include "kernels/cpu/verify.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/attend.h"
#include "kernels/cpu/encode.h"
#include "kernels/cpu/rows.h"

namespace vattn::cpu {
namespace {

constexpr int kRankDraws = 16;       // residuals whose angles are measured, drawn by their share of V
constexpr float kRankMemory = .75f;  // of cos2 from step to step
constexpr float kTargetMargin = .95f;  // Growth aims below epsilon by this factor
constexpr int64_t kLeastTail = 8;    // sampled tokens that a variance is judged by
constexpr float kTailGrowth = 4;     // of inclusion probabilities when there are fewer
constexpr float kLeastOthers = 1e-3f;  // of the denominator
constexpr float kLeastRef = 1e-15f;  // the squares of smaller values leave fp32
constexpr int kMaxDim = 1024;

float Inclusion(const Group& group, const Draw& draw, int64_t i) {
  return std::min(1.f, draw.scale * group.scratch.weight[i]);
}

// Residual e (v - o) - e^ (v^ - o) of the listed places, [count][dim_v].
void Residuals(const Storage& s, const Group& group, const uint32_t* places, int count, int head,
               const float* output, float* out) {
  const int dim = s.row.dim_v;
  const Scratch& w = group.scratch;
  const float shift = w.head[head].shift;
  const uint8_t* rows[kRankDraws];
  for (int i = 0; i < count; ++i) rows[i] = w.row[places[i]];
  LoadRows({.rows = rows, .count = count, .offset = s.row.v_offset, .dim = dim, .dtype = s.row.dtype}, out);
  for (int i = 0; i < count; ++i) {
    const float e = std::exp(w.logit[head * w.stride + places[i]] - shift);
    float* r = out + i * dim;
    for (int j = 0; j < dim; ++j) r[j] = e * (r[j] - output[j]);
    if (s.value_bits == 0) continue;
    float decoded[kMaxDim];
    const uint8_t* code = ValueCodeOf(s, group, w.token[places[i]]);
    DecodeValues(s, group.index, &code, 1, decoded);
    const float guess = w.guess[head * w.stride + places[i]];
    for (int j = 0; j < dim; ++j) r[j] -= guess * (decoded[j] - output[j]);
  }
}

float Dot(const float* a, const float* b, int n) {
  float sum[8] = {};
  for (int j = 0; j < n; j += 8) {
    for (int k = 0; k < 8; ++k) sum[k] += a[j + k] * b[j + k];
  }
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

// Mean squared cosine between the residuals of distinct tokens, drawn systematically in proportion to
// their terms of V (places [kRankDraws]); negative if there are no two.
float MeanCos2(const Storage& s, const Group& group, const uint32_t* places, int head, const float* output) {
  const int dim = s.row.dim_v;
  float r[kRankDraws * kMaxDim];
  float gram[kRankDraws * kRankDraws];
  Residuals(s, group, places, kRankDraws, head, output, r);
  const uint8_t* rows[kRankDraws];
  for (int i = 0; i < kRankDraws; ++i) rows[i] = reinterpret_cast<const uint8_t*>(r + i * dim);
  DotRows({.rows = rows, .count = kRankDraws, .offset = 0, .dim = dim, .dtype = DType::kF32}, r, kRankDraws, gram,
          kRankDraws);
  float sum = 0;
  int pairs = 0;
  for (int i = 0; i < kRankDraws; ++i) {
    for (int k = 0; k < i; ++k) {
      const float norms2 = gram[i * (kRankDraws + 1)] * gram[k * (kRankDraws + 1)];
      if (places[i] == places[k] || norms2 == 0) continue;
      const float dot = gram[i * kRankDraws + k];
      sum += dot * dot / norms2;
      ++pairs;
    }
  }
  return pairs > 0 ? sum / static_cast<float>(pairs) : -1;
}

}  // namespace

float QuantileAt(const Promise& promise, int look, float cos2) {
  const float at = std::max(std::min(1.f, cos2), 0.f) * kQuantileBins;  // NaN as rank 1
  const int bin = std::min(static_cast<int>(at), kQuantileBins - 1);
  const float* z = promise.quantile[look - 1];
  return z[bin] + (at - static_cast<float>(bin)) * (z[bin + 1] - z[bin]);
}

int64_t ListTail(const Group& group, const Draw& draw) {
  int64_t tail = 0;
  for (int64_t i = 0; i < draw.count; ++i) {
    if (draw.scale * group.scratch.weight[i] < 1) group.scratch.tail[tail++] = static_cast<uint32_t>(i);
  }
  return tail;
}

void VerifyHead(const Storage& s, const Promise& promise, const Group& group, const Draw& draw,
                int64_t tail, int look, int head, const float* output, const float* dots) {
  const Scratch& w = group.scratch;
  HeadWork& work = w.head[head];
  HeadState& state = group.state[head];
  const float norm2 = Dot(output, output, s.row.dim_v);
  const float inverse_d2 = 1 / (work.denominator * work.denominator);
  const float* logit = w.logit + head * w.stride;
  const float* guess = s.value_bits > 0 ? w.guess + head * w.stride : nullptr;
  float* term = w.scaled + head * w.stride;        // c |a - b o|^2 / D^2, for the rank draws
  float* residual = w.residual + head * w.stride;  // |a - b o|^2 / (pi D^2), for Growth
  double variance = 0, squares = 0, mass = 0, spread = 0, relative = 0, estimate = 0;
  for (int64_t t = 0; t < tail; ++t) {
    const uint32_t i = w.tail[t];
    const float pi = Inclusion(group, draw, i);
    // Without value codes the weights in use are e / pi; place t <= i of them is free for the terms.
    const float e = guess == nullptr ? term[i] * pi : std::exp(logit[i] - work.shift);
    const float distance2 = std::max(w.value_norm2[i] - 2 * dots[t] + norm2, 0.f);  // NaN stays
    float error2 = e * e * distance2;
    if (guess != nullptr) {
      // |e (v - o) - e^ (v^ - o)|^2 from dot products.
      const float code_dot = w.code_dot[head * w.stride + t];
      const float code_distance2 = w.code_norm2[i] - 2 * code_dot + norm2;
      const float inner = w.cross[i] - dots[t] - code_dot + norm2;
      error2 = std::max(0.f, error2 + guess[i] * guess[i] * code_distance2 - 2 * e * guess[i] * inner);
      relative += (e - guess[i]) * (e - guess[i]) / pi;
      estimate += guess[i] * guess[i] / pi;
    }
    // A token that makes up much of the denominator has drawn the output to itself: its residual is that
    // to the output without it (jackknife).
    const float others = std::max(1 - e / (pi * work.denominator), kLeastOthers);
    residual[t] = error2 * inverse_d2 / (pi * others * others);
    term[t] = residual[t] * (1 - pi) / pi;
    variance += term[t];
    squares += static_cast<double>(term[t]) * term[t];
    mass += e / pi;
    spread += e / pi * distance2;
  }
  work.variance = static_cast<float>(variance);
  if (mass > 0) state.spread = std::max(static_cast<float>(spread / mass), std::numeric_limits<float>::min());
  if (estimate > 0) {
    const float eta2 = std::clamp(static_cast<float>(relative / estimate), .01f, 4.f);
    state.eta2 += .2f * (eta2 - state.eta2);
  }
  // Effective rank Tr(S)^2 / Tr(S^2), S = sum of c r r^T: terms of one token with itself are known,
  // those of two tokens come from the mean squared cosine of draws, smoothed over steps.
  float places_cos2 = -1;
  if (tail > 1 && variance > 0) {
    uint32_t places[kRankDraws];
    double sum = 0;
    int next = 0;
    for (int64_t t = 0; t < tail && next < kRankDraws; ++t) {
      sum += term[t];
      while (next < kRankDraws && (next + .5) / kRankDraws * variance <= sum) places[next++] = w.tail[t];
    }
    while (next < kRankDraws) places[next++] = w.tail[tail - 1];
    places_cos2 = MeanCos2(s, group, places, head, output);
  }
  if (places_cos2 >= 0) {
    state.cos2 = state.cos2 < 0 ? places_cos2 : kRankMemory * state.cos2 + (1 - kRankMemory) * places_cos2;
  }
  const float same = variance > 0 ? static_cast<float>(squares / (variance * variance)) : 1;
  work.cos2 = same + (1 - same) * (state.cos2 < 0 ? 1 : state.cos2);
  work.z = QuantileAt(promise, look, work.cos2);
  // Either nothing was left to chance, or enough was drawn by chance to judge the rest by. What is not
  // finite never passes.
  const bool exact = tail == 0 && draw.count == group.middle_end - group.middle_begin;
  const bool judged = exact || (tail >= kLeastTail && work.ref >= kLeastRef);
  const float bound = exact ? 0 : work.z * std::sqrt(work.variance) / work.ref;
  work.bound = judged && std::isfinite(bound + norm2) ? bound : std::numeric_limits<float>::infinity();
}

float Growth(const Promise& promise, const Group& group, const Draw& draw, int64_t tail, int look) {
  const Scratch& w = group.scratch;
  float factor = tail < kLeastTail ? kTailGrowth : 1.05f;
  for (int g = 0; g < group.q_heads; ++g) {
    const float z = QuantileAt(promise, look, w.head[g].cos2);
    const float root = kTargetMargin * promise.epsilon * w.head[g].ref / z;
    const float* residual = w.residual + g * w.stride;
    const auto enough = [&](float by) {
      float variance = 0;
      for (int64_t t = 0; t < tail; ++t) {
        const float pi = std::min(1.f, by * draw.scale * w.weight[w.tail[t]]);
        variance += residual[t] * (1 - pi) / pi;
      }
      return variance <= root * root;
    };
    if (enough(factor)) continue;
    float low = factor, high = 64;
    for (int i = 0; i < 14; ++i) {
      const float middle = std::sqrt(low * high);
      (enough(middle) ? high : low) = middle;
    }
    factor = high;
  }
  return factor;
}

}  // namespace vattn::cpu
