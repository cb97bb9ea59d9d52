// One answer from the slices of a context (METHOD.md, "Several ranks"). Each rank holds a slice as a
// sequence of its own and describes what it knows of a query head by a record of floats. Records merge:
// the same arithmetic on every rank gives the same output, verdict and decision.
//
// A record is what its rank says of its own slice, with o the attention output over the slice alone:
// the draw's terms c_i |v_i - o'|^2 of the variance are those about the joint output o'. They follow
// for any o' from three sums about o,
//   sum c_i |v_i - o|^2 (kVariance),  b = sum c_i (v_i - o) (the second vector),  sum c_i (kWeight):
//   sum c_i |v_i - o'|^2 = kVariance - 2 (o' - o) . b + |o' - o|^2 kWeight.
#ifndef VATTN_KERNELS_MERGE_H_
#define VATTN_KERNELS_MERGE_H_

#include <cmath>
#include <cstdint>

#include "kernels/params.h"
#include "kernels/sampling.h"

namespace vattn {

constexpr int kPartialVersion = 1;
constexpr int kMostRanks = 64;
constexpr int kGrowths = 12;  // factors at which a record has the variance of a grown draw

// Places in a record; what each holds is beside vattn_partial of api/vattn.h.
enum PartialPlace {
  kPartialIsVersion,
  kPartialRank,
  kPartialRound,
  kPartialFlags,
  kPartialTokens,
  kPartialCount,
  kPartialTail,
  kPartialLse,
  kPartialNorm2,
  kPartialMiddle,
  kPartialLight,
  kPartialLogUnit,
  kPartialVariance,
  kPartialSquares,
  kPartialOwn,
  kPartialMass,
  kPartialSpread,
  kPartialWeight,
  kPartialCos2,
  kPartialPredicted,
  kPartialMemory,
  kPartialLook,
  kPartialGrowth = 24,
  kPartialScalars = 40
};
static_assert(kPartialGrowth + kGrowths <= kPartialScalars);

// Flags of a record, a sum of powers of two.
constexpr int kPartialWhole = 1;    // every token of the slice was read
constexpr int kPartialNothing = 2;  // ... because there was nothing to draw from, or by policy
constexpr int kPartialStuck = 4;    // the rank cannot draw more
constexpr int kPartialUnsure = 8;   // the codes are too coarse, or nothing was drawn

// The floats of a record: scalars, o [dim_v], b [dim_v].
VATTN_HD constexpr int PartialFloats(int dim_v) { return kPartialScalars + 2 * dim_v; }

VATTN_HD inline int FlagsOf(const float* record) { return static_cast<int>(record[kPartialFlags]); }

// The k-th factor of kGrowths, from kLeastGrowth to kLargestGrowth.
VATTN_HD inline float LogGrowthStep() {
  return std::log(kLargestGrowth / kLeastGrowth) / (kGrowths - 1);
}
VATTN_HD inline float GrowthFactor(int k) {
  return kLeastGrowth * std::exp(static_cast<float>(k) * LogGrowthStep());
}

// False if records cannot be merged: of another version, another rank than their place says, or
// another round.
VATTN_HD inline bool Fits(const float* record, int rank, float round) {
  return record[kPartialIsVersion] == kPartialVersion &&
         record[kPartialRank] == static_cast<float>(rank) && record[kPartialRound] == round;
}

// What the records of one head, `stride` floats apart, say of whether they can be merged now: they
// fit each other, and none is still a forecast.
struct RecordsState {
  bool fit = true, forecast = false;
};
VATTN_HD inline RecordsState StateOfRecords(const float* records, int64_t stride, int ranks) {
  RecordsState state;
  for (int r = 0; r < ranks; ++r) {
    const float* at = records + r * stride;
    state.fit = state.fit && Fits(at, r, records[kPartialRound]);
    state.forecast = state.forecast || at[kPartialLook] == 0;
  }
  return state;
}

// ln(exp(a) + exp(b)), for values that may be -inf.
VATTN_HD inline float AddLogs(float a, float b) {
  const float most = Max(a, b), least = Min(a, b);
  return most == -HUGE_VALF ? most : most + std::log1p(std::exp(least - most));
}

// The sum of what the ranks say at a place of their records, `stride` floats apart.
VATTN_HD inline float JointLse(const float* records, int64_t stride, int ranks) {
  float most = -HUGE_VALF;
  for (int r = 0; r < ranks; ++r) most = Max(most, records[r * stride + kPartialLse]);
  float sum = 0;
  for (int r = 0; r < ranks; ++r) sum += std::exp(records[r * stride + kPartialLse] - most);
  return most + std::log(sum);
}
VATTN_HD inline float OthersLse(const float* records, int64_t stride, int ranks, int own) {
  float sum = -HUGE_VALF;
  for (int r = 0; r < ranks; ++r) {
    if (r != own) sum = AddLogs(sum, records[r * stride + kPartialLse]);
  }
  return sum;
}

// Of the variance that is allowed, a slice is given what it has of the mass of the middle without the
// largest token of each block: the largest ones are read for sure where they matter, and one head
// alone has the least variance if slices have parts in proportion to the mass of the others. No slice
// is held to less than this share of its even part.
constexpr float kLeastShare = .02f;

// What rank `own` plans with, from the ranks' forecasts.
VATTN_HD inline Outlook MergeOutlook(const float* records, int64_t stride, int ranks, int own) {
  Outlook all;
  all.unit = JointLse(records, stride, ranks);
  all.denominator = 1;
  float light = 0, mine = 0;
  for (int r = 0; r < ranks; ++r) {
    const float* at = records + r * stride;
    const float weight = std::exp(at[kPartialLse] - all.unit);
    all.mass += weight * at[kPartialMiddle];
    all.norm2 += weight * at[kPartialNorm2];
    all.tokens += at[kPartialTokens];
    light += weight * at[kPartialLight];
    if (r == own) mine = weight * at[kPartialLight];
  }
  const float even = 1 / static_cast<float>(ranks);
  const float share = light > 0 ? mine / light : even;
  all.share = (share + kLeastShare * even) / (1 + kLeastShare);
  return all;
}

// Products of the vectors of a rank's record with d = o' - o.
struct PartialDots {
  float d2 = 0;  // |d|^2
  float db = 0;  // d . b
  float b2 = 0;  // |b|^2
};

// The sums of the joint certificate, in the unit of the joint denominator.
struct JointSums {
  float lse = 0;
  float norm2 = 0;  // mean |v|^2 by attention
  TailSums tail;
  float root = 0;  // sum of the slices' sqrt(Tr S^2), S the covariance of a slice's error
  bool any_cos2 = false;
  float tokens = 0, count = 0, in_tail = 0;
  float predicted = 0;
  float growth[kGrowths] = {};
  bool all_whole = true, all_nothing = true, all_sure = true, stuck = false, unsure = false;
};

// Adds a rank's record. joint.lse is there already.
//
// The covariance of a slice's error about the joint output is that about its own output o, moved by
// d; moved to the mean of its terms it has no part that mixes with d. Of the angles between its
// residuals the record has the mean squared cosine alone, so sqrt(Tr S^2) is bounded by the triangle
// inequality, both ways, and so is the sum over slices.
VATTN_HD inline void AddPartial(const float* at, const PartialDots& dots, JointSums& joint) {
  const int flags = FlagsOf(at);
  const float weight = std::exp(at[kPartialLse] - joint.lse);
  const float unit = std::exp(at[kPartialLogUnit] - joint.lse), unit2 = unit * unit;
  joint.norm2 += weight * at[kPartialNorm2];
  joint.tokens += at[kPartialTokens];
  joint.count += at[kPartialCount];
  joint.in_tail += at[kPartialTail];
  joint.all_whole = joint.all_whole && (flags & kPartialWhole) != 0;
  joint.all_nothing = joint.all_nothing && (flags & kPartialNothing) != 0;
  joint.all_sure = joint.all_sure && at[kPartialTail] == 0 &&
                   ((flags & kPartialWhole) != 0 || at[kPartialCount] == at[kPartialTokens]);
  joint.stuck = joint.stuck || (flags & kPartialStuck) != 0;
  joint.unsure = joint.unsure || (flags & kPartialUnsure) != 0;
  if ((flags & kPartialWhole) != 0) return;
  joint.predicted += at[kPartialPredicted];
  const float c = at[kPartialWeight], own = at[kPartialVariance];
  const float moved = own - 2 * dots.db + dots.d2 * c;
  const float variance = moved < 0 ? 0 : moved;  // NaN stays
  const float grown = own > 0 ? variance / own : 0;
  joint.tail.variance += static_cast<double>(unit2) * variance;
  joint.tail.squares += static_cast<double>(unit2) * unit2 * grown * grown * at[kPartialSquares];
  joint.tail.own += static_cast<double>(unit2) * unit2 * grown * grown * at[kPartialOwn];
  joint.tail.mass += static_cast<double>(weight) * at[kPartialMass];
  joint.tail.spread +=
      static_cast<double>(weight) * (at[kPartialSpread] + at[kPartialMass] * dots.d2);
  for (int k = 0; k < kGrowths; ++k) joint.growth[k] += unit2 * grown * at[kPartialGrowth + k];
  joint.any_cos2 = joint.any_cos2 || at[kPartialCos2] >= 0;
  const float cosine = at[kPartialCos2] < 0 ? 1 : std::sqrt(at[kPartialCos2]);
  float root = own * cosine + 2 * std::sqrt(dots.b2 * dots.d2) + c * dots.d2;
  if (c > 0) {
    const float mean2 = dots.b2 / c;  // c |b / c|^2
    const float centred = std::sqrt(Max(0.f, own * cosine * own * cosine - mean2 * mean2));
    const float far2 = Max(0.f, c * dots.d2 - 2 * dots.db + mean2);
    root = Min(root, centred + far2);
  }
  joint.root += unit2 * Min(root, variance);
}

// The certificate of one head at a look, from the sums over all ranks (JudgeHead). state.cos2 is
// taken from `memory`, which all ranks know.
VATTN_HD inline void JudgeJoint(const Promise& promise, int look, const JointSums& joint,
                                float memory, float output_norm2, HeadState& state,
                                HeadWork& work) {
  const float variance = static_cast<float>(joint.tail.variance);
  const float ratio = variance > 0 ? joint.root / variance : 1;
  state.cos2 = memory;
  work.least_ref =
      promise.norm == Norm::kValue ? promise.norm_floor * std::sqrt(Max(joint.norm2, 0.f)) : 0;
  work.denominator = 1;
  work.unseen = 0;
  work.predicted = joint.predicted;
  JudgeHead(promise, look, joint.tail, joint.any_cos2 ? Min(1.f, ratio * ratio) : -1,
            static_cast<int64_t>(joint.in_tail), joint.all_sure, output_norm2, state, work);
}

// The factor on all inclusion probabilities with which one head is expected to pass at look `look`, as
// Growth of kernels/cpu/verify.h: between two factors of the records by a power law.
VATTN_HD inline float JointGrowth(const Promise& promise, int look, const JointSums& joint,
                                  const HeadWork& work) {
  const float root = GrowthRoot(promise, look, work), target = root * root;
  const float least = joint.in_tail < static_cast<float>(kLeastTail) ? kTailGrowth : kLeastGrowth;
  if (joint.growth[0] <= target) return least;
  int k = 1;
  while (k < kGrowths && !(joint.growth[k] <= target)) ++k;
  if (k == kGrowths) return kLargestGrowth;
  if (!(joint.growth[k] > 0) || !(target > 0)) return Max(least, GrowthFactor(k));
  const float from = std::log(joint.growth[k - 1]), to = std::log(joint.growth[k]);
  const float part = (from - std::log(target)) / Max(from - to, kTiny);
  return Max(least, GrowthFactor(k - 1) * std::exp(Min(1.f, part) * LogGrowthStep()));
}

// What a head's merged answer is called. judged: its bound is within epsilon.
VATTN_HD inline Verdict JointVerdict(const JointSums& joint, bool judged) {
  if (joint.all_nothing) return Verdict::kExact;
  if (joint.all_whole) return Verdict::kDense;
  return judged && !joint.unsure ? Verdict::kVerified : Verdict::kBestEffort;
}

// What is to be done next with a group of heads, the same on every rank.
enum class NextLook : int32_t { kFirst, kGrow, kRedraw, kWhole, kDone };

// The work of a rank on a group from call to call.
struct RankStep {
  int32_t rank = 0, ranks = 1;
  int32_t round = 0;  // calls so far
  int32_t look = 0;   // looks taken
  NextLook next = NextLook::kFirst;
  int32_t flags = 0;   // of the records
  int32_t redraw = 0;  // of Randomness
  int32_t feasible = 1;
  float scale = 1, previous = 0;
  float bound = 0;      // CUDA: candidates are kept up to this scale; CPU: DrawTokens' kept
  int32_t fits = 1;     // CUDA: the records of the call are of one version and round
  int64_t count = 0;    // rows drawn
  int64_t fetched = 0;  // CUDA: of them, not in the hot set
};

// Decides by the heads that are merged. growth: the largest JointGrowth. Changes step.next, and scale,
// previous and redraw with it.
//   all_passed, all_whole: of the group's heads
VATTN_HD inline void DecideLook(const Promise& promise, const JointSums& joint, bool all_passed,
                                float growth, RankStep& step) {
  if (step.next == NextLook::kWhole || all_passed || joint.all_whole) {
    step.next = NextLook::kDone;
    return;
  }
  const bool dense = promise.on_unverified == OnUnverified::kDense;
  const float tail = joint.in_tail;
  const float grown =
      GrownCount(static_cast<int64_t>(joint.count), static_cast<int64_t>(tail), growth);
  if (step.look >= promise.max_looks || joint.stuck || joint.unsure ||
      grown > promise.max_selected_share * joint.tokens) {
    step.next = dense ? NextLook::kWhole : NextLook::kDone;
    return;
  }
  if (growth <= kMostGrowth) {
    step.next = NextLook::kGrow;
    step.previous = step.scale;
    step.scale *= growth;
    return;
  }
  // As in DecodeVerified of kernels/cpu/decode.cc.
  step.next = NextLook::kRedraw;
  ++step.redraw;
  if (step.redraw > 1) step.scale *= kMostGrowth;
  step.previous = 0;
}

}  // namespace vattn

#endif  // VATTN_KERNELS_MERGE_H_
