#include "kernels/cpu/attend.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/rows.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/softmax.h"
#include "kernels/cpu/workers.h"

namespace vattn::cpu {

void ScaleQueries(const Storage& s, Group& group) {
  const uint8_t* q = nullptr;
  const RowList list{.rows = &q, .count = 1, .offset = 0, .dim = s.row.dim_k, .dtype = s.row.dtype};
  for (int g = 0; g < group.group_heads; ++g) {
    q = static_cast<const uint8_t*>(group.q) +
        HeadPlace(group, g) * s.row.dim_k * ElementBytes(s.row.dtype);
    LoadRows(list, group.scratch.query + int64_t{g} * s.row.dim_k);
  }
  for (int64_t i = 0; i < int64_t{group.group_heads} * s.row.dim_k; ++i)
    group.scratch.query[i] *= s.scale;
}

void AttendRows(const Storage& s, const uint8_t* const* rows, int count, int listed,
                const float* queries, int heads, const float* log_weights, float* states,
                bool value_norms) {
  constexpr int kHeads = 8;
  alignas(64) float p[kHeads * kTileRows];
  alignas(64) float norm2[kTileRows];
  const int dim_v = s.row.dim_v;
  // The next tile's rows come in evenly over the work on this one: half with the keys, half with
  // the values.
  const int next = std::min(listed - count, kTileRows);
  RowList keys{.rows = rows,
               .count = count,
               .offset = 0,
               .dim = s.row.dim_k,
               .dtype = s.row.dtype,
               .soon = rows + count,
               .soon_count = next / 2,
               .soon_bytes = s.row.row_bytes};
  RowList values{.rows = rows,
                 .count = count,
                 .offset = s.row.v_offset,
                 .dim = dim_v,
                 .dtype = s.row.dtype,
                 .soon = rows + count + next / 2,
                 .soon_count = next - next / 2,
                 .soon_bytes = s.row.row_bytes};
  if (value_norms) NormRows(values, norm2);
  for (int g = 0; g < heads; g += kHeads) {
    const int n = std::min(kHeads, heads - g);
    DotRows(keys, queries + int64_t{g} * s.row.dim_k, n, p, kTileRows, s.scale);
    keys.soon_count = 0;
    for (int h = 0; h < n; ++h) {
      float* row = p + h * kTileRows;
      if (log_weights != nullptr) {
        for (int i = 0; i < count; ++i) row[i] += log_weights[i];
      }
      const SoftmaxState state(states + (g + h) * StateFloats(dim_v), dim_v);
      const float most = MaxRow(row, count);
      if (most > state.max()) RescaleState(state, dim_v, most);
      state.denominator() += ExpRow(row, count, state.max(), row);
      if (!value_norms) continue;
      float sum2 = 0;
      for (int i = 0; i < count; ++i) sum2 += row[i] * norm2[i];
      state.value_norm2() += sum2;
    }
    AddRows(values, p, kTileRows, n, states + g * StateFloats(dim_v), StateFloats(dim_v));
    values.soon_count = 0;
  }
}

void AttendRange(const Storage& s, const Group& group, int64_t begin, int64_t end,
                 const float* queries, int heads, float* states, Workers* workers,
                 bool value_norms) {
  const int64_t floats = heads * StateFloats(s.row.dim_v);
  const int64_t segments = (end - begin + kSegmentTokens - 1) / kSegmentTokens;
  const auto attend = [&](int64_t from, int64_t to, float* into) {
    const uint8_t* rows[kSegmentTokens];
    const int listed = static_cast<int>(to - from);
    for (int i = 0; i < listed; ++i) rows[i] = RowOf(s, group, from + i);
    for (int i = 0; i < listed; i += kTileRows) {
      AttendRows(s, rows + i, std::min(kTileRows, listed - i), listed - i, queries, heads, nullptr,
                 into, value_norms);
    }
  };
  if (segments <= 1) return attend(begin, end, states);
  ParallelFor(workers, segments, [&](int64_t i) {
    float* into = group.scratch.state + i * floats;
    for (int g = 0; g < heads; ++g) {
      ResetState({into + g * StateFloats(s.row.dim_v), s.row.dim_v}, s.row.dim_v);
    }
    attend(begin + i * kSegmentTokens, std::min(end, begin + (i + 1) * kSegmentTokens), into);
  });
  for (int64_t i = 0; i < segments; ++i) {
    for (int g = 0; g < heads; ++g) {
      const int64_t at = g * StateFloats(s.row.dim_v);
      MergeState({group.scratch.state + i * floats + at, s.row.dim_v}, s.row.dim_v,
                 {states + at, s.row.dim_v});
    }
  }
}

void AttendVisible(const Storage& s, const Group& group, int64_t begin, const int32_t* heads,
                   int num_heads, const float* queries, float* states, Workers* workers,
                   bool value_norms) {
  const int64_t floats = StateFloats(s.row.dim_v), all = VisibleEnd(group, 0);
  AttendRange(s, group, begin, all, queries, num_heads, states, workers, value_norms);
  // What only later query tokens see, token by token.
  for (int i = 0; i < num_heads;) {
    const int64_t end = VisibleEnd(group, heads == nullptr ? i : heads[i]);
    int next = i + 1;
    while (next < num_heads && VisibleEnd(group, heads == nullptr ? next : heads[next]) == end)
      ++next;
    if (end > all) {
      AttendRange(s, group, std::max(begin, all), end, queries + int64_t{i} * s.row.dim_k, next - i,
                  states + i * floats, workers, value_norms);
    }
    i = next;
  }
}

void WriteHead(const Storage& s, const Group& group, int head, const float* output, float lse) {
  const DType dtype = static_cast<DType>(group.out_dtype);
  const int64_t place = HeadPlace(group, head);
  StoreRow(output, s.row.dim_v, dtype,
           static_cast<uint8_t*>(group.out) + place * s.row.dim_v * ElementBytes(dtype));
  if (group.lse != nullptr) group.lse[place] = lse;
}

void SetVerdict(const Group& group, int head, Verdict verdict, float error) {
  const int64_t place = HeadPlace(group, head);
  group.verdict[place] = verdict;
  group.error[place] = error;
}

void FlagNotFinite(const Storage& s, const Group& group) {
  constexpr int kPiece = 256;
  const DType dtype = static_cast<DType>(group.out_dtype);
  for (int g = 0; g < group.group_heads; ++g) {
    const uint8_t* output = static_cast<const uint8_t*>(group.out) +
                            HeadPlace(group, g) * s.row.dim_v * ElementBytes(dtype);
    bool finite = true;
    for (int from = 0; from < s.row.dim_v; from += kPiece) {
      float values[kPiece];
      const int count = std::min(kPiece, s.row.dim_v - from);
      LoadRows({.rows = &output,
                .count = 1,
                .offset = from * ElementBytes(dtype),
                .dim = count,
                .dtype = dtype},
               values);
      finite =
          finite && std::all_of(values, values + count, [](float x) { return std::isfinite(x); });
    }
    if (finite) continue;
    SetVerdict(group, g, Verdict::kBestEffort, std::numeric_limits<float>::infinity());
  }
}

void AttendSelected(const AttendSelectedParams& p, Workers* workers) {
  ParallelFor(workers, p.num_groups, [&](int64_t index) {
    const Storage& s = p.storage;
    Group& group = p.groups[index];
    const int32_t* tokens = p.tokens + index * p.capacity;
    const float* weights = p.log_weights == nullptr ? nullptr : p.log_weights + index * p.capacity;
    float* states = group.scratch.work;
    const int64_t floats = StateFloats(s.row.dim_v);
    ScaleQueries(s, group);
    for (int g = 0; g < group.group_heads; ++g)
      ResetState({states + g * floats, s.row.dim_v}, s.row.dim_v);
    for (int i = 0; i < p.counts[index]; ++i) group.scratch.row[i] = RowOf(s, group, tokens[i]);
    // Of the list, which ascends, a query token sees what comes before its end.
    const int heads = group.group_heads / group.num_tokens;
    for (int g = 0; g < group.group_heads; g += heads) {
      const int count = static_cast<int>(
          std::lower_bound(tokens, tokens + p.counts[index], VisibleEnd(group, g)) - tokens);
      for (int i = 0; i < count; i += kTileRows) {
        AttendRows(s, group.scratch.row + i, std::min(kTileRows, count - i), count - i,
                   group.scratch.query + int64_t{g} * s.row.dim_k, heads,
                   weights == nullptr ? nullptr : weights + i, states + g * floats,
                   /*value_norms=*/false);
      }
    }
    for (int g = 0; g < group.group_heads; ++g) {
      const SoftmaxState state(states + g * floats, s.row.dim_v);
      const float inverse = state.denominator() > 0 ? 1 / state.denominator() : 0;
      for (int j = 0; j < s.row.dim_v; ++j) state.numerator[j] *= inverse;
      WriteHead(s, group, g, state.numerator, std::log(state.denominator()) + state.max());
      SetVerdict(group, g, Verdict::kBestEffort, 0);
    }
    FlagNotFinite(s, group);
  });
}

}  // namespace vattn::cpu
