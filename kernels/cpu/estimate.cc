#include "kernels/cpu/estimate.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/attend.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/scan.h"
#include "kernels/cpu/softmax.h"
#include "kernels/cpu/values.h"
#include "kernels/cpu/workers.h"
#include "kernels/sampling.h"

namespace vattn::cpu {
namespace {

// v^ of `count` <= 64 places of the list into out [count][dim_v], and pointers to its rows.
void DecodeDrawn(const Storage& s, const Group& group, int64_t first, int count, float* out,
                 const uint8_t** rows) {
  const uint8_t* codes[kTileRows];
  for (int i = 0; i < count; ++i) {
    codes[i] = ValueCodeOf(s, group, group.scratch.token[first + i]);
    rows[i] = reinterpret_cast<const uint8_t*>(out + i * s.row.dim_v);
  }
  DecodeValues(s, group.index, codes, count, out);
}

struct Sums {
  float mass = 0;   // of weights
  float norm2 = 0;  // of weights times norms
};

// weight[i] *= by[i]; the sums, in a few lanes at a time.
Sums WeighRow(float* weight, const float* by, const float* norm2, int count) {
  constexpr int kLanes = 8;
  float mass[kLanes] = {}, norm[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) {
      weight[i + k] *= by[i + k];
      mass[k] += weight[i + k];
      norm[k] += weight[i + k] * norm2[i + k];
    }
  }
  Sums sum;
  for (; i < count; ++i) {
    weight[i] *= by[i];
    sum.mass += weight[i];
    sum.norm2 += weight[i] * norm2[i];
  }
  for (int k = 0; k < kLanes; ++k) sum.mass += mass[k], sum.norm2 += norm[k];
  return sum;
}

}  // namespace

void ReadDraw(const Storage& s, const Group& group, const Draw& draw, int64_t from,
              Workers* workers) {
  const Scratch& w = group.scratch;
  const int64_t tiles = (draw.count - from + kTileRows - 1) / kTileRows;
  for (int64_t i = from; i < draw.count; ++i) {
    w.row[i] = RowOf(s, group, w.token[i]);
    if (i - from >= kTileRows) continue;  // later tiles come in with the one before
    for (int b = 0; b < s.row.row_bytes; b += 64) FetchSoon(w.row[i] + b);
  }
  ParallelFor(workers, tiles, [&](int64_t tile) {
    const int64_t first = from + tile * kTileRows;
    const int count = static_cast<int>(std::min<int64_t>(kTileRows, draw.count - first));
    const uint8_t* const* rows = w.row + first;
    DotRows({.rows = rows,
             .count = count,
             .offset = 0,
             .dim = s.row.dim_k,
             .dtype = s.row.dtype,
             .soon = rows + count,
             .soon_count =
                 static_cast<int32_t>(std::min<int64_t>(kTileRows, draw.count - first - count)),
             .soon_bytes = s.row.row_bytes},
            w.query, group.group_heads, w.logit + first, w.stride, s.scale);
    NormRows({.rows = rows,
              .count = count,
              .offset = s.row.v_offset,
              .dim = s.row.dim_v,
              .dtype = s.row.dtype},
             w.value_norm2 + first);
    if (s.value_bits == 0) return;
    float decoded[kTileRows * kMaxDim];
    const uint8_t* codes[kTileRows];
    DecodeDrawn(s, group, first, count, decoded, codes);
    NormRows({.rows = codes, .count = count, .offset = 0, .dim = s.row.dim_v, .dtype = DType::kF32},
             w.code_norm2 + first);
    DotPairs({.rows = rows,
              .count = count,
              .offset = s.row.v_offset,
              .dim = s.row.dim_v,
              .dtype = s.row.dtype},
             decoded, w.cross + first);
  });
}

void RaiseShift(const Group& group, const Draw& draw) {
  const Scratch& w = group.scratch;
  if (draw.count == 0) return;
  for (int g = 0; g < group.group_heads; ++g) {
    HeadWork& head = w.head[g];
    const float most = MaxRow(w.logit + g * w.stride, static_cast<int>(draw.count));
    if (most <= head.shift) continue;
    const float factor = std::exp(head.shift - most);
    head.mass *= factor;
    head.shift = most;
  }
}

