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

// How each constant was found is in METHOD.md, "Tuned constants".

// The least contribution of a token, as a share of the mean one.
constexpr float kDefensive = .1f;
// The first draw aims at 0.9 epsilon, for the variance that only 1 step in 10 exceeds (rho tracks
// that quantile), because a second look takes as long as the first. A pilot aims at 1.25 epsilon on
// purpose: rows drawn in excess cannot be given back, and missing ones are added by the second look,
// which by then knows the variance.
constexpr float kMargin = .9f, kPilotMargin = 1.25f;
constexpr float kExceeded = .1f, kPilotExceeded = .5f;
constexpr float kRhoStep = .3f;  // how far ln rho moves in a step
// A plan assumes a reference of at most 0.7 of the predicted rms|v|: the true one can be smaller than
// that of the last step.
constexpr float kLikelyRef = .7f;
constexpr int kPlanRounds = 12;  // most rounds of the fixed point on a part of the tiles
// The rounds end when the worst head has |ln(variance / target)| below this.
constexpr float kClose = .3f;
// Added to a variance that may be 0, before it divides or goes into a logarithm; times the mean |v|^2.
constexpr float kTiny = 1e-20f;
constexpr float kLeastUnit = 1e-30f;  // least mean |v|^2 that counts as a unit
// The least that something is divided by or the inverse root is taken of: inverses stay within fp32.
constexpr float kLeastDivisor = 1e-30f;

// 2^f for |f| <= 0.5 is ((kPower4 f + kPower3) f + kPower2) f + kPower1) f + 1, by fused
// multiply-adds, with a relative error below 5e-5: fp16, to which estimates are rounded, has 5e-4.
constexpr float kPower4 = .00961813f, kPower3 = .05550411f, kPower2 = .24022651f,
                kPower1 = .69314718f;
constexpr float kLog2E = 1.44269504f;
// A multiplier moves by this power of variance / target. One head alone would need the power 2,
// because its variance is in proportion to the multiplier's power -1/2; less damps the rounds.
constexpr float kExponent = 1.6f;
// Limits of the factor that takes the plan's probabilities to those of the first draw.
constexpr float kLeastScale = .25f, kMostScale = 16.f;
// Where probabilities would have to grow by more than this between two looks, the rest is drawn anew.
constexpr float kMostGrowth = 4;
constexpr float kLeastEstimate = 0x1p-24f;  // the least fp16 over 0
// The score of an outlier does not count. Its estimate is the largest fp16 below 0, by which draws
// know it.
constexpr float kOutlierScore = -3e38f, kOutlierEstimate = -0x1p-24f;
// weight^2 of a token that is drawn with probability 1: of outliers and of sure tokens.
constexpr float kAlwaysWeight2 = 1e30f;

// Sure tokens (METHOD.md, "Selection"): a token is drawn with probability 1 if it could move the
// answer by kHarmful of what epsilon allows, were its score higher than predicted by
//   kNoiseDeviations + kNoiseQuantiles * Phi^-1(1 - delta / 2)
// standard deviations of the codes' error. On recordings at delta 0.1 this takes 5 % more rows than
// no sure tokens; one deviation more takes 17 % more.
constexpr float kNoiseDeviations = 2.5f, kNoiseQuantiles = 1.4f, kHarmful = .25f;
// The standard deviation of s - s^, in nats, above which all tokens of a segment are sure. The tokens
// that a query looks for lie at the ends of the levels, where errors are larger than their standard
// deviation says: isotropic keys were verified wrongly from 1.8 nats on.
constexpr float kMostNoise = 1.4f;

// Residuals whose angles are measured, drawn in proportion to their terms of V.
constexpr int kRankDraws = 16;
constexpr float kRankMemory = .75f;    // share of cos2 that stays from step to step
constexpr float kTargetMargin = .98f;  // of epsilon: what growth aims at
// A variance is judged by at least this many tokens with pi < 1. With fewer, probabilities grow by
// kTailGrowth.
constexpr int64_t kLeastTail = 8;
constexpr float kTailGrowth = 4;
// Limits of the growth that is sought, and how often the interval between them is halved.
constexpr float kLeastGrowth = 1.05f, kLargestGrowth = 64;
constexpr int kGrowthHalvings = 14;
constexpr float kFirstRho = 1.5f, kLeastRho = .3f, kMostRho = 8;  // start and limits of rho
constexpr float kLeastOthers = 1e-3f;  // least share of the denominator that is not the token's
constexpr float kLeastRef = 1e-15f;    // the squares of smaller values leave fp32
// The most that the mass of value codes may be over the denominator: they cancel, and each term is
// rounded by 1e-7.
constexpr double kMostCancelled = 1e3;
constexpr float kMostUnseen = .5f;  // most of the denominator that codes alone may stand for

