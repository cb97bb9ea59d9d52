#include "kernels/cpu/sample.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/scan.h"
#include "kernels/cpu/workers.h"

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

// Adds to sums [G + 1]: per head (gain e)^2 (1 / pi - 1) over tiles phase, phase + stride, ... of one
// block, then the expected draws. gain [G] has the block's shift in it.
template <int kHeads>
void PredictBlock(const uint16_t* estimate, const float* gain, const float* floor, int heads,
                  float scale, int stride, int phase, float* sums) {
  const D d;
  const int n = kHeads > 0 ? kHeads : heads;
  const V one = hn::Set(d, 1.f);
  V expected = hn::Zero(d);
  constexpr int kHeld = kHeads > 0 ? kHeads : kMaxGroup;
  V variance[kHeld];
  for (int g = 0; g < n; ++g) variance[g] = hn::Zero(d);
  const V inverse_scale = hn::Set(d, 1.f / scale);
  for (int tile = phase; tile < kBlockTokens / kTileTokens; tile += stride) {
    for (int i = tile * kTileTokens; i < (tile + 1) * kTileTokens; i += kLanes) {
      V weight2 = hn::Zero(d);
      V x[kHeld];
      for (int g = 0; g < n; ++g) {
        const V e = LoadHalf(estimate + g * kBlockTokens + i);
        x[g] = hn::Mul(e, hn::Set(d, gain[g]));
        // A token outside the middle has e = 0 and is never drawn.
        const V with_floor = hn::Add(x[g], hn::IfThenElseZero(hn::Gt(e, hn::Zero(d)), hn::Set(d, floor[g])));
        weight2 = hn::MulAdd(with_floor, with_floor, weight2);
      }
      const V safe = hn::Max(weight2, hn::Set(d, 1e-30f));
      const V inverse = InverseSqrt(safe);
      const V pi = hn::Min(one, hn::Mul(hn::Mul(weight2, inverse), hn::Set(d, scale)));
      expected = hn::Add(expected, pi);
      const V excess = hn::Max(hn::Sub(hn::Mul(inverse, inverse_scale), one), hn::Zero(d));
      for (int g = 0; g < n; ++g) {
        variance[g] = hn::MulAdd(hn::Mul(x[g], x[g]), excess, variance[g]);
      }
    }
  }
  for (int g = 0; g < n; ++g) sums[g] += hn::GetLane(hn::SumOfLanes(d, variance[g]));
  sums[n] += hn::GetLane(hn::SumOfLanes(d, expected));
}

void PredictDispatch(const uint16_t* estimate, const float* gain, const float* floor, int heads,
                     float scale, int stride, int phase, float* sums) {
  switch (heads) {
    case 1: return PredictBlock<1>(estimate, gain, floor, heads, scale, stride, phase, sums);
    case 2: return PredictBlock<2>(estimate, gain, floor, heads, scale, stride, phase, sums);
    case 3: return PredictBlock<3>(estimate, gain, floor, heads, scale, stride, phase, sums);
    case 4: return PredictBlock<4>(estimate, gain, floor, heads, scale, stride, phase, sums);
    case 6: return PredictBlock<6>(estimate, gain, floor, heads, scale, stride, phase, sums);
    case 8: return PredictBlock<8>(estimate, gain, floor, heads, scale, stride, phase, sums);
    default: return PredictBlock<0>(estimate, gain, floor, heads, scale, stride, phase, sums);
  }
}

// High and low half of the 64-bit products of 32-bit lanes with a constant.
HWY_INLINE void Multiply(VU x, uint32_t by, VU& high, VU& low) {
  const DU du;
  const hn::RepartitionToWide<DU> du64;
  const VU m = hn::Set(du, by);
  const auto even = hn::MulEven(x, m);
  const auto odd = hn::MulEven(hn::BitCast(du, hn::ShiftRight<32>(hn::BitCast(du64, x))), m);
  high = hn::OddEven(hn::BitCast(du, odd), hn::BitCast(du, hn::ShiftRight<32>(even)));
  low = hn::OddEven(hn::BitCast(du, hn::ShiftLeft<32>(odd)), hn::BitCast(du, even));
}

