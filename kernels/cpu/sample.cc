#include "kernels/cpu/sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "kernels/cpu/scan.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/softmax.h"
#include "kernels/cpu/workers.h"
#include "kernels/sampling.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sample.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace vattn::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
using DU = hn::RebindToUnsigned<D>;
using V = hn::Vec<D>;
using VU = hn::Vec<DU>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));

HWY_INLINE V LoadHalf(const uint16_t* at) {
  const D d;
  const hn::Rebind<hwy::float16_t, D> half;
  return hn::PromoteTo(d, hn::LoadU(half, reinterpret_cast<const hwy::float16_t*>(at)));
}

// 1 / sqrt(x) to fp32 precision up to a few ULP.
HWY_INLINE V InverseSqrt(V x) {
  const D d;
  const V r = hn::ApproximateReciprocalSqrt(x);
  const V half = hn::Mul(hn::Mul(x, r), hn::Mul(r, hn::Set(d, .5f)));
  return hn::Mul(r, hn::Sub(hn::Set(d, 1.5f), half));
}

// Returns weight^2 of the tokens from `estimate` on, the sum over n heads of (gain e + floor)^2, and
// writes their e [n]. A token outside the middle, or taken as exact, has e = 0 for every head: its
// weight is 0, and it is never drawn. An outlier has e < 0, a sure token e >= `sure` of some head: both
// are always drawn.
HWY_INLINE V SquaredWeight(const uint16_t* estimate, const BlockWeights& by, int n, V* e) {
  const D d;
  const V always = hn::Set(d, kAlwaysWeight2), zero = hn::Zero(d);
  V weight2 = zero;
  for (int g = 0; g < n; ++g) {
    e[g] = LoadHalf(estimate + g * kBlockTokens);
    const V x = hn::MulAdd(e[g], hn::Set(d, by.gain[g]), hn::Set(d, by.floor[g]));
    weight2 = hn::MulAdd(x, x, weight2);
    weight2 = hn::IfThenElse(hn::Ge(e[g], hn::Set(d, by.sure[g])), always, weight2);
  }
  weight2 = hn::IfThenElseZero(hn::Gt(e[0], zero), weight2);
  return hn::IfThenElse(hn::Lt(e[0], zero), always, weight2);
}

// Sums over `blocks` blocks: sums [G] of (gain e)^2 (1 / pi - 1) for each head, and behind them the
// expected draws. It looks at the tiles phase, phase + stride, ... of the first block, phase + 1, ...
// of the next, and so on. `by` is of the first block; gain and sure of the next ones lie behind it.
template <int kHeads>
void PredictBlocks(const uint16_t* estimate, BlockWeights by, int heads, int blocks, float scale,
                   int stride, int phase, float* sums) {
  const D d;
  const int n = kHeads > 0 ? kHeads : heads;
  const V one = hn::Set(d, 1.f);
  V expected = hn::Zero(d);
  constexpr int kHeld = kHeads > 0 ? kHeads : kMaxGroup;
  V variance[kHeld];
  for (int g = 0; g < n; ++g) variance[g] = hn::Zero(d);
  const V inverse_scale = hn::Set(d, 1.f / scale);
  for (int b = 0; b < blocks; ++b, estimate += n * kBlockTokens, by.gain += n, by.sure += n,
           phase = (phase + 1) % stride) {
    V part[kHeld];
    for (int g = 0; g < n; ++g) part[g] = hn::Zero(d);
    for (int tile = phase; tile < kBlockTokens / kTileTokens; tile += stride) {
      for (int i = tile * kTileTokens; i < (tile + 1) * kTileTokens; i += kLanes) {
        V e[kHeld];
        const V weight2 = SquaredWeight(estimate + i, by, n, e);
        const V safe = hn::Max(weight2, hn::Set(d, kLeastDivisor));
        const V inverse = InverseSqrt(safe);
        const V pi = hn::Min(one, hn::Mul(hn::Mul(weight2, inverse), hn::Set(d, scale)));
        expected = hn::Add(expected, pi);
        const V excess = hn::Max(hn::Sub(hn::Mul(inverse, inverse_scale), one), hn::Zero(d));
        for (int g = 0; g < n; ++g) part[g] = hn::MulAdd(hn::Mul(e[g], e[g]), excess, part[g]);
      }
    }
    for (int g = 0; g < n; ++g) {
      const V gain = hn::Set(d, by.gain[g]);
      variance[g] = hn::MulAdd(hn::Mul(part[g], gain), gain, variance[g]);
    }
  }
  for (int g = 0; g < n; ++g) sums[g] = hn::GetLane(hn::SumOfLanes(d, variance[g]));
  sums[n] = hn::GetLane(hn::SumOfLanes(d, expected));
}

