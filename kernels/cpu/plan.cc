#include "kernels/cpu/plan.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/scan.h"
#include "kernels/cpu/softmax.h"
#include "kernels/sampling.h"

namespace vattn::cpu {
namespace {

// Predicted variance of every head and expected draws under the multipliers in group.state.
void Predict(const Group& group, Plan& plan, int stride, int phase, Workers* workers) {
  const Scratch& w = group.scratch;
  float variance[kMaxGroup];
  for (int g = 0; g < group.group_heads; ++g) {
    const float half = .5f * group.state[g].log_multiplier;
    w.log_gain[g] = w.head[g].log_norm + half;
    w.floor[g] = w.head[g].floor * std::exp(half);
  }
  plan.expected = PredictVariance(group, plan.inclusion, stride, phase, variance, workers);
  for (int g = 0; g < group.group_heads; ++g) {
    w.head[g].predicted = variance[g] * std::exp(-group.state[g].log_multiplier);
  }
}

// Counts the blocks by their largest e^, to scratch.tops. Call it after SumEstimates.
void CountTops(const Group& group) {
  const Scratch& w = group.scratch;
  std::fill(w.tops, w.tops + group.group_heads * kTopBins, 0.f);
  const float* shift = w.shift;
  for (int64_t b = 0; b < NumBlocks(group); ++b) {
    for (int g = 0; g < group.group_heads; ++g, ++shift) {
      const int bin = TopBin(w.head[g], *shift);
      if (bin < kTopBins) w.tops[g * kTopBins + bin] += 1;
    }
  }
}

// scratch.sure of every segment and head.
void FindSure(const Promise& promise, const Group& group) {
  const Scratch& w = group.scratch;
  for (int k = 0; k < NumSegments(group.num_segments); ++k) {
    for (int g = 0; g < group.group_heads; ++g) {
      const int at = k * group.group_heads + g;
      w.sure[at] = SureScore(promise, w.noise[at], group.state[g], w.head[g]);
    }
  }
}

// The number of tokens that are drawn with probability 1 whatever the multipliers are.
float SureTokens(const Group& group, Workers* workers) {
  const Scratch& w = group.scratch;
  std::fill(w.log_gain, w.log_gain + group.group_heads, -HUGE_VALF);
  std::fill(w.floor, w.floor + group.group_heads, 0.f);
  float variance[kMaxGroup];
  return PredictVariance(group, {.log_gain = w.log_gain, .floor = w.floor, .sure = w.sure}, 1, 0,
                         variance, workers);
}

// Variance of the blocks' largest tokens under the multiplier in group.state.
float PredictTops(const Group& group, int g) {
  const float* tops = group.scratch.tops + g * kTopBins;
  float sum = 0;
  for (int bin = 0; bin < kTopBins; ++bin) {
    if (tops[bin] > 0) sum += TopVariance(bin, tops[bin], group.scratch.head[g], group.state[g]);
  }
  return sum;
}

}  // namespace

void SumEstimates(const Storage& s, const Group& group, const float* states) {
  const Scratch& w = group.scratch;
  const int64_t blocks = NumBlocks(group);
  for (int g = 0; g < group.group_heads; ++g) {
    const ConstSoftmaxState fixed(states + g * StateFloats(s.row.dim_v), s.row.dim_v);
    float top = -std::numeric_limits<float>::infinity();
    for (int64_t b = 0; b < blocks; ++b) top = std::max(top, w.shift[b * group.group_heads + g]);
    const float shift = std::max(top, fixed.max());
    double mass = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * group.group_heads + g;
      mass += static_cast<double>(w.mass[at]) * std::exp(w.shift[at] - shift);
    }
    HeadWork& work = w.head[g];
    work.shift = shift;
    work.mass = static_cast<float>(mass);
    work.top = top - shift;
    const float unit = std::exp(fixed.max() - shift);
    work.denominator = work.mass + fixed.denominator() * unit;
    work.fixed_norm2 = fixed.value_norm2() * unit;
  }
}

Plan MakePlan(const Storage& s, const Promise& promise, const Group& group, Workers* workers,
              const Outlook* outlooks) {
  const Scratch& w = group.scratch;
  const int heads = group.group_heads;
  const float n = static_cast<float>(group.middle_end - group.middle_begin);
  for (int g = 0; g < heads; ++g) {
    const Outlook outlook =
        outlooks != nullptr ? outlooks[g] : OutlookOf(group.index, n, w.head[g]);
    PlanHead(s.value_bits > 0, promise, group.index, outlook, group.state[g], w.head[g]);
  }
  CountTops(group);
  Plan plan{.inclusion = {.log_gain = w.log_gain, .floor = w.floor, .scale = 1}};
  if (w.sure != nullptr) {
    FindSure(promise, group);
    plan.inclusion.sure = w.sure;
  }
  const float tiny = kTiny * ValueUnit(group.index);
  const int stride = PlanStride(group.middle_end - group.middle_begin);
  const int phase = static_cast<int>(group.step % static_cast<uint64_t>(stride));
  for (int round = 0; round < kPlanRounds; ++round) {
    Predict(group, plan, stride, phase, workers);
    float worst = -100;
    for (int g = 0; g < heads; ++g) {
      worst =
          std::max(worst, MoveMultiplier(tiny, PredictTops(group, g), w.head[g], group.state[g]));
    }
    if (std::abs(worst) < kClose) break;
  }
  Predict(group, plan, 1, 0, workers);
  // What is left of the gap is closed for the worst head by one factor on every probability.
  float worst = kLeastScale;
  for (int g = 0; g < heads; ++g) worst = std::max(worst, w.head[g].predicted / w.head[g].target);
  const float scale = PlanScale(promise, worst, plan.expected);
  const float most = promise.max_selected_share * n;
  // A scale below 1 takes nothing off tokens that are sure.
  float sure = 0;
  plan.feasible = plan.expected * (w.sure == nullptr ? scale : std::max(scale, 1.f)) <= most;
  if (!plan.feasible && w.sure != nullptr) {
    sure = SureTokens(group, workers);
    plan.noisy = sure > most;
    if (plan.noisy) plan.inclusion.sure = nullptr;
    Predict(group, plan, 1, 0, workers);  // SureTokens overwrote gains and floors
    plan.feasible = !plan.noisy && sure + (plan.expected - sure) * scale <= most;
  }
  if (!plan.feasible) {
    // Probabilities capped at 1 do not fall with the scale, so it goes down in several steps.
    for (int round = 0; plan.expected > 1.05f * most && round < kPlanRounds; ++round) {
      plan.inclusion.scale *= most / plan.expected;
      Predict(group, plan, 1, 0, workers);
    }
    return plan;
  }
  plan.expected = sure + (plan.expected - sure) * scale;
  plan.inclusion.scale = scale;
  for (int g = 0; g < heads; ++g) w.head[g].predicted /= scale;
  return plan;
}

void Learn(const Promise& promise, const Group& group) {
  for (int g = 0; g < group.group_heads; ++g) {
    LearnHead(promise, group.index, group.scratch.head[g], group.state[g]);
  }
}

}  // namespace vattn::cpu
