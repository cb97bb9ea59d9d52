#include "kernels/cpu/decode.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/cpu/attend.h"
#include "kernels/cpu/estimate.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/scan.h"
#include "kernels/cpu/softmax.h"
#include "kernels/cpu/topk.h"
#include "kernels/cpu/verify.h"
#include "kernels/cpu/workers.h"
#include "kernels/sampling.h"

namespace vattn::cpu {
namespace {

// Scan, units and plan of the first look.
Plan Prepare(const Storage& s, const Promise& promise, Group& group, const float* states,
             Workers* workers) {
  PrepareQueries(s, promise.index, group);
  ScanEstimates(s, promise.index, group, workers);
  SumEstimates(s, group, states);
  return MakePlan(s, promise, group, workers);
}

// Certificates of all heads at this look; true if all pass.
bool Verify(const Storage& s, const Promise& promise, const Group& group, const Draw& draw,
            int64_t tail, int look, const float* outputs) {
  const Scratch& w = group.scratch;
  const int dim = s.row.dim_v;
  DotTail(s, group, tail, outputs);
  bool all = true;
  for (int g = 0; g < group.group_heads; ++g) {
    VerifyHead(s, promise, group, draw, tail, look, g, outputs + g * dim, w.dot + g * w.stride);
    all = all && w.head[g].bound <= promise.epsilon;
  }
  return all;
}

void WriteEstimates(const Storage& s, const Group& group, const float* outputs) {
  for (int g = 0; g < group.group_heads; ++g) {
    const HeadWork& head = group.scratch.head[g];
    WriteHead(s, group, g, outputs + g * s.row.dim_v, std::log(head.denominator) + head.shift);
  }
}

void DecodeVerified(const Storage& s, const Promise& promise, Group& group, Workers* workers) {
  const int64_t floats = group.group_heads * StateFloats(s.row.dim_v);
  float* states = group.scratch.work;
  float* base = states + floats;
  float* outputs = base + 2 * floats;
  const int64_t n = group.middle_end - group.middle_begin;
  // Working memory holds what the call before left there.
  std::fill_n(group.scratch.head, group.group_heads, HeadWork{});
  AttendFixed(s, group, states, workers);
  const Plan plan = Prepare(s, promise, group, states, workers);
  group.noisy = plan.noisy;
  if (plan.noisy && promise.on_unverified == OnUnverified::kDense) {
    DecodeAllDense(s, group, Verdict::kDense, workers);
    group.selected = n;
    group.all_read = true;
    return;
  }
  // With NaN in a head's query or in codes nothing is drawn.
  const bool sampled = std::isfinite(plan.expected);
  Inclusion inclusion = plan.inclusion;
  Randomness randomness{.refresh = promise.refresh};
  Draw draw;
  float previous = 0, kept = 0;
  for (int look = 1; look <= promise.max_looks; ++look) {
    const int64_t from = draw.count;
    draw.count = DrawTokens(group, inclusion, previous, randomness, from, workers, &kept);
    draw.scale = inclusion.scale;
    ReadDraw(s, group, draw, from, workers);
    RaiseShift(group, draw);
    MakeBase(s, group, states, base);
    Estimate(s, promise, group, draw, base, outputs);
    const int64_t tail = ListTail(group, draw);
    const bool passed = Verify(s, promise, group, draw, tail, look, outputs);
    group.looks = look;
    if (look == 1) Learn(promise, group);
    if (passed || look == promise.max_looks || !plan.feasible) break;
    const float growth = Growth(promise, group, draw, tail, look + 1);
    if (GrownCount(draw.count, tail, growth) > promise.max_selected_share * static_cast<float>(n))
      break;
    if (growth <= kMostGrowth) {
      previous = inclusion.scale;
      inclusion.scale *= growth;
    } else {
      // A heavy token that the index took for light was drawn by luck. Its weight 1 / pi would fall
      // if more tokens of its kind were drawn, which costs too much. It is known now: it and the rest
      // of the draw are taken as exact, and the others are drawn anew. Given what is known, the
      // estimate stays unbiased.
      FixDrawn(group, draw.count);
      SumEstimates(s, group, states);
      ++randomness.redraw;
      // It was not the only one: there are many of its kind.
      if (randomness.redraw > 1) inclusion.scale *= kMostGrowth;
      previous = kept = 0;
    }
  }
  for (int g = 0; g < group.group_heads; ++g) {
    CloseHead(sampled, group.scratch.head[g], group.state[g]);
  }
  group.selected = draw.count;
  WriteEstimates(s, group, outputs);
  int32_t failed[kMaxGroup];
  int num_failed = 0;
  for (int g = 0; g < group.group_heads; ++g) {
    const HeadWork& head = group.scratch.head[g];
    const float bound =
        sampled && !plan.noisy ? head.bound : std::numeric_limits<float>::infinity();
    const bool ok = bound <= promise.epsilon;
    SetVerdict(group, g, ok ? Verdict::kVerified : Verdict::kBestEffort, bound);
    if (!ok) failed[num_failed++] = g;
  }
  if (num_failed > 0 && promise.on_unverified == OnUnverified::kDense) {
    DecodeDense(s, group, failed, num_failed, Verdict::kDense, workers);
    group.selected = n;
    group.all_read = true;
  }
}

void DecodeGroup(const Storage& s, const Promise& promise, Group& group, Workers* workers) {
  group.selected = 0;
  group.all_read = group.noisy = false;
  group.looks = 0;
  ScaleQueries(s, group);
  const int64_t n = group.middle_end - group.middle_begin;
  if (n == 0 || promise.policy == Policy::kDense) {
    DecodeAllDense(s, group, Verdict::kExact, workers);
    group.selected = n;
    group.all_read = true;
  } else if (promise.policy == Policy::kVerified) {
    DecodeVerified(s, promise, group, workers);
  } else {
    DecodeTopK(s, promise, group, workers);
  }
  FlagNotFinite(s, group);
}

}  // namespace

void AttendFixed(const Storage& s, const Group& group, float* states, Workers* workers) {
  for (int g = 0; g < group.group_heads; ++g) {
    ResetState({states + g * StateFloats(s.row.dim_v), s.row.dim_v}, s.row.dim_v);
  }
  AttendRange(s, group, 0, group.middle_begin, group.scratch.query, group.group_heads, states,
              workers);
  AttendVisible(s, group, group.middle_end, nullptr, group.group_heads, group.scratch.query, states,
                workers);
}

void AttendWhole(const Storage& s, const Group& group, const int32_t* heads, int num_heads,
                 float* states, Workers* workers, bool value_norms) {
  const int64_t floats = StateFloats(s.row.dim_v);
  float* queries = group.scratch.query;  // the chosen heads' queries move to the front
  for (int i = 0; i < num_heads; ++i) {
    if (heads[i] != i) {
      std::copy_n(queries + int64_t{heads[i]} * s.row.dim_k, s.row.dim_k,
                  queries + int64_t{i} * s.row.dim_k);
    }
    ResetState({states + i * floats, s.row.dim_v}, s.row.dim_v);
  }
  AttendVisible(s, group, 0, heads, num_heads, queries, states, workers, value_norms);
  for (int i = 0; i < num_heads; ++i) {
    const SoftmaxState state(states + i * floats, s.row.dim_v);
    for (int j = 0; j < s.row.dim_v; ++j) state.numerator[j] /= state.denominator();
  }
}

void DecodeDense(const Storage& s, const Group& group, const int32_t* heads, int num_heads,
                 Verdict verdict, Workers* workers) {
  const int64_t floats = StateFloats(s.row.dim_v);
  float* states = group.scratch.work;
  AttendWhole(s, group, heads, num_heads, states, workers, /*value_norms=*/false);
  for (int i = 0; i < num_heads; ++i) {
    const SoftmaxState state(states + i * floats, s.row.dim_v);
    WriteHead(s, group, heads[i], state.numerator, std::log(state.denominator()) + state.max());
    SetVerdict(group, heads[i], verdict, 0);
  }
}

void DecodeAllDense(const Storage& s, Group& group, Verdict verdict, Workers* workers) {
  int32_t heads[kMaxGroup];
  std::iota(heads, heads + group.group_heads, 0);
  DecodeDense(s, group, heads, group.group_heads, verdict, workers);
}

void Decode(const DecodeParams& p, Workers* workers) {
  ParallelFor(workers, p.num_groups,
              [&](int64_t i) { DecodeGroup(p.storage, p.promise, p.groups[i], workers); });
}

void Select(const SelectParams& p, Workers* workers) {
  ParallelFor(workers, p.num_groups, [&](int64_t i) {
    const Storage& s = p.storage;
    Group& group = p.groups[i];
    group.selected = 0;
    if (group.middle_end == group.middle_begin) return;
    ScaleQueries(s, group);
    AttendFixed(s, group, group.scratch.work, workers);
    const Plan plan = Prepare(s, p.promise, group, group.scratch.work, workers);
    group.selected =
        DrawTokens(group, plan.inclusion, 0, {.refresh = p.promise.refresh}, 0, workers);
    for (int64_t t = 0; t < group.selected; ++t) {
      group.scratch.weight[t] = std::min(1.f, plan.inclusion.scale * group.scratch.weight[t]);
    }
  });
}

}  // namespace vattn::cpu