void PredictDispatch(const uint16_t* estimate, const BlockWeights& by, int heads, int blocks,
                     float scale, int stride, int phase, float* sums) {
  switch (heads) {
    case 1:
      return PredictBlocks<1>(estimate, by, heads, blocks, scale, stride, phase, sums);
    case 2:
      return PredictBlocks<2>(estimate, by, heads, blocks, scale, stride, phase, sums);
    case 3:
      return PredictBlocks<3>(estimate, by, heads, blocks, scale, stride, phase, sums);
    case 4:
      return PredictBlocks<4>(estimate, by, heads, blocks, scale, stride, phase, sums);
    case 6:
      return PredictBlocks<6>(estimate, by, heads, blocks, scale, stride, phase, sums);
    case 8:
      return PredictBlocks<8>(estimate, by, heads, blocks, scale, stride, phase, sums);
    default:
      return PredictBlocks<0>(estimate, by, heads, blocks, scale, stride, phase, sums);
  }
}

// TokenUniform of `count` tokens, a multiple of 64, whose counters start at `counter`. Even and odd
// counters are kept apart, each in the low half of a 64-bit lane: products then need no sorting, and
// the high halves are never used.
void Uniform(const RandomKey& key, uint32_t use, uint32_t counter, uint32_t epoch,
             uint32_t step_phase, uint32_t refresh, int count, float* u) {
  const D d;
  const DU du;
  const hn::RebindToSigned<D> di;
  const hn::RepartitionToWide<DU> wide;
  const auto upper = [&](auto x) HWY_ATTR { return hn::BitCast(du, hn::ShiftRight<32>(x)); };
  const VU m0 = hn::Set(du, kPhiloxM0), m1 = hn::Set(du, kPhiloxM1);
  constexpr int kRounds = 10;
  uint32_t k0[kRounds], k1[kRounds];
  for (int round = 0; round < kRounds; ++round) {
    k0[round] = key.key0 + static_cast<uint32_t>(round) * kPhiloxW0;
    k1[round] = key.key1 + static_cast<uint32_t>(round) * kPhiloxW1;
  }
  for (int at = 0; at < count / 4; at += kLanes) {
    VU c0[2], c1[2], c2[2], c3[2];
    const VU counters = hn::Add(hn::Set(du, counter + static_cast<uint32_t>(at)), hn::Iota(du, 0));
    for (int k = 0; k < 2; ++k) {
      c0[k] = k == 0 ? counters : upper(hn::BitCast(wide, counters));
      const VU mixed = hn::BitCast(du, hn::MulEven(c0[k], hn::Set(du, 0x9E3779B1u)));
      const VU phase = upper(hn::MulEven(mixed, hn::Set(du, refresh)));
      const VU late = hn::VecFromMask(
          du, hn::Not(hn::Lt(hn::Add(phase, hn::Set(du, step_phase)), hn::Set(du, refresh))));
      c1[k] = hn::Sub(hn::Set(du, epoch), late);  // a set mask is -1
      c2[k] = hn::Set(du, key.stream);
      c3[k] = hn::Set(du, use);
    }
    for (int round = 0; round < kRounds; ++round) {
      const VU by0 = hn::Set(du, k0[round]), by1 = hn::Set(du, k1[round]);
      for (int k = 0; k < 2; ++k) {
        const auto p0 = hn::MulEven(c0[k], m0), p1 = hn::MulEven(c2[k], m1);
        c0[k] = hn::Xor3(upper(p1), c1[k], by0);
        c2[k] = hn::Xor3(upper(p0), c3[k], by1);
        c1[k] = hn::BitCast(du, p1);
        c3[k] = hn::BitCast(du, p0);
      }
    }
    const VU* words[4] = {c0, c1, c2, c3};
    for (int w = 0; w < 4; ++w) {
      const VU odd = hn::BitCast(du, hn::ShiftLeft<32>(hn::BitCast(wide, words[w][1])));
      const VU word = hn::OddEven(odd, words[w][0]);
      const V x = hn::ConvertTo(d, hn::BitCast(di, hn::ShiftRight<9>(word)));
      float* to = u + at / 16 * 64 + 16 * w + at % 16;
      hn::StoreU(hn::Mul(hn::Add(x, hn::Set(d, .5f)), hn::Set(d, 0x1p-23f)), d, to);
    }
  }
}

