#include "kernels/cpu/ranks.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/cpu/attend.h"
#include "kernels/cpu/decode.h"
#include "kernels/cpu/estimate.h"
#include "kernels/cpu/merge.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/scan.h"
#include "kernels/cpu/softmax.h"
#include "kernels/cpu/verify.h"
#include "kernels/cpu/workers.h"
#include "kernels/merge.h"

namespace vattn::cpu {
namespace {

int64_t MiddleOf(const Group& group) { return group.middle_end - group.middle_begin; }

bool Samples(const Promise& promise, const Group& group) {
  return promise.policy == Policy::kVerified && MiddleOf(group) > 0;
}

float* RecordOf(const Storage& s, const Group& group, int head) {
  return group.partial + HeadPlace(group, head) * PartialFloats(s.row.dim_v);
}
const float* GatheredOf(const Storage& s, const Group& group, int head) {
  return group.gathered + HeadPlace(group, head) * PartialFloats(s.row.dim_v);
}

// What every record of a group says alike.
void StampRecords(const Storage& s, const Group& group) {
  const RankStep& step = *group.slice;
  for (int g = 0; g < group.group_heads; ++g) {
    float* at = RecordOf(s, group, g);
    at[kPartialIsVersion] = kPartialVersion;
    at[kPartialRank] = static_cast<float>(step.rank);
    at[kPartialRound] = static_cast<float>(step.round);
    at[kPartialFlags] = static_cast<float>(step.flags);
    at[kPartialLook] = static_cast<float>(step.look);
    at[kPartialTokens] = static_cast<float>(MiddleOf(group));
    at[kPartialMemory] = group.state[g].started == 0 ? -1 : group.state[g].cos2;
  }
}

// The regions of scratch.work, [G] states or outputs each.
struct Regions {
  int64_t floats;
  float *states, *base, *outputs, *other;

