#include "kernels/cpu/verify.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/attend.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/values.h"
#include "kernels/sampling.h"

namespace vattn::cpu {
namespace {

float InclusionProbability(const Group& group, const Draw& draw, int64_t i) {
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
  LoadRows(
      {.rows = rows, .count = count, .offset = s.row.v_offset, .dim = dim, .dtype = s.row.dtype},
      out);
  for (int i = 0; i < count; ++i) {
    const float e = std::exp(w.logit[head * w.stride + places[i]] - shift);
    float* r = out + i * dim;
    for (int j = 0; j < dim; ++j) r[j] = e * (r[j] - output[j]);
    if (s.value_bits == 0) continue;
    float decoded[kMaxDim];
    const uint8_t* code = ValueCodeOf(s, group, w.token[places[i]]);
    DecodeValues(s, group.index, &code, 1, decoded);
    const float predicted_e = w.predicted_e[head * w.stride + places[i]];
    for (int j = 0; j < dim; ++j) r[j] -= predicted_e * (decoded[j] - output[j]);
  }
}

float Dot(const float* a, const float* b, int n) {
  float sum[8] = {};
  for (int j = 0; j < n; j += 8) {
    for (int k = 0; k < 8; ++k) sum[k] += a[j + k] * b[j + k];
  }
  return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

// Mean squared cosine between the residuals of distinct tokens, drawn systematically in proportion
// to their terms of V (places [kRankDraws]); negative if there are no two.
float MeanCos2(const Storage& s, const Group& group, const uint32_t* places, int head,
               const float* output) {
  const int dim = s.row.dim_v;
  float r[kRankDraws * kMaxDim];
  float gram[kRankDraws * kRankDraws];
  Residuals(s, group, places, kRankDraws, head, output, r);
  const uint8_t* rows[kRankDraws];
  for (int i = 0; i < kRankDraws; ++i) rows[i] = reinterpret_cast<const uint8_t*>(r + i * dim);
  DotRows({.rows = rows, .count = kRankDraws, .offset = 0, .dim = dim, .dtype = DType::kF32}, r,
          kRankDraws, gram, kRankDraws);
  float sum = 0;
  int pairs = 0;
  for (int i = 0; i < kRankDraws; ++i) {
    for (int k = 0; k < i; ++k) {
      const float norm2_i = gram[i * (kRankDraws + 1)], norm2_k = gram[k * (kRankDraws + 1)];
      if (places[i] == places[k] || norm2_i == 0 || norm2_k == 0) continue;
      // Roots first: products of four small values leave fp32.
      const float cosine = gram[i * kRankDraws + k] / (std::sqrt(norm2_i) * std::sqrt(norm2_k));
      sum += cosine * cosine;
      ++pairs;
    }
  }
  return pairs > 0 ? sum / static_cast<float>(pairs) : -1;
}

}  // namespace

int64_t ListTail(const Group& group, const Draw& draw) {
  int64_t tail = 0;
  for (int64_t i = 0; i < draw.count; ++i) {
    if (draw.scale * group.scratch.weight[i] < 1)
      group.scratch.tail[tail++] = static_cast<uint32_t>(i);
  }
  return tail;
}

void DotTail(const Storage& s, const Group& group, int64_t tail, const float* outputs) {
  const Scratch& w = group.scratch;
  const int dim = s.row.dim_v;
  const uint8_t* rows[kTileRows];
  for (int64_t t = 0; t < tail; t += kTileRows) {
    const int count = static_cast<int>(std::min<int64_t>(kTileRows, tail - t));
    for (int i = 0; i < count; ++i) rows[i] = w.row[w.tail[t + i]];
    DotRows(
        {.rows = rows, .count = count, .offset = s.row.v_offset, .dim = dim, .dtype = s.row.dtype},
        outputs, group.group_heads, w.dot + t, w.stride);
    if (s.value_bits == 0) continue;
    float decoded[kTileRows * kMaxDim];
    const uint8_t* codes[kTileRows];
    for (int i = 0; i < count; ++i) {
      codes[i] = ValueCodeOf(s, group, w.token[w.tail[t + i]]);
      rows[i] = reinterpret_cast<const uint8_t*>(decoded + i * dim);
    }
    DecodeValues(s, group.index, codes, count, decoded);
    DotRows({.rows = rows, .count = count, .offset = 0, .dim = dim, .dtype = DType::kF32}, outputs,
            group.group_heads, w.code_dot + t, w.stride);
  }
}

TailSums SumTail(const Storage& s, const Group& group, const Draw& draw, int64_t tail, int head,
                 const float* output, const float* dots, float* cos2, float* weights) {
  const Scratch& w = group.scratch;
  const HeadWork& work = w.head[head];
  const float norm2 = Dot(output, output, s.row.dim_v), denominator = WholeDenominator(work);
  const float* logit = w.logit + head * w.stride;
  const float* predicted_e = s.value_bits > 0 ? w.predicted_e + head * w.stride : nullptr;
  float* term = w.scaled + head * w.stride;        // c |a - b o|^2 / D^2, for the rank draws
  float* residual = w.residual + head * w.stride;  // |a - b o|^2 / (pi D^2), for Growth
  TailSums sums;
  if (predicted_e != nullptr) sums.coded = work.mass;
  for (int64_t t = 0; t < tail; ++t) {
    const uint32_t i = w.tail[t];
    TailToken token;
    token.pi = InclusionProbability(group, draw, i);
    // Without value codes the weights in use are e / pi; place t <= i of them is free for the
    // terms.
    token.e = predicted_e == nullptr ? term[i] * token.pi : std::exp(logit[i] - work.shift);
    token.distance2 = std::max(w.value_norm2[i] - 2 * dots[t] + norm2, 0.f);  // NaN stays
    token.error2 = token.e * token.e * token.distance2;
    if (predicted_e != nullptr) {
      // |e (v - o) - e^ (v^ - o)|^2 from dot products.
      const float code_dot = w.code_dot[head * w.stride + t];
      const float code_distance2 = w.code_norm2[i] - 2 * code_dot + norm2;
      const float inner = w.cross[i] - dots[t] - code_dot + norm2;
      token.error2 = std::max(0.f, token.error2 + predicted_e[i] * predicted_e[i] * code_distance2 -
                                       2 * token.e * predicted_e[i] * inner);
      sums.relative += (token.e - predicted_e[i]) * (token.e - predicted_e[i]) / token.pi;
      sums.estimate += predicted_e[i] * predicted_e[i] / token.pi;
    }
    const TailTerm made = MakeTailTerm(token, denominator);
    if (weights != nullptr) weights[t] = TailWeight(token, denominator);
    residual[t] = made.residual;
    term[t] = made.variance;
    sums.variance += made.variance;
    const double square = static_cast<double>(made.variance) * made.variance;
    sums.squares += square;
    sums.own += square * token.pi;
    sums.mass += token.e / token.pi;
    sums.spread += token.e / token.pi * token.distance2;
  }
  *cos2 = -1;
  if (tail > 1 && sums.variance > 0) {
    uint32_t places[kRankDraws];
    double sum = 0;
    int next = 0;
    for (int64_t t = 0; t < tail && next < kRankDraws; ++t) {
      sum += term[t];
      while (next < kRankDraws && (next + .5) / kRankDraws * sums.variance <= sum)
        places[next++] = w.tail[t];
    }
    while (next < kRankDraws) places[next++] = w.tail[tail - 1];
    *cos2 = MeanCos2(s, group, places, head, output);
  }
  return sums;
}

void VerifyHead(const Storage& s, const Promise& promise, const Group& group, const Draw& draw,
                int64_t tail, int look, int head, const float* output, const float* dots) {
  float cos2 = -1;
  const TailSums sums = SumTail(s, group, draw, tail, head, output, dots, &cos2);
  const bool exact = tail == 0 && draw.count == group.middle_end - group.middle_begin;
  JudgeHead(promise, look, sums, cos2, tail, exact, Dot(output, output, s.row.dim_v),
            group.state[head], group.scratch.head[head]);
}

float GrownVariance(const Group& group, const Draw& draw, int64_t tail, int head, float by) {
  const Scratch& w = group.scratch;
  const float* residual = w.residual + head * w.stride;
  float variance = 0;
  for (int64_t t = 0; t < tail; ++t) {
    const float pi = std::min(1.f, by * draw.scale * w.weight[w.tail[t]]);
    variance += residual[t] * (1 - pi) / pi;
  }
  return variance;
}

float Growth(const Promise& promise, const Group& group, const Draw& draw, int64_t tail, int look) {
  const Scratch& w = group.scratch;
  float factor = tail < kLeastTail ? kTailGrowth : kLeastGrowth;
  for (int g = 0; g < group.group_heads; ++g) {
    const float root = GrowthRoot(promise, look, w.head[g]);
    const auto enough = [&](float by) {
      return GrownVariance(group, draw, tail, g, by) <= root * root;
    };
    if (enough(factor)) continue;
    float low = factor, high = kLargestGrowth;
    for (int i = 0; i < kGrowthHalvings; ++i) {
      const float middle = std::sqrt(low * high);
      (enough(middle) ? high : low) = middle;
    }
    factor = high;
  }
  return factor;
}

}  // namespace vattn::cpu