// Appends lanes `in` of tokens and their weights at place `count`. Compresses in a register, then
// plain stores: some processors compress to memory very slowly.
HWY_INLINE void AppendDrawn(hn::Mask<D> in, VU token, V weight, int count, uint32_t* tokens,
                            float* weights) {
  const D d;
  const DU du;
  hn::StoreU(hn::Compress(weight, in), d, weights + count);
  hn::StoreU(hn::Compress(token, hn::RebindMask(du, in)), du, tokens + count);
}

// Lists the tokens of one block with low * weight <= u < scale * weight: tokens, weights and, unless
// null, their u in kept. Returns their number.
template <int kHeads>
int DrawBlock(const uint16_t* estimate, const BlockWeights& by, int heads, float low, float scale,
              const float* u, uint32_t first, uint32_t* tokens, float* weights, float* kept) {
  const D d;
  const DU du;
  const int n = kHeads > 0 ? kHeads : heads;
  constexpr int kHeld = kHeads > 0 ? kHeads : kMaxGroup;
  // Most vectors have no token to draw, which squares show; the margin is that of their rounding.
  const V most = hn::Set(d, 1.00001f * scale * scale);
  int count = 0;
  for (int i = 0; i < kBlockTokens; i += kLanes) {
    V e[kHeld];
    const V weight2 = SquaredWeight(estimate + i, by, n, e);
    const V draw = hn::LoadU(d, u + i);
    if (hn::AllFalse(d, hn::Lt(hn::Mul(draw, draw), hn::Mul(weight2, most)))) continue;
    const V weight = hn::Sqrt(weight2);
    const auto in = hn::And(hn::Lt(draw, hn::Mul(weight, hn::Set(d, scale))),
                            hn::Ge(draw, hn::Mul(weight, hn::Set(d, low))));
    if (hn::AllFalse(d, in)) continue;
    const VU token = hn::Add(hn::Set(du, first + static_cast<uint32_t>(i)), hn::Iota(du, 0));
    AppendDrawn(in, token, weight, count, tokens, weights);
    if (kept != nullptr) hn::StoreU(hn::Compress(draw, in), d, kept + count);
    count += static_cast<int>(hn::CountTrue(d, in));
  }
  return count;
}

int DrawDispatch(const uint16_t* estimate, const BlockWeights& by, int heads, float low,
                 float scale, const float* u, uint32_t first, uint32_t* tokens, float* weights,
                 float* kept) {
  const auto draw = [&](auto n) {
    return DrawBlock<decltype(n)::value>(estimate, by, heads, low, scale, u, first, tokens, weights,
                                         kept);
  };
  switch (heads) {
    case 4:
      return draw(std::integral_constant<int, 4>());
    case 6:
      return draw(std::integral_constant<int, 6>());
    case 8:
      return draw(std::integral_constant<int, 8>());
    default:
      return draw(std::integral_constant<int, 0>());
  }
}