  Regions(const Storage& s, const Group& group)
      : floats(group.group_heads * StateFloats(s.row.dim_v)),
        states(group.scratch.work),
        base(states + floats),
        outputs(base + 2 * floats),  // what lies between them is of Estimate
        other(outputs + floats) {}
};

// Mass of the middle without the largest token of each block, in the unit of head.shift.
float LightMass(const Group& group, int head) {
  const Scratch& w = group.scratch;
  float sum = 0;
  for (int64_t b = 0; b < NumBlocks(group); ++b) {
    const int64_t at = b * group.group_heads + head;
    sum += std::max(w.mass[at] - 1, 0.f) * std::exp(w.shift[at] - w.head[head].shift);
  }
  return sum;
}

void ForecastGroup(const Storage& s, const Promise& promise, Group& group, Workers* workers) {
  const Regions regions(s, group);
  const Scratch& w = group.scratch;
  group.selected = 0;
  group.all_read = group.noisy = false;
  group.looks = 0;
  std::fill_n(w.head, group.group_heads, HeadWork{});
  ScaleQueries(s, group);
  AttendFixed(s, group, regions.states, workers);
  if (Samples(promise, group)) {
    PrepareQueries(s, promise.index, group);
    ScanEstimates(s, promise.index, group, workers);
    SumEstimates(s, group, regions.states);
  } else {
    for (int g = 0; g < group.group_heads; ++g) {
      const ConstSoftmaxState fixed(regions.states + g * StateFloats(s.row.dim_v), s.row.dim_v);
      w.head[g].shift = fixed.max();
      w.head[g].denominator = fixed.denominator();
      w.head[g].fixed_norm2 = fixed.value_norm2();
    }
  }
  const float unit = ValueUnit(group.index);
  for (int g = 0; g < group.group_heads; ++g) {
    float* at = RecordOf(s, group, g);
    std::fill_n(at, PartialFloats(s.row.dim_v), 0.f);
    const HeadWork& work = w.head[g];
    at[kPartialLse] = std::log(work.denominator) + work.shift;
    at[kPartialNorm2] = (work.fixed_norm2 + work.mass * unit) / work.denominator;
    at[kPartialMiddle] = work.mass / work.denominator;
    at[kPartialLight] = Samples(promise, group) ? LightMass(group, g) / work.denominator : 0;
  }
  StampRecords(s, group);
}

// Exact records of the listed heads: the slice is read whole.
void ReadWhole(const Storage& s, Group& group, const int32_t* heads, int num_heads,
               Workers* workers) {
  const int dim = s.row.dim_v;
  float* states = group.scratch.work;
  AttendWhole(s, group, heads, num_heads, states, workers, /*value_norms=*/true);
  for (int i = 0; i < num_heads; ++i) {
    const ConstSoftmaxState state(states + i * StateFloats(dim), dim);
    float* at = RecordOf(s, group, heads[i]);
    std::fill_n(at, PartialFloats(dim), 0.f);
    at[kPartialCount] = static_cast<float>(MiddleOf(group));
    at[kPartialLse] = std::log(state.denominator()) + state.max();
    at[kPartialNorm2] = state.value_norm2() / state.denominator();
    std::copy_n(state.numerator, dim, at + kPartialScalars);
  }
  group.slice->flags |= kPartialWhole;
  group.slice->count = MiddleOf(group);
  group.selected = MiddleOf(group);
  group.all_read = true;
}

void ReadWhole(const Storage& s, Group& group, Workers* workers) {
  int32_t heads[kMaxGroup];
  std::iota(heads, heads + group.group_heads, 0);
  ReadWhole(s, group, heads, group.group_heads, workers);
}

// One look: draws what `step` says, estimates, and writes the records.
void Look(const Storage& s, const Promise& promise, Group& group, const Inclusion& inclusion,
          Workers* workers) {
  RankStep& step = *group.slice;
  const Regions regions(s, group);
  const Scratch& w = group.scratch;
  const int dim = s.row.dim_v;
  const Randomness randomness{.refresh = promise.refresh,
                              .redraw = static_cast<uint32_t>(step.redraw),
                              .rank = static_cast<uint32_t>(step.rank)};
  const int64_t from = step.count;
  Draw draw{.scale = inclusion.scale};
  draw.count = DrawTokens(group, inclusion, step.previous, randomness, from, workers, &step.bound);
  ReadDraw(s, group, draw, from, workers);
  RaiseShift(group, draw);
  MakeBase(s, group, regions.states, regions.base);
  Estimate(s, promise, group, draw, regions.base, regions.outputs);
  const int64_t tail = ListTail(group, draw);
  DotTail(s, group, tail, regions.outputs);
  float* moments = regions.other;
  std::fill_n(moments, group.group_heads * dim, 0.f);
  for (int g = 0; g < group.group_heads; ++g) {
    const HeadWork& work = w.head[g];
    const float* output = regions.outputs + g * dim;
    float* dots = w.dot + g * w.stride;
    float* at = RecordOf(s, group, g);
    std::fill_n(at, PartialFloats(dim), 0.f);
    float cos2 = -1;
    const TailSums sums = SumTail(s, group, draw, tail, g, output, dots, &cos2, dots);
    at[kPartialCount] = static_cast<float>(draw.count);
    at[kPartialTail] = static_cast<float>(tail);
    at[kPartialLse] = std::log(work.denominator) + work.shift;
    at[kPartialNorm2] = work.value_norm2;
    at[kPartialLogUnit] = std::log(WholeDenominator(work)) + work.shift;
    at[kPartialVariance] = static_cast<float>(sums.variance);
    at[kPartialSquares] = static_cast<float>(sums.squares);
    at[kPartialOwn] = static_cast<float>(sums.own);
    at[kPartialMass] = static_cast<float>(sums.mass) / work.denominator;
    at[kPartialSpread] = static_cast<float>(sums.spread) / work.denominator;
    at[kPartialCos2] = cos2;
    at[kPartialPredicted] = work.predicted;
    for (int k = 0; k < kGrowths; ++k)
      at[kPartialGrowth + k] = GrownVariance(group, draw, tail, g, GrowthFactor(k));
    std::copy_n(output, dim, at + kPartialScalars);
  }
  // The moments about the slice's own output, from weights in place of the dots.
  const uint8_t* rows[kTileRows];
  for (int64_t t = 0; t < tail; t += kTileRows) {
    const int count = static_cast<int>(std::min<int64_t>(kTileRows, tail - t));
    for (int i = 0; i < count; ++i) rows[i] = w.row[w.tail[t + i]];
    AddRows(
        {.rows = rows, .count = count, .offset = s.row.v_offset, .dim = dim, .dtype = s.row.dtype},
        w.dot + t, w.stride, group.group_heads, moments, dim);
  }
  for (int g = 0; g < group.group_heads; ++g) {
    float* at = RecordOf(s, group, g);
    double weight = 0;
    for (int64_t t = 0; t < tail; ++t) weight += w.dot[g * w.stride + t];
    at[kPartialWeight] = static_cast<float>(weight);
    for (int j = 0; j < dim; ++j) {
      at[kPartialScalars + dim + j] =
          moments[g * dim + j] - at[kPartialWeight] * regions.outputs[g * dim + j];
    }
  }
  step.count = draw.count;
  group.selected = draw.count;
}

Inclusion InclusionOf(const Group& group) {
  const Scratch& w = group.scratch;
  const bool sure = (group.slice->flags & kPartialUnsure) == 0;
  return {.log_gain = w.log_gain,
          .floor = w.floor,
          .sure = sure ? w.sure : nullptr,
          .scale = group.slice->scale};
}

// The first look, from the forecasts of all ranks.
void StartLooks(const Storage& s, const Promise& promise, Group& group, Workers* workers) {
  RankStep& step = *group.slice;
  const Scratch& w = group.scratch;
  step.look = 1;
  if (!Samples(promise, group)) {
    step.flags |= kPartialNothing;
    ReadWhole(s, group, workers);
    return;
  }
  Outlook outlooks[kMaxGroup];
  for (int g = 0; g < group.group_heads; ++g) {
    const float* records = GatheredOf(s, group, g);
    outlooks[g] = MergeOutlook(records, group.gathered_stride, step.ranks, step.rank);
    w.head[g].sliced = 1;
    w.head[g].log_others = OthersLse(records, group.gathered_stride, step.ranks, step.rank);
  }
  const Plan plan = MakePlan(s, promise, group, workers, outlooks);
  group.noisy = plan.noisy;
  if (!plan.feasible && promise.on_unverified == OnUnverified::kDense) {
    ReadWhole(s, group, workers);
    return;
  }
  if (plan.noisy || !std::isfinite(plan.expected)) step.flags |= kPartialUnsure;
  if (!plan.feasible) step.flags |= kPartialStuck;
  step.scale = plan.inclusion.scale;
  Look(s, promise, group, InclusionOf(group), workers);
}

// Judges the looks of all ranks and decides what follows; writes the answers that are there.
void JudgeLooks(const Storage& s, const Promise& promise, Group& group) {
  RankStep& step = *group.slice;
  const Scratch& w = group.scratch;
  float* outputs = Regions(s, group).other;
  const int dim = s.row.dim_v;
  const NextLook before = step.next;
  float lse[kMaxGroup], growth = kLeastGrowth;
  Verdict verdict[kMaxGroup];
  bool passed = true;
  JointSums sums;
  for (int g = 0; g < group.group_heads; ++g) {
    HeadWork& work = w.head[g];
    HeadState& state = group.state[g];
    if (work.settled != 0) continue;
    const float* records = GatheredOf(s, group, g);
    const float norm2 =
        MergeRecords(records, group.gathered_stride, step.ranks, dim, outputs + g * dim, sums);
    if (before != NextLook::kWhole && !sums.all_whole) {
      JudgeJoint(promise, step.look, sums, records[kPartialMemory], norm2, state, work);
      if (step.look == 1) LearnHead(promise, group.index, work, state);
      growth = std::max(growth, JointGrowth(promise, step.look + 1, sums, work));
    }
    work.log_others = OthersLse(records, group.gathered_stride, step.ranks, step.rank);
    lse[g] = sums.lse;
    verdict[g] = JointVerdict(sums, work.bound <= promise.epsilon);
    passed = passed && verdict[g] != Verdict::kBestEffort;
  }
  DecideLook(promise, sums, passed, growth, step);
  const bool ends = step.next == NextLook::kDone;
  if (!ends && step.next != NextLook::kWhole) return;
  for (int g = 0; g < group.group_heads; ++g) {
    HeadWork& work = w.head[g];
    if (before != NextLook::kWhole && !sums.all_whole)
      CloseHead(!sums.unsure, work, group.state[g]);
    if (work.settled != 0 || (!ends && verdict[g] == Verdict::kBestEffort)) continue;
    const bool whole = verdict[g] == Verdict::kExact || verdict[g] == Verdict::kDense;
    WriteHead(s, group, g, outputs + g * dim, lse[g]);
    SetVerdict(group, g, verdict[g],
               whole         ? 0
               : sums.unsure ? std::numeric_limits<float>::infinity()
                             : work.bound);
    work.settled = 1;
  }
  if (ends) FlagNotFinite(s, group);
}

void LookOnGroup(const Storage& s, const Promise& promise, Group& group, Workers* workers) {
  RankStep& step = *group.slice;
  ++step.round;
  if (step.round == 1) {
    StartLooks(s, promise, group, workers);
    StampRecords(s, group);
    group.looks = step.look;
    return;
  }
  if (step.next != NextLook::kDone) JudgeLooks(s, promise, group);
  const bool whole = (step.flags & kPartialWhole) != 0;
  if (step.next == NextLook::kGrow || step.next == NextLook::kRedraw) {
    ++step.look;
    if (!whole && step.next == NextLook::kRedraw) {
      FixDrawn(group, step.count);
      SumEstimates(s, group, Regions(s, group).states);
      step.bound = 0;
    }
    if (!whole) Look(s, promise, group, InclusionOf(group), workers);
  } else if (step.next == NextLook::kWhole && !whole) {
    int32_t heads[kMaxGroup];
    int count = 0;
    for (int g = 0; g < group.group_heads; ++g) {
      if (group.scratch.head[g].settled == 0) heads[count++] = g;
    }
    ReadWhole(s, group, heads, count, workers);
  }
  StampRecords(s, group);
  group.looks = step.look;
}

}  // namespace

void Forecast(const DecodeParams& p, Workers* workers) {
  ParallelFor(workers, p.num_groups,
              [&](int64_t i) { ForecastGroup(p.storage, p.promise, p.groups[i], workers); });
}

void LookOn(const DecodeParams& p, Workers* workers) {
  ParallelFor(workers, p.num_groups,
              [&](int64_t i) { LookOnGroup(p.storage, p.promise, p.groups[i], workers); });
}

}  // namespace vattn::cpu