// While multipliers are sought, one tile in PlanStride is looked at: at least kLeastPlanStride, and
// so that kPlanTokens tokens and a block are the most.
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

// Mean |v|^2, in which kTiny is measured.
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

// What is known of a head before the draw, from the exact sets and the predicted middle: of the whole
// context, of which a sequence of one rank among several holds a slice (kernels/merge.h).
struct Outlook {
  float unit = 0;         // logarithm of the unit of the next three
  float denominator = 0;  // sum of e, predicted
  float mass = 0;         // of them, of the middle
  float norm2 = 0;        // sum of e |v|^2, with the mean |v|^2 of all tokens in the middle
  float tokens = 0;       // of the middle
  float share = 1;        // of the variance that is allowed, what is allowed to this slice
};
VATTN_HD inline Outlook OutlookOf(const IndexTables& index, float n, const HeadWork& work) {
  return {.unit = work.shift,
          .denominator = work.denominator,
          .mass = work.mass,
          .norm2 = work.fixed_norm2 + work.mass * ValueUnit(index),
          .tokens = n};
}

// rms|v| of this step as far as it is known before the draw, from the exact sets, the predicted mass
// of the middle and the mean |v|^2 of all tokens. What errors are relative to is at most about this.
// It can be far less than in the last step, where a sink without a value has taken the attention
// since.
VATTN_HD inline float PredictedScale(const IndexTables& index, const Outlook& outlook) {
  const float scale = std::sqrt(outlook.norm2 / outlook.denominator);
  return IsFinite(scale) ? scale : std::sqrt(ValueUnit(index));
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

// Target and gains of one head in this step.
VATTN_HD inline void PlanHead(bool value_codes, const Promise& promise, const IndexTables& index,
                              const Outlook& outlook, HeadState& state, HeadWork& work) {
  const float scale = PredictedScale(index, outlook);
  if (state.started == 0) StartHead(promise, index, scale, state);
  state.ref = Min(state.ref, kLikelyRef * Max(promise.norm_floor, 1.f) * scale);
  const float bracket = value_codes
                            ? state.eta2 * state.spread + index.value_residual * (1 + state.eta2)
                            : state.spread;
  const float root =
      (promise.pilot ? kPilotMargin : kMargin) * promise.epsilon * state.ref / state.z;
  work.log_norm = .5f * std::log(bracket) - std::log(outlook.denominator) - outlook.unit;
  work.floor = kDefensive * std::exp(work.log_norm + outlook.unit) * outlook.mass / outlook.tokens;
  work.target = Max(root * root / state.rho * outlook.share, FLT_MIN);
  if (state.started == 0) state.log_multiplier = -std::log(work.target);
  state.started = 1;
}

// The ln e^ from which on a head draws a token with probability 1. noise is the standard deviation of
// s - s^ in the token's segment. Call it after PlanHead.
VATTN_HD inline float SureScore(const Promise& promise, float noise, const HeadState& state,
                                const HeadWork& work) {
  if (noise > kMostNoise) return -HUGE_VALF;
  const float score = std::log(kHarmful * promise.epsilon * state.ref) - work.log_norm -
                      (kNoiseDeviations + kNoiseQuantiles * promise.normal_quantile) * noise;
  return IsFinite(score) ? score : -HUGE_VALF;  // nothing is known: everything is read
}

// A histogram of the blocks of the middle by their largest e^. Bin 0 holds the blocks within
// kTopBinWidth of the largest of all, bin 1 the ones within another width, and so on. Blocks below
// the last bin are left to the sample of tiles.
constexpr int kTopBins = 32;
constexpr float kTopBinWidth = .5f;  // nats
VATTN_HD inline int TopBin(const HeadWork& work, float shift) {
  const float below = (work.shift + work.top - shift) * (1 / kTopBinWidth);
  return below < kTopBins ? static_cast<int>(Max(below, 0.f)) : kTopBins;
}

// Variance of the largest token of each of the `blocks` blocks in bin `bin`, if they were drawn for
// this head alone. A sample of the tiles leaves most of these tokens out: by it a head that looks for
// a few tokens would seem to need none.
VATTN_HD inline float TopVariance(int bin, float blocks, const HeadWork& work,
                                  const HeadState& state) {
  const float below = (static_cast<float>(bin) + (bin == 0 ? 0.f : .5f)) * kTopBinWidth;
  const float weight =
      std::exp(work.log_norm + work.shift + work.top - below + .5f * state.log_multiplier);
  return weight < 1 ? blocks * weight * (1 - weight) * std::exp(-state.log_multiplier) : 0;
}

// One round of the fixed point for one head; returns ln(predicted / target). work.predicted is of the
// sample, `tops` is the sum of TopVariance over the bins. A largest token that is in the sample
// counts twice, which the scale takes back as far as it is a factor on all multipliers.
VATTN_HD inline float MoveMultiplier(float tiny, float tops, const HeadWork& work,
                                     HeadState& state) {
  const float ratio = std::log((work.predicted + tops + tiny) / work.target);
  const float low = -std::log(work.target) - 20;
  const float move = Max(Min(kExponent * ratio, 3.f), -3.f);
  state.log_multiplier = Max(low, state.log_multiplier + move);
  return ratio;
}

// The factor on all inclusion probabilities of a plan. The worst head lacks `worst` = predicted /
// target of its variance, and the plan expects `expected` rows.
VATTN_HD inline float PlanScale(const Promise& promise, float worst, float expected) {
  return Max(Min(worst, kMostScale),
             static_cast<float>(promise.min_selected) / Max(expected, 1e-6f));
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

// The denominator that a term of the variance is relative to: that of the whole context, of which
// `work` may have a slice.
constexpr float kMostDenominator = 1e18f;  // its square stays within fp32
VATTN_HD inline float WholeDenominator(const HeadWork& work) {
  if (work.sliced == 0) return work.denominator;
  return Min(work.denominator + std::exp(work.log_others - work.shift), kMostDenominator);
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

// A token that makes up much of the denominator has drawn the output to itself. Its residual is
// therefore taken to the output without it (jackknife).
VATTN_HD inline TailTerm MakeTailTerm(const TailToken& t, float denominator) {
  const float others = Max(1 - t.e / (t.pi * denominator), kLeastOthers);
  TailTerm term;
  term.residual = t.error2 / (denominator * denominator) / (t.pi * others * others);
  term.variance = term.residual * (1 - t.pi) / t.pi;
  return term;
}

// The variance of a term for each squared unit of v - o, without value codes: c of kernels/merge.h.
VATTN_HD inline float TailWeight(const TailToken& t, float denominator) {
  const float others = Max(1 - t.e / (t.pi * denominator), kLeastOthers);
  const float share = t.e / (t.pi * denominator * others);
  return share * share * (1 - t.pi);
}

// Sums over the tail of one head.
struct TailSums {
  double variance = 0;  // V of METHOD.md, "Certificate"
  double squares = 0;   // sum of its squared terms
  // Sum of pi times the squared terms: an estimate of the middle's sum of (term_i pi_i)^2.
  double own = 0;
  double mass = 0;      // e / pi
  double spread = 0;    // e / pi |v - o|^2
  double relative = 0;  // (e - e^)^2 / pi, with value codes
  double estimate = 0;  // e^^2 / pi, with value codes
  double coded = 0;     // e^ over the whole middle, with value codes
};

// The factor by which the quantile of a look widens because V was estimated from few terms t. few =
// sum t^2 / (sum t)^2 is about the relative variance of V, so that V has 2 / few degrees of freedom.
// The factor is Student's t over the normal quantile z, to second order (Abramowitz and Stegun
// 26.7.5).
VATTN_HD inline float Widening(const Promise& promise, int look, float few) {
  const float z = QuantileAt(promise, look, 1), z2 = z * z, inverse = .5f * few;
  const float t = 1 + inverse * ((z2 + 1) / 4 + inverse * (5 * z2 * z2 + 16 * z2 + 3) / 96);
  return IsFinite(t) ? t : 1;
}

// The certificate of one head at a look: variance, rank, z and bound. Renews what the head's state
// learns from them.
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

// Learns rho and z from the planned draw, after the certificate of the first look. rho follows the
// quantile of variance / predicted that a share kExceeded of the steps exceeds, so that heads whose
// variance is hard to predict get room and the others do without.
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

// The most tokens that are drawn once probabilities grow by `growth`. Of `count` drawn tokens `tail`
// have a probability below 1.
VATTN_HD inline float GrownCount(int64_t count, int64_t tail, float growth) {
  return static_cast<float>(count - tail) + static_cast<float>(tail) * Min(growth, kMostGrowth);
}

// Ends the step of a head. A state that is not finite is forgotten.
VATTN_HD inline void CloseHead(bool sampled, const HeadWork& work, HeadState& state) {
  state.ref = work.ref;
  const float all = state.ref + state.rho + state.z + state.spread + state.log_multiplier +
                    state.eta2 + state.cos2;
  if (!sampled || !IsFinite(all)) state = {};
}

}  // namespace vattn

#endif  // VATTN_KERNELS_SAMPLING_H_