// Lists the tokens with low * weight <= u < scale * weight among `count` kept ones: tokens and weights.
// Returns their number.
int FilterKept(const uint32_t* kept_token, const float* kept_weight, const float* kept_u, int count,
               float low, float scale, uint32_t* tokens, float* weights) {
  const D d;
  const DU du;
  int drawn = 0;
  for (int i = 0; i < count; i += kLanes) {
    const V weight = hn::LoadU(d, kept_weight + i), u = hn::LoadU(d, kept_u + i);
    auto in = hn::And(hn::Lt(u, hn::Mul(weight, hn::Set(d, scale))),
                      hn::Ge(u, hn::Mul(weight, hn::Set(d, low))));
    in = hn::And(in, hn::FirstN(d, static_cast<size_t>(count - i)));
    AppendDrawn(in, hn::LoadU(du, kept_token + i), weight, drawn, tokens, weights);
    drawn += static_cast<int>(hn::CountTrue(d, in));
  }
  return drawn;
}

}  // namespace vattn::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vattn::cpu {

HWY_EXPORT(PredictDispatch);
HWY_EXPORT(Uniform);
HWY_EXPORT(DrawDispatch);
HWY_EXPORT(FilterKept);

namespace {

// The places that a segment has in the sparse arrays; the last segment may have fewer. A draw that
// keeps candidates writes their u to the second half of the weights' places, Half(blocks) places on.
constexpr int kSegmentPlaces = kSegmentBlocks * kBlockTokens + kDrawSlack;
constexpr int Half(int64_t blocks) {
  return static_cast<int>(blocks * kBlockTokens + kDrawSlack) / 2;
}
constexpr int kKeepBlocks = 4;  // segments with fewer blocks keep no candidates: too little room
// Candidates are what a draw with kKeep times the probabilities would find.
constexpr float kKeep = 2;

constexpr int kGainSlack = 16;  // ExpRow works on whole vectors

// Weights of up to kSegmentBlocks blocks from number `block` of the scan on: [blocks][G].
struct Weights {
  float gain[kSegmentBlocks * kMaxGroup + kGainSlack],
      sure[kSegmentBlocks * kMaxGroup + kGainSlack];
  const float* floor;

  Weights(const Group& group, const Inclusion& inclusion, int64_t block, int blocks)
      : floor(inclusion.floor) {
    const float* shift = group.scratch.shift + block * group.group_heads;
    const int count = blocks * group.group_heads;
    for (int b = 0, at = 0; b < blocks; ++b) {
      const int k = SegmentOf(group.segments, group.num_segments, FirstBlock(group) + block + b);
      const float* least =
          inclusion.sure == nullptr ? nullptr : inclusion.sure + int64_t{k} * group.group_heads;
      for (int g = 0; g < group.group_heads; ++g, ++at) {
        gain[at] = inclusion.log_gain[g] + shift[at];
        // e^1 is over every estimate.
        sure[at] = least == nullptr ? 1 : std::min(1.f, least[g] - shift[at]);
      }
    }
    ExpRow(gain, count, 0, gain);
    ExpRow(sure, count, 0, sure);
  }
  BlockWeights At(int64_t block, int heads) const {
    return {gain + block * heads, sure + block * heads, floor};
  }
};

}  // namespace

float PredictVariance(const Group& group, const Inclusion& inclusion, int stride, int phase,
                      float* variance, Workers* workers) {
  const int heads = group.group_heads;
  const int64_t blocks = NumBlocks(group);
  const int64_t segments = (blocks + kSegmentBlocks - 1) / kSegmentBlocks;
  ParallelFor(workers, segments, [&](int64_t s) {
    const int64_t first = s * kSegmentBlocks;
    const int count = static_cast<int>(std::min<int64_t>(blocks - first, kSegmentBlocks));
    const Weights weights(group, inclusion, first, count);
    HWY_DYNAMIC_DISPATCH(PredictDispatch)
    (group.scratch.estimate + first * heads * kBlockTokens, weights.At(0, heads), heads, count,
     inclusion.scale, stride, static_cast<int>((phase + first) % stride),
     group.scratch.sums + s * (heads + 2));
  });
  std::fill(variance, variance + heads, 0.f);
  float expected = 0;
  for (int64_t s = 0; s < segments; ++s) {
    const float* sums = group.scratch.sums + s * (heads + 2);
    for (int g = 0; g < heads; ++g) variance[g] += sums[g];
    expected += sums[heads];
  }
  for (int g = 0; g < heads; ++g) variance[g] *= static_cast<float>(stride);
  return expected * static_cast<float>(stride);
}