// u of the 64 tokens whose counters start at `counter`; kernels/rng.h has the definition.
void Uniform64(const RandomKey& key, uint32_t use, uint32_t counter, uint32_t epoch,
               uint32_t step_phase, uint32_t refresh, float* u) {
  const D d;
  const DU du;
  const hn::RebindToSigned<D> di;
  for (int lane = 0; lane < 16; lane += kLanes) {
    VU c0 = hn::Add(hn::Set(du, counter + lane), hn::Iota(du, 0));
    VU phase, ignored;
    Multiply(hn::Mul(c0, hn::Set(du, 0x9E3779B1u)), refresh, phase, ignored);
    const VU late = hn::VecFromMask(
        du, hn::Not(hn::Lt(hn::Add(phase, hn::Set(du, step_phase)), hn::Set(du, refresh))));
    VU c1 = hn::Sub(hn::Set(du, epoch), late);  // a set mask is -1
    VU c2 = hn::Set(du, key.stream);
    VU c3 = hn::Set(du, use);
    uint32_t k0 = key.key0, k1 = key.key1;
    for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
      VU h0, l0, h1, l1;
      Multiply(c0, kPhiloxM0, h0, l0);
      Multiply(c2, kPhiloxM1, h1, l1);
      c0 = hn::Xor(hn::Xor(h1, c1), hn::Set(du, k0));
      c2 = hn::Xor(hn::Xor(h0, c3), hn::Set(du, k1));
      c1 = l1;
      c3 = l0;
    }
    const VU words[4] = {c0, c1, c2, c3};
    for (int w = 0; w < 4; ++w) {
      const V x = hn::ConvertTo(d, hn::BitCast(di, hn::ShiftRight<9>(words[w])));
      hn::StoreU(hn::Mul(hn::Add(x, hn::Set(d, .5f)), hn::Set(d, 0x1p-23f)), d, u + 16 * w + lane);
    }
  }
}

// Tokens of one block with low * weight <= u < scale * weight, to tokens and weights; the number.
template <int kHeads>
int DrawBlock(const uint16_t* estimate, const float* gain, const float* floor, int heads, float low,
              float scale, const float* u, uint32_t first, uint32_t* tokens, float* weights) {
  const D d;
  const DU du;
  const int n = kHeads > 0 ? kHeads : heads;
  int count = 0;
  for (int i = 0; i < kBlockTokens; i += kLanes) {
    V weight2 = hn::Zero(d);
    for (int g = 0; g < n; ++g) {
      const V e = LoadHalf(estimate + g * kBlockTokens + i);
      const V x = hn::MulAdd(e, hn::Set(d, gain[g]),
                             hn::IfThenElseZero(hn::Gt(e, hn::Zero(d)), hn::Set(d, floor[g])));
      weight2 = hn::MulAdd(x, x, weight2);
    }
    const V weight = hn::Sqrt(weight2);
    const V draw = hn::LoadU(d, u + i);
    const auto in = hn::And(hn::Lt(draw, hn::Mul(weight, hn::Set(d, scale))),
                            hn::Ge(draw, hn::Mul(weight, hn::Set(d, low))));
    if (hn::AllFalse(d, in)) continue;
    // Compress in a register, then a plain store: some processors compress to memory very slowly.
    const VU token = hn::Iota(du, first + static_cast<uint32_t>(i));
    hn::StoreU(hn::Compress(weight, in), d, weights + count);
    hn::StoreU(hn::Compress(token, hn::RebindMask(du, in)), du, tokens + count);
    count += static_cast<int>(hn::CountTrue(d, in));
  }
  return count;
}

int DrawDispatch(const uint16_t* estimate, const float* gain, const float* floor, int heads, float low,
                 float scale, const float* u, uint32_t first, uint32_t* tokens, float* weights) {
  switch (heads) {
    case 4: return DrawBlock<4>(estimate, gain, floor, heads, low, scale, u, first, tokens, weights);
    case 6: return DrawBlock<6>(estimate, gain, floor, heads, low, scale, u, first, tokens, weights);
    case 8: return DrawBlock<8>(estimate, gain, floor, heads, low, scale, u, first, tokens, weights);
    default: return DrawBlock<0>(estimate, gain, floor, heads, low, scale, u, first, tokens, weights);
  }
}

}  // namespace vattn::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vattn::cpu {

HWY_EXPORT(PredictDispatch);
HWY_EXPORT(Uniform64);
HWY_EXPORT(DrawDispatch);

