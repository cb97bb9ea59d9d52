// Scalar formulas of the plan and of the certificate (METHOD.md, "Selection" and "Certificate"):
// the same on every backend. G = query heads of a group; a head's sums are in the unit
// exp(HeadWork::shift).
#ifndef VATTN_KERNELS_SAMPLING_H_
#define VATTN_KERNELS_SAMPLING_H_

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "kernels/params.h"

namespace vattn {

constexpr float kDefensive = .1f;  // floor of a token's contribution, of the mean
// The plan aims below epsilon by this factor, for a variance that a head exceeds in so many of its
// steps (rho): a second look takes as long as the first. A pilot aims past epsilon: what a first
// draw takes too much cannot be given back, what it lacks a second look adds by the knowledge of
// the first.
constexpr float kMargin = .9f, kPilotMargin = 1.25f;
constexpr float kExceeded = .1f, kPilotExceeded = .5f;
constexpr float kRhoStep = .3f;    // of ln rho
constexpr float kLikelyRef = .7f;  // of the predicted scale: a plan counts on no larger reference
constexpr int kPlanRounds = 12;    // of the fixed point on a part of the tiles, at most
// |ln| of the worst head's variance over its target that ends them
constexpr float kClose = .3f;
constexpr float kTiny = 1e-20f;  // of a variance, in the unit of the values
constexpr float kLeastUnit = 1e-30f;
constexpr float kExponent = 1.6f;  // damping: alone, a multiplier moves variance by its power -1/2
constexpr float kLeastScale = .25f, kMostScale = 16.f;  // of the first draw over the plan
constexpr float kMostGrowth = 4;  // of inclusion probabilities between looks, above it a redraw
constexpr float kLeastEstimate = 0x1p-24f;  // the least fp16 over 0
// A marked token's score does not count, and its estimate is the least one under 0: draws know it
// by that.
constexpr float kOutlierScore = -3e38f, kOutlierEstimate = -0x1p-24f;
constexpr float kAlwaysWeight2 = 1e30f;  // drawn with probability 1, in the first draw

// What was not drawn must not hold much, and codes may undervalue it: a token is drawn with
// probability 1 if it could move the answer by kHarmful of what epsilon allows, were its score
// higher than predicted by kNoiseDeviations and kNoiseQuantiles times the normal quantile of delta,
// in standard deviations of the codes' error. Measured: these take 5 % more rows than none at delta
// 0.1 on recordings; one deviation more takes 17 % more rows.
constexpr float kNoiseDeviations = 2.5f, kNoiseQuantiles = 1.4f, kHarmful = .25f;
// Nats. Above it all tokens of a segment are sure: those that a query looks for lie at the ends of
// the levels, where errors are larger than their standard deviation says. Measured: isotropic keys
// are verified wrongly from 1.8 nats on.
constexpr float kMostNoise = 1.4f;

// Residuals whose angles are measured, drawn by their share of V
constexpr int kRankDraws = 16;
constexpr float kRankMemory = .75f;    // of cos2 from step to step
constexpr float kTargetMargin = .98f;  // growth aims below epsilon by this factor
constexpr int64_t kLeastTail = 8;      // sampled tokens that a variance is judged by
constexpr float kTailGrowth = 4;       // of inclusion probabilities when there are fewer
constexpr float kLeastGrowth = 1.05f, kLargestGrowth = 64;
constexpr int kGrowthHalvings = 14;
constexpr float kFirstRho = 1.5f, kLeastRho = .3f, kMostRho = 8;
constexpr float kLeastOthers = 1e-3f;  // of the denominator
constexpr float kLeastRef = 1e-15f;    // the squares of smaller values leave fp32
// Mass of value codes over the true one, of which rounding is 1e-7
constexpr double kMostCancelled = 1e3;
constexpr float kMostUnseen = .5f;  // of the denominator from codes alone

// One tile in so many is looked at while multipliers are sought: at most so many tokens and a
// block.
constexpr int64_t kPlanTokens = 4096;
constexpr int kLeastPlanStride = 4;
VATTN_HD inline int PlanStride(int64_t middle) {
  int stride = kLeastPlanStride;
  while (middle / stride > kPlanTokens) stride *= 2;
  return stride;
}

// As std::max and std::min, NaN included: a stays where the comparison is false.
template <class T>
VATTN_HD inline T Max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
VATTN_HD inline T Min(T a, T b) {
  return b < a ? b : a;
}

VATTN_HD inline bool IsFinite(float x) { return x - x == 0; }

// Mean |v|^2, the unit of what is too small to count.
VATTN_HD inline float ValueUnit(const IndexTables& index) {
  return IsFinite(index.value_norm2) ? Max(index.value_norm2, kLeastUnit) : 1;
}

// z at an effective rank of 1 / cos2.
VATTN_HD inline float QuantileAt(const Promise& promise, int look, float cos2) {
  const float at = Max(Min(1.f, cos2), 0.f) * kQuantileBins;  // NaN as rank 1
  const int bin = Min(static_cast<int>(at), kQuantileBins - 1);
  const float* z = promise.quantile[look - 1];
  return z[bin] + (at - static_cast<float>(bin)) * (z[bin + 1] - z[bin]);
}

// rms|v| of this step as far as it is known before the draw: exact sets, and of the middle the
// predicted mass and the mean |v|^2 of all tokens. What errors are relative to is at most that, and
// far less than in the last step where a sink without a value has taken the attention since.
VATTN_HD inline float PredictedScale(const IndexTables& index, const HeadWork& work) {
  const float unit = ValueUnit(index);
  const float scale = std::sqrt((work.fixed_norm2 + work.mass * unit) / work.denominator);
  return IsFinite(scale) ? scale : std::sqrt(unit);
}

// A head without a history starts from the value statistics of its index and the scale of this
// step.
VATTN_HD inline void StartHead(const Promise& promise, const IndexTables& index, float scale,
                               HeadState& state) {
  state.eta2 = .2f;
  state.rho = kFirstRho;
  const float unit = ValueUnit(index);
  state.spread = IsFinite(index.value_spread) ? Max(index.value_spread, 1e-12f * unit) : unit;
  state.ref = Max(promise.norm_floor, .25f) * scale;
  state.cos2 = -1;
  state.z = QuantileAt(promise, 1, .25f);
}

// Target and gains of one head in this step, for a middle of n tokens.
VATTN_HD inline void PlanHead(bool value_codes, const Promise& promise, const IndexTables& index,
                              float n, HeadState& state, HeadWork& work) {
  const float scale = PredictedScale(index, work);
  if (state.started == 0) StartHead(promise, index, scale, state);
  state.ref = Min(state.ref, kLikelyRef * Max(promise.norm_floor, 1.f) * scale);
  const float bracket = value_codes
                            ? state.eta2 * state.spread + index.value_residual * (1 + state.eta2)
                            : state.spread;
  const float root =
      (promise.pilot ? kPilotMargin : kMargin) * promise.epsilon * state.ref / state.z;
  work.log_norm = .5f * std::log(bracket) - std::log(work.denominator) - work.shift;
  work.floor = kDefensive * std::exp(work.log_norm + work.shift) * work.mass / n;
  work.target = Max(root * root / state.rho, FLT_MIN);
  if (state.started == 0) state.log_multiplier = -std::log(work.target);
  state.started = 1;
}

// ln e^ from which on a head draws a token with probability 1; noise: standard deviation of s - s^
// of its segment. After PlanHead.
VATTN_HD inline float SureScore(const Promise& promise, float noise, const HeadState& state,
                                const HeadWork& work) {
  if (noise > kMostNoise) return -HUGE_VALF;
  const float score = std::log(kHarmful * promise.epsilon * state.ref) - work.log_norm -
                      (kNoiseDeviations + kNoiseQuantiles * promise.normal_quantile) * noise;
  return IsFinite(score) ? score : -HUGE_VALF;  // nothing is known: everything is read
}

// Blocks of the middle by their largest e^: bin 0 holds those within a width of the largest of all,
// the next one those within another, and so on. What is below the last bin is left to the sample of
// tiles.
constexpr int kTopBins = 32;
constexpr float kTopBinWidth = .5f;  // nats
VATTN_HD inline int TopBin(const HeadWork& work, float shift) {
  const float below = (work.shift + work.top - shift) * (1 / kTopBinWidth);
  return below < kTopBins ? static_cast<int>(Max(below, 0.f)) : kTopBins;
}

// Variance of the largest tokens of the `blocks` blocks in bin `bin`, were they drawn for this head
// alone. A part of the tiles leaves most of them out, and then takes a head that looks for few
// tokens for one that needs none.
VATTN_HD inline float TopVariance(int bin, float blocks, const HeadWork& work,
                                  const HeadState& state) {
  const float below = (static_cast<float>(bin) + (bin == 0 ? 0.f : .5f)) * kTopBinWidth;
  const float weight =
      std::exp(work.log_norm + work.shift + work.top - below + .5f * state.log_multiplier);
  return weight < 1 ? blocks * weight * (1 - weight) * std::exp(-state.log_multiplier) : 0;
}

// One round of the fixed point for one head, after work.predicted, of the sample, and `tops`, the
// sum of TopVariance over the bins; returns ln(predicted / target). Sampled largest tokens count
// twice: an even factor on all multipliers is taken back by the scale.
VATTN_HD inline float MoveMultiplier(float tiny, float tops, const HeadWork& work,
                                     HeadState& state) {
  const float ratio = std::log((work.predicted + tops + tiny) / work.target);
  const float low = -std::log(work.target) - 20;
  const float move = Max(Min(kExponent * ratio, 3.f), -3.f);
  state.log_multiplier = Max(low, state.log_multiplier + move);
  return ratio;
}

// A share of n tokens as a number of them, rounded up.
VATTN_HD inline int64_t ShareOf(float share, int64_t n) {
  return Min(static_cast<int64_t>(std::ceil(share * static_cast<float>(n))), n);
}

// Rows of the base sample of Policy::kTopKUniform, of a middle of n tokens less the best k.
VATTN_HD inline int64_t BaseSample(const Promise& promise, int64_t n, int64_t k) {
  return Min(n - k, Max(int64_t{2}, ShareOf(promise.base_share, n)));
}

// Sums over a uniform sample of the residual (the middle without the head's top-k).
struct SampleMoments {
  double e = 0;         // mean of e
  double e2 = 0;        // mean of e^2
  double ev_norm2 = 0;  // |mean of e v|^2
  double ev2 = 0;       // mean of |e v|^2
};

// Rows to sample so that the target is met with probability 1 - delta (two-sided normal quantile
// z), from the moments of a base sample (METHOD.md, "Policies"): residual tokens n, exact part plus
// n * mean as denominator and numerator norm. Finite population correction, at least `base`, at
// most n (then it is exact).
VATTN_HD inline int64_t SampleBudget(Target target, float epsilon, float z, int64_t n, int64_t base,
                                     const SampleMoments& m, double denominator,
                                     double numerator_norm) {
  const double scale = z * static_cast<double>(n);
  const double root_d = scale * std::sqrt(Max(0.0, m.e2 - m.e * m.e)) / denominator;
  const double root_n =
      scale * std::sqrt(Max(0.0, m.ev2 - m.ev_norm2)) / Max(numerator_norm, 1e-300);
  double root = 0;  // sqrt(b)
  if (target == Target::kDenominator) {
    root = root_d / epsilon;
  } else if (target == Target::kNumerator) {
    root = root_n / epsilon;
  } else {
    // eps1 + eps2 (1 + eps) = eps, and max(root_n / eps1, root_d / eps2) is least where both are
    // equal.
    root = (root_n + root_d * (1.0 + epsilon)) / epsilon;
  }
  const double b = root * root, rows = std::ceil(b / (1.0 + b / static_cast<double>(n)));
  if (!(rows < static_cast<double>(n))) return n;  // also where b is not finite
  return Max(base, static_cast<int64_t>(rows));
}

// One token of the tail for one head.
struct TailToken {
  float e = 0;          // exp(s - shift)
  float pi = 1;         // inclusion probability
  float distance2 = 0;  // |v - o|^2
  float error2 = 0;     // |e (v - o) - e^ (v^ - o)|^2, without value codes e^2 |v - o|^2
};

struct TailTerm {
  float residual = 0;  // error2 / (pi D^2), for growth
  float variance = 0;  // residual (1 - pi) / pi
};

// A token that makes up much of the denominator has drawn the output to itself: its residual is
// that to the output without it (jackknife).
VATTN_HD inline TailTerm MakeTailTerm(const TailToken& t, float denominator) {
  const float others = Max(1 - t.e / (t.pi * denominator), kLeastOthers);
  TailTerm term;
  term.residual = t.error2 / (denominator * denominator) / (t.pi * others * others);
  term.variance = term.residual * (1 - t.pi) / t.pi;
  return term;
}

// Sums over the tail of one head.
struct TailSums {
  double variance = 0;  // V of METHOD.md, "Certificate"
  double squares = 0;   // of its terms
  // Of its terms, times pi: what the middle has for sum of s_i^2, s_i = term_i pi_i
  double own = 0;
  double mass = 0;      // e / pi
  double spread = 0;    // e / pi |v - o|^2
  double relative = 0;  // (e - e^)^2 / pi, with value codes
  double estimate = 0;  // e^^2 / pi, with value codes
  double coded = 0;     // e^ over the whole middle, with value codes
};

// By how much the quantile of a look widens because V was estimated from few terms: few = sum t^2 /
// (sum t)^2 is about the relative variance of V, so V has 2 / few degrees of freedom. Student's t
// over the normal quantile z, to second order (Abramowitz and Stegun 26.7.5).
VATTN_HD inline float Widening(const Promise& promise, int look, float few) {
  const float z = QuantileAt(promise, look, 1), z2 = z * z, inverse = .5f * few;
  const float t = 1 + inverse * ((z2 + 1) / 4 + inverse * (5 * z2 * z2 + 16 * z2 + 3) / 96);
  return IsFinite(t) ? t : 1;
}

// Certificate of one head at a look: variance, rank, z and bound; renews what the state learns from it.
//   cos2: mean squared cosine of drawn residuals, negative if there were no two
//   exact: every middle token was read with probability 1
VATTN_HD inline void JudgeHead(const Promise& promise, int look, const TailSums& sums, float cos2,
                               int64_t tail, bool exact, float output_norm2, HeadState& state,
                               HeadWork& work) {
  work.variance = static_cast<float>(sums.variance);
  if (sums.mass > 0) state.spread = Max(static_cast<float>(sums.spread / sums.mass), FLT_MIN);
  if (sums.estimate > 0) {
    const float eta2 = Max(Min(static_cast<float>(sums.relative / sums.estimate), 4.f), .01f);
    state.eta2 += .2f * (eta2 - state.eta2);
  }
  if (cos2 >= 0)
    state.cos2 = state.cos2 < 0 ? cos2 : kRankMemory * state.cos2 + (1 - kRankMemory) * cos2;
  // Effective rank Tr(S)^2 / Tr(S^2), S = sum over the middle of (1 - pi) / pi r r^T: terms of one
  // token with itself are estimated from the draw, those of two tokens come from the mean squared
  // cosine of draws, smoothed over steps.
  const double square = sums.variance * sums.variance;
  const float same = square > 0 ? static_cast<float>(sums.own / square) : 1;
  work.cos2 = same + (1 - same) * (state.cos2 < 0 ? 1 : state.cos2);
  work.few = square > 0 ? static_cast<float>(sums.squares / square) : 1;
  work.z = Widening(promise, look, work.few) * QuantileAt(promise, look, work.cos2);
  // Either nothing was left to chance, or enough was drawn by chance to judge the rest by; fp32
  // holds the difference of rows and codes; and what codes say alone, of rows that were not drawn,
  // is not the answer. What is not finite never passes.
  const bool cancelled = sums.coded > kMostCancelled * double{work.denominator};
  const bool unseen = std::abs(work.unseen) > kMostUnseen * work.denominator;
  // The estimate is longer than the answer by its own error: E |o'|^2 = |o|^2 + V. NaN stays.
  work.ref = Max(work.least_ref, std::sqrt(Max(output_norm2 - work.variance, 0.f)));
  const bool judged =
      !cancelled && !unseen && (exact || (tail >= kLeastTail && work.ref >= kLeastRef));
  const float bound = exact ? 0 : work.z * std::sqrt(work.variance) / work.ref;
  work.bound = judged && IsFinite(bound + output_norm2) ? bound : HUGE_VALF;
}

// What the planned draw taught: rho and z. After the certificate of the first look. rho follows the
// quantile of the ratio that a share kExceeded of the steps is above: heads whose variance is hard
// to predict get room, others need none.
VATTN_HD inline void LearnHead(const Promise& promise, const IndexTables& index,
                               const HeadWork& work, HeadState& state) {
  const float ratio = work.variance / (work.predicted + kTiny * ValueUnit(index));
  const float move = (ratio > state.rho ? 1.f : 0.f) - (promise.pilot ? kPilotExceeded : kExceeded);
  state.rho = Max(Min(state.rho * std::exp(kRhoStep * move), kMostRho), kLeastRho);
  state.z += .3f * (Widening(promise, 1, work.few) * QuantileAt(promise, 1, work.cos2) - state.z);
}

// Root of the variance that growth aims at for one head at look `look`.
VATTN_HD inline float GrowthRoot(const Promise& promise, int look, const HeadWork& work) {
  const float z = Widening(promise, look, work.few) * QuantileAt(promise, look, work.cos2);
  return kTargetMargin * promise.epsilon * work.ref / z;
}

// Tokens drawn, at most, once probabilities grow: of `count`, `tail` have one below 1.
VATTN_HD inline float GrownCount(int64_t count, int64_t tail, float growth) {
  return static_cast<float>(count - tail) + static_cast<float>(tail) * Min(growth, kMostGrowth);
}

// After a step: what NaN taught is forgotten.
VATTN_HD inline void CloseHead(bool sampled, const HeadWork& work, HeadState& state) {
  state.ref = work.ref;
  const float all = state.ref + state.rho + state.z + state.spread + state.log_multiplier +
                    state.eta2 + state.cos2;
  if (!sampled || !IsFinite(all)) state = {};
}

}  // namespace vattn

#endif  // VATTN_KERNELS_SAMPLING_H_