int64_t DrawTokens(const Group& group, const Inclusion& inclusion, float previous_scale,
                   Randomness randomness, int64_t count, Workers* workers, float* kept) {
  const int heads = group.group_heads;
  const Scratch& w = group.scratch;
  const int64_t blocks = NumBlocks(group);
  const int64_t segments = (blocks + kSegmentBlocks - 1) / kSegmentBlocks;
  const uint32_t refresh = randomness.renewal(), use = randomness.use();
  const uint32_t epoch = static_cast<uint32_t>(group.step / refresh);
  const uint32_t step_phase = static_cast<uint32_t>(group.step % refresh);
  const auto blocks_of = [&](int64_t s) {
    return std::min<int64_t>(blocks - s * kSegmentBlocks, kSegmentBlocks);
  };
  // The number of tokens found in a segment; negative if they are candidates.
  const auto found = [&](int64_t s) -> float& { return w.sums[s * (heads + 2)]; };
  // Lists the tokens between two scales and returns their number; -1 if there is no room to keep their u.
  const auto draw = [&](int64_t s, float low, float scale, bool keep) {
    alignas(64) float u[kBlockTokens];
    const int64_t at = s * kSegmentPlaces;
    const int64_t begin = s * kSegmentBlocks, end = begin + blocks_of(s);
    const int half = Half(end - begin);
    if (keep && end - begin < kKeepBlocks) return -1;
    const Weights weights(group, inclusion, begin, static_cast<int>(end - begin));
    int n = 0;
    for (int64_t b = begin; b < end; ++b) {
      if (keep && n + kBlockTokens + kDrawSlack / 2 > half) return -1;
      const uint32_t first = static_cast<uint32_t>((FirstBlock(group) + b) * kBlockTokens);
      HWY_DYNAMIC_DISPATCH(Uniform)
      (group.key, use, TokenCounter(first), epoch, step_phase, refresh, kBlockTokens, u);
      float* kept_u = keep ? w.sparse_weight + at + half + n : nullptr;
      n += HWY_DYNAMIC_DISPATCH(DrawDispatch)(
          w.estimate + b * heads * kBlockTokens, weights.At(b - begin, heads), heads, low, scale, u,
          first, w.sparse_token + at + n, w.sparse_weight + at + n, kept_u);
    }
    return n;
  };
  const bool candidates = kept != nullptr && inclusion.scale <= *kept;
  const bool keep = kept != nullptr && !candidates;
  ParallelFor(workers, segments, [&](int64_t s) {
    if (candidates && found(s) < 0) return;
    const int n = keep ? draw(s, 0, kKeep * inclusion.scale, true) : -1;
    // The number is below 2^24, so that a float holds it exactly.
    found(s) = static_cast<float>(n > 0 ? -n : draw(s, previous_scale, inclusion.scale, false));
  });
  // NOLINTNEXTLINE(clang-analyzer-core.NullDereference): keep says that kept is not null.
  if (keep) *kept = kKeep * inclusion.scale;
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t at = s * kSegmentPlaces;
    const int n = static_cast<int>(found(s));
    if (n < 0) {
      count += HWY_DYNAMIC_DISPATCH(FilterKept)(
          w.sparse_token + at, w.sparse_weight + at, w.sparse_weight + at + Half(blocks_of(s)), -n,
          previous_scale, inclusion.scale, w.token + count, w.weight + count);
    } else {
      std::copy_n(w.sparse_token + at, n, w.token + count);
      std::copy_n(w.sparse_weight + at, n, w.weight + count);
      count += n;
    }
  }
  return count;
}

void FixDrawn(const Group& group, int64_t count) {
  const Scratch& w = group.scratch;
  for (int64_t i = 0; i < count; ++i) {
    w.weight[i] = std::numeric_limits<float>::infinity();
    const int64_t block = w.token[i] / kBlockTokens - FirstBlock(group);
    for (int g = 0; g < group.group_heads; ++g) {
      const int64_t at = block * group.group_heads + g;
      w.mass[at] -= EstimateOf(group, w.token[i], g);
      w.estimate[at * kBlockTokens + w.token[i] % kBlockTokens] = 0;
    }
  }
}

}  // namespace vattn::cpu
#endif