void MakeBase(const Storage& s, const Group& group, const float* states, float* base) {
  const Scratch& w = group.scratch;
  const int dim = s.row.dim_v;
  const int64_t floats = StateFloats(dim);
  std::copy_n(states, group.group_heads * floats, base);
  for (int g = 0; g < group.group_heads; ++g) {
    const SoftmaxState state(base + g * floats, dim);
    if (state.denominator() == 0) state.max() = w.head[g].shift;
    RescaleState(state, dim, w.head[g].shift);
    if (s.value_bits > 0) state.denominator() += w.head[g].mass;
  }
  if (s.value_bits == 0) return;
  float factors[2 * kMaxGroup];
  for (int64_t b = 0; b < NumBlocks(group); ++b) {
    const int64_t token = (FirstBlock(group) + b) * kBlockTokens;
    for (int g = 0; g < group.group_heads; ++g) {
      const int64_t at = b * group.group_heads + g;
      factors[2 * g] = std::exp(w.shift[at] - w.head[g].shift);
      factors[2 * g + 1] = w.mass[at];
    }
    const int count = static_cast<int>(std::min<int64_t>(kBlockTokens, group.middle_end - token));
    const uint8_t* codes = reinterpret_cast<const uint8_t*>(
                               s.base + group.blocks[token / kBlockTokens] * s.block.bytes) +
                           s.block.value_codes;
    AddValueCodes(s, group.index, codes, w.estimate + b * group.group_heads * kBlockTokens,
                  kBlockTokens, count, group.group_heads, factors, base, floats);
  }
}

void Estimate(const Storage& s, const Promise& promise, const Group& group, const Draw& draw,
              const float* base, float* outputs) {
  const Scratch& w = group.scratch;
  const int dim = s.row.dim_v, heads = group.group_heads;
  const int64_t floats = StateFloats(dim);
  float* sums = w.work + 2 * heads * floats;
  std::copy_n(base, heads * floats, sums);
  float masses[kMaxGroup];  // of rows alone
  for (int g = 0; g < heads; ++g) w.head[g].unseen = s.value_bits > 0 ? w.head[g].mass : 0;
  float* inverse = w.dot;  // [count] 1 / pi; verification writes there later
  for (int64_t i = 0; i < draw.count; ++i) inverse[i] = 1 / std::min(1.f, draw.scale * w.weight[i]);
  for (int g = 0; g < heads; ++g) {
    const float shift = w.head[g].shift;
    const SoftmaxState state(sums + g * floats, dim);
    const float* logit = w.logit + g * w.stride;
    float* weight = w.scaled + g * w.stride;
    for (int64_t i = 0; i < draw.count; i += kTileRows) {
      ExpRow(logit + i, static_cast<int>(std::min<int64_t>(kTileRows, draw.count - i)), shift,
             weight + i);
    }
    const Sums sum = WeighRow(weight, inverse, w.value_norm2, static_cast<int>(draw.count));
    masses[g] = sum.mass;
    state.denominator() += sum.mass;
    state.value_norm2() += sum.norm2;
  }
  for (int64_t i = 0; i < draw.count; i += kTileRows) {
    const int count = static_cast<int>(std::min<int64_t>(kTileRows, draw.count - i));
    AddRows({.rows = w.row + i,
             .count = count,
             .offset = s.row.v_offset,
             .dim = dim,
             .dtype = s.row.dtype},
            w.scaled + i, w.stride, heads, sums, floats);
  }
  if (s.value_bits > 0) {
    for (int g = 0; g < heads; ++g) {
      for (int64_t i = 0; i < draw.count; ++i) {
        const uint32_t token = w.token[i];
        const int64_t block = token / kBlockTokens - FirstBlock(group);
        const float predicted_e =
            EstimateOf(group, token, g) * std::exp(w.shift[block * heads + g] - w.head[g].shift);
        w.predicted_e[g * w.stride + i] = predicted_e;
        w.scaled[g * w.stride + i] = -predicted_e / std::min(1.f, draw.scale * w.weight[i]);
        w.head[g].unseen += w.scaled[g * w.stride + i];
      }
    }
    float decoded[kTileRows * kMaxDim];
    const uint8_t* rows[kTileRows];
    for (int64_t i = 0; i < draw.count; i += kTileRows) {
      const int count = static_cast<int>(std::min<int64_t>(kTileRows, draw.count - i));
      DecodeDrawn(s, group, i, count, decoded, rows);
      AddRows({.rows = rows, .count = count, .offset = 0, .dim = dim, .dtype = DType::kF32},
              w.scaled + i, w.stride, heads, sums, floats);
    }
  }
  for (int g = 0; g < heads; ++g) {
    HeadWork& head = w.head[g];
    const SoftmaxState state(sums + g * floats, dim);
    if (s.value_bits > 0) state.denominator() += head.unseen - head.mass;
    head.denominator = std::max(state.denominator(), kLeastDivisor);
    for (int j = 0; j < dim; ++j) outputs[g * dim + j] = state.numerator[j] / head.denominator;
    // |v|^2 is summed over rows alone, also with value codes, so it has a denominator of its own.
    const ConstSoftmaxState before(base + g * floats, dim);
    const float mass = before.denominator() - (s.value_bits > 0 ? head.mass : 0) + masses[g];
    head.value_norm2 = std::max(state.value_norm2() / mass, 0.f);
    head.least_ref =
        promise.norm == Norm::kValue ? promise.norm_floor * std::sqrt(head.value_norm2) : 0;
  }
}

}  // namespace vattn::cpu