namespace {

// Work is cut into the same segments whatever the number of threads, so that sums do not depend on it.
constexpr int kSegmentBlocks = 16;

// A draw writes whole vectors, past the last kept lane.
constexpr int kSlack = 64;

void BlockGain(const Group& group, const Inclusion& inclusion, int64_t block, float* gain) {
  for (int g = 0; g < group.q_heads; ++g) {
    gain[g] = std::exp(inclusion.log_gain[g] + group.scratch.shift[block * group.q_heads + g]);
  }
}

}  // namespace

float PredictVariance(const Group& group, const Inclusion& inclusion, int stride, int phase,
                      float* variance, Stream stream) {
  const int heads = group.q_heads;
  const int64_t blocks = NumBlocks(group);
  const int64_t segments = (blocks + kSegmentBlocks - 1) / kSegmentBlocks;
  ParallelFor(stream, segments, [&](int64_t s) {
    float gain[kMaxGroup];
    float* sums = group.scratch.sums + s * (heads + 2);
    std::fill(sums, sums + heads + 1, 0.f);
    for (int64_t b = s * kSegmentBlocks; b < std::min(blocks, (s + 1) * kSegmentBlocks); ++b) {
      BlockGain(group, inclusion, b, gain);
      HWY_DYNAMIC_DISPATCH(PredictDispatch)
      (group.scratch.estimate + b * heads * kBlockTokens, gain, inclusion.floor, heads, inclusion.scale,
       stride, static_cast<int>((phase + b) % stride), sums);
    }
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
                   Randomness randomness, int64_t count, Stream stream) {
  const int heads = group.q_heads;
  const int64_t blocks = NumBlocks(group);
  const int64_t segments = (blocks + kSegmentBlocks - 1) / kSegmentBlocks;
  const uint32_t refresh = randomness.redraw > 0 ? 1 : randomness.refresh;
  const uint32_t use = randomness.redraw > 0
                           ? static_cast<uint32_t>(RandomUse::kRedraw) + randomness.redraw - 1
                           : static_cast<uint32_t>(RandomUse::kSelect);
  const uint32_t epoch = static_cast<uint32_t>(group.step / refresh);
  const uint32_t step_phase = static_cast<uint32_t>(group.step % refresh);
  float* counts = group.scratch.sums;  // [segments * (heads + 2)]: one slot of each segment is used
  ParallelFor(stream, segments, [&](int64_t s) {
    float gain[kMaxGroup];
    alignas(64) float u[kBlockTokens];
    const int64_t at = s * (kSegmentBlocks * kBlockTokens + kSlack);
    int n = 0;
    for (int64_t b = s * kSegmentBlocks; b < std::min(blocks, (s + 1) * kSegmentBlocks); ++b) {
      BlockGain(group, inclusion, b, gain);
      const uint32_t first = static_cast<uint32_t>((FirstBlock(group) + b) * kBlockTokens);
      for (int t = 0; t < kBlockTokens; t += 64) {
        HWY_DYNAMIC_DISPATCH(Uniform64)(group.key, use, TokenCounter(first + t), epoch, step_phase, refresh, u + t);
      }
      n += HWY_DYNAMIC_DISPATCH(DrawDispatch)(
          group.scratch.estimate + b * heads * kBlockTokens, gain, inclusion.floor, heads, previous_scale,
          inclusion.scale, u, first, group.scratch.sparse_token + at + n, group.scratch.sparse_weight + at + n);
    }
    counts[s * (heads + 2)] = static_cast<float>(n);  // below 2^24: exact
  });
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t at = s * (kSegmentBlocks * kBlockTokens + kSlack);
    const int64_t n = static_cast<int64_t>(counts[s * (heads + 2)]);
    std::copy_n(group.scratch.sparse_token + at, n, group.scratch.token + count);
    std::copy_n(group.scratch.sparse_weight + at, n, group.scratch.weight + count);
    count += n;
  }
  return count;
}

void FixDrawn(const Group& group, int64_t count) {
  const Scratch& w = group.scratch;
  for (int64_t i = 0; i < count; ++i) {
    w.weight[i] = std::numeric_limits<float>::infinity();
    const int64_t block = w.token[i] / kBlockTokens - FirstBlock(group);
    for (int g = 0; g < group.q_heads; ++g) {
      const int64_t at = block * group.q_heads + g;
      w.mass[at] -= EstimateOf(group, w.token[i], g);
      w.estimate[at * kBlockTokens + w.token[i] % kBlockTokens] = 0;
    }
  }
}

}  // namespace vattn::cpu
#endif
