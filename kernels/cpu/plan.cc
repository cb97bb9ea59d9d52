#include "kernels/cpu/plan.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/scan.h"
#include "kernels/cpu/softmax.h"
#include "kernels/cpu/verify.h"

namespace vattn::cpu {
namespace {

constexpr float kDefensive = .1f;  // floor of a token's contribution, of the mean
constexpr float kMargin = .9f;     // the plan aims below epsilon by this factor
constexpr int kRounds = 12;        // of the fixed point on a part of the tiles, at most
constexpr int kLeastRounds = 3;
constexpr float kClose = .05f;     // |ln| of the worst head's variance over its target that ends them
constexpr int kRoundStride = 4;    // that part: one tile in so many
constexpr float kTiny = 1e-20f;    // of a variance, in the unit of the values
constexpr float kLeastUnit = 1e-30f;
constexpr float kExponent = 1.6f;  // damping: alone, a multiplier moves variance by its power -1/2

// Mean |v|^2, the unit of what is too small to count.
float ValueUnit(const IndexTables& index) {
  return std::isfinite(index.value_norm2) ? std::max(index.value_norm2, kLeastUnit) : 1;
}

// A head without a history starts from the value statistics of its index.
void StartHead(const Promise& promise, const IndexTables& index, HeadState& state) {
  state.eta2 = .2f;
  state.rho = 1;
  const float unit = ValueUnit(index);
  state.spread = std::isfinite(index.value_spread) ? std::max(index.value_spread, 1e-12f * unit) : unit;
  state.ref = std::max(promise.norm_floor, .25f) * std::sqrt(unit);
  state.cos2 = -1;
  state.z = QuantileAt(promise, 1, .25f);
}

// Predicted variance of every head and expected draws under the multipliers in group.state.
void Predict(const Group& group, Plan& plan, int stride, int phase, Stream stream) {
  const Scratch& w = group.scratch;
  float variance[kMaxGroup];
  for (int g = 0; g < group.q_heads; ++g) {
    const float half = .5f * group.state[g].log_multiplier;
    w.log_gain[g] = w.head[g].log_norm + half;
    w.floor[g] = w.head[g].floor * std::exp(half);
  }
  plan.expected = PredictVariance(group, plan.inclusion, stride, phase, variance, stream);
  for (int g = 0; g < group.q_heads; ++g) {
    w.head[g].predicted = variance[g] * std::exp(-group.state[g].log_multiplier);
  }
}

}  // namespace

void SumEstimates(const Storage& s, const Group& group, const float* states) {
  const Scratch& w = group.scratch;
  const int64_t blocks = NumBlocks(group);
  for (int g = 0; g < group.q_heads; ++g) {
    const SoftmaxState fixed(const_cast<float*>(states) + g * StateFloats(s.row.dim_v), s.row.dim_v);
    float shift = fixed.max();
    for (int64_t b = 0; b < blocks; ++b) shift = std::max(shift, w.shift[b * group.q_heads + g]);
    double mass = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = b * group.q_heads + g;
      mass += static_cast<double>(w.mass[at]) * std::exp(w.shift[at] - shift);
    }
    HeadWork& work = w.head[g];
    work.shift = shift;
    work.mass = static_cast<float>(mass);
    work.denominator = work.mass + fixed.denominator() * std::exp(fixed.max() - shift);
  }
}

Plan MakePlan(const Storage& s, const Promise& promise, const Group& group, Stream stream) {
  const Scratch& w = group.scratch;
  const int heads = group.q_heads;
  const float n = static_cast<float>(group.middle_end - group.middle_begin);
  for (int g = 0; g < heads; ++g) {
    HeadState& state = group.state[g];
    HeadWork& work = w.head[g];
    if (state.started == 0) StartHead(promise, group.index, state);
    const float bracket = s.value_bits == 0
                              ? state.spread
                              : state.eta2 * state.spread + group.index.value_residual * (1 + state.eta2);
    const float root = kMargin * promise.epsilon * state.ref / state.z;
    work.log_norm = .5f * std::log(bracket) - std::log(work.denominator) - work.shift;
    work.floor = kDefensive * std::exp(work.log_norm + work.shift) * work.mass / n;
    work.target = std::max(root * root / state.rho, std::numeric_limits<float>::min());
    if (state.started == 0) state.log_multiplier = -std::log(work.target);
    state.started = 1;
  }
  Plan plan{.inclusion = {.log_gain = w.log_gain, .floor = w.floor, .scale = 1}};
  const float tiny = kTiny * ValueUnit(group.index);
  const int phase = static_cast<int>(group.step % kRoundStride);
  for (int round = 0; round < kRounds; ++round) {
    Predict(group, plan, kRoundStride, phase, stream);
    float worst = -100;
    for (int g = 0; g < heads; ++g) {
      HeadState& state = group.state[g];
      const HeadWork& work = w.head[g];
      const float ratio = std::log((work.predicted + tiny) / work.target);
      worst = std::max(worst, ratio);
      const float low = -std::log(work.target) - 20;
      state.log_multiplier = std::max(low, state.log_multiplier + std::clamp(kExponent * ratio, -3.f, 3.f));
    }
    if (round >= kLeastRounds && std::abs(worst) < kClose) break;
  }
  Predict(group, plan, 1, 0, stream);
  // What is left of the gap is closed for the worst head by one factor on every probability.
  float scale = .25f;
  for (int g = 0; g < heads; ++g) scale = std::max(scale, w.head[g].predicted / w.head[g].target);
  scale = std::min(scale, 16.f);
  scale = std::max(scale, static_cast<float>(promise.min_selected) / std::max(plan.expected, 1e-6f));
  const float most = promise.max_selected_share * n;
  plan.feasible = plan.expected * scale <= most;
  if (!plan.feasible) {
    // Probabilities capped at 1 do not fall with the scale, so it goes down in several steps.
    int round = 0;
    do {
      plan.inclusion.scale *= most / plan.expected;
      Predict(group, plan, 1, 0, stream);
    } while (plan.expected > 1.05f * most && ++round < kRounds);
    return plan;
  }
  plan.expected *= scale;
  plan.inclusion.scale = scale;
  for (int g = 0; g < heads; ++g) w.head[g].predicted /= scale;
  return plan;
}

void Learn(const Promise& promise, const Group& group) {
  for (int g = 0; g < group.q_heads; ++g) {
    HeadState& state = group.state[g];
    const HeadWork& work = group.scratch.head[g];
    const float ratio = work.variance / (work.predicted + kTiny * ValueUnit(group.index));
    state.rho += .1f * (std::clamp(ratio, .7f, 5.f) - state.rho);
    state.z += .3f * (QuantileAt(promise, 1, work.cos2) - state.z);
  }
}

}  // namespace vattn::cpu
