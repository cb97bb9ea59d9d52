// The plan of a draw by a team, as kernels/cpu/plan.cc: units and sums of the scan, multipliers,
// scale.
#ifndef VATTN_KERNELS_CUDA_PLAN_CUH_
#define VATTN_KERNELS_CUDA_PLAN_CUH_

#include "kernels/cuda/sample.cuh"

namespace vattn::cuda {

// Candidates of the first pass over all tokens reach up to this scale, which leaves room for a
// second look without another pass.
constexpr float kCandidateScale = 8;

struct Plan {
  float scale = 1;
  float expected = 0;    // tokens drawn
  float bound = 0;       // candidates are kept up to this scale
  bool feasible = true;  // false: more than max_selected_share of the middle would be needed
  // The sure tokens alone exceed that share: what codes leave out could hold anything.
  bool noisy = false;
};

// A sum in the unit exp(most), and another one added to it.
inline __device__ void MergeSum(float& most, float& sum, float other_most, float other_sum) {
  const float both = fmaxf(most, other_most);
  if (both == -INFINITY) return;
  sum = fmaf(sum, expf(most - both), other_sum * expf(other_most - both));
  most = both;
}
inline __device__ void MergeOverWarp(float& most, float& sum) {
  const float all = WarpMax(most);
  sum = WarpSum(all == -INFINITY ? 0.f : sum * expf(most - all));
  most = all;
}

// shared.head[h].shift, mass and denominator.
template <int kHeads>
__device__ __noinline__ void SumEstimates(Team<kHeads>& team) {
  const GroupScratch& w = team.group.scratch;
  const int heads = team.heads(), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int stride = MostTotals(heads), dim = team.p.storage.host.row.dim_v,
            floats = StateFloats(dim);
  const int64_t begin = team.BlocksBegin(), end = team.BlocksEnd();
  const float* const shifts = w.shift;
  const float* const masses = w.mass;
  double* parts = w.partial + static_cast<int64_t>(team.parity) * team.size * stride;
  for (int first = 0; first < heads; first += kHeads) {
    float most[kHeads], mass[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) most[h] = -INFINITY, mass[h] = 0;
#pragma unroll 2
    for (int64_t b = begin + threadIdx.x; b < end; b += kThreads) {
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if (first + h < heads)
          MergeSum(most[h], mass[h], shifts[b * heads + first + h], masses[b * heads + first + h]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      MergeOverWarp(most[h], mass[h]);
      if (lane == 0)
        team.shared.sums[warp][2 * h] = most[h], team.shared.sums[warp][2 * h + 1] = mass[h];
    }
    __syncthreads();
    if (warp < kHeads && first + warp < heads) {
      float all = lane < kWarps ? team.shared.sums[lane][2 * warp] : -INFINITY;
      float sum = lane < kWarps ? team.shared.sums[lane][2 * warp + 1] : 0;
      MergeOverWarp(all, sum);
      if (lane == 0) {
        parts[team.rank * stride + 2 * (first + warp)] = all;
        parts[team.rank * stride + 2 * (first + warp) + 1] = sum;
      }
    }
  }
  team.Sync();
  for (int h = threadIdx.x; h < heads; h += kThreads) {
    const float* const first = w.fixed + static_cast<int64_t>(h) * floats;
    const auto fixed = [&](int part) {
      return ConstSoftmaxState(first + static_cast<int64_t>(part) * heads * floats, dim);
    };
    float top = -INFINITY;
    for (int r = 0; r < team.size; ++r)
      top = fmaxf(top, static_cast<float>(LoadL2(parts + r * stride + 2 * h)));
    float shift = top;
    for (int part = 0; part < kFixedParts; ++part) shift = fmaxf(shift, fixed(part).max());
    double mass = 0, sum = 0, norm2 = 0;
    for (int r = 0; r < team.size; ++r) {
      mass += LoadL2(parts + r * stride + 2 * h + 1) *
              expf(static_cast<float>(LoadL2(parts + r * stride + 2 * h)) - shift);
    }
    for (int part = 0; part < kFixedParts; ++part) {
      const ConstSoftmaxState at = fixed(part);
      if (!(at.denominator() > 0)) continue;
      sum += at.denominator() * expf(at.max() - shift);
      norm2 += at.value_norm2() * expf(at.max() - shift);
    }
    HeadWork& work = team.shared.head[h];
    work.shift = shift;
    work.mass = static_cast<float>(mass);
    work.top = top - shift;
    work.denominator = static_cast<float>(mass + sum);
    work.fixed_norm2 = static_cast<float>(norm2);
  }
  team.parity ^= 1;
  __syncthreads();
}

// Blocks by their largest e^, to tops [G][kTopBins] in shared memory. By a team of one thread
// block, after SumEstimates.
template <int kHeads>
__device__ void CountTops(Team<kHeads>& team, int* tops) {
  const int heads = team.heads();
  const float* const shifts = team.group.scratch.shift;
  for (int i = threadIdx.x; i < heads * kTopBins; i += kThreads) tops[i] = 0;
  __syncthreads();
  const int all = static_cast<int>(NumBlocks(team.group)) * heads;
#pragma unroll 4
  for (int i = threadIdx.x; i < all; i += kThreads) {
    const int h = i % heads, bin = TopBin(team.shared.head[h], shifts[i]);
    if (bin < kTopBins) atomicAdd(tops + h * kTopBins + bin, 1);
  }
  __syncthreads();
}

// scratch.sure of every segment of the index and head. By a team of one thread block, after
// PlanHead.
template <int kHeads>
__device__ void FindSure(Team<kHeads>& team) {
  const GroupScratch& w = team.group.scratch;
  const int heads = team.heads(), all = w.sure == nullptr ? 0 : IndexSegments(team.group) * heads;
  for (int i = threadIdx.x; i < all; i += kThreads) {
    const int h = i % heads;
    w.sure[i] = SureScore(team.p.promise, w.noise[i], team.shared.state[h], team.shared.head[h]);
  }
  __syncthreads();
}

// Gains and floors of the multipliers in shared.state.
template <int kHeads>
__device__ void SetGains(Team<kHeads>& team) {
  __syncthreads();
  for (int h = threadIdx.x; h < team.heads(); h += kThreads) {
    const float half = .5f * team.shared.state[h].log_multiplier;
    team.shared.log_gain[h] = team.shared.head[h].log_norm + half;
    team.shared.floor[h] = team.shared.head[h].floor * expf(half);
  }
  __syncthreads();
}

// Sums of a pass as predicted variances; returns the expected draws.
template <int kHeads>
__device__ float TakePrediction(Team<kHeads>& team) {
  for (int h = threadIdx.x; h < team.heads(); h += kThreads) {
    team.shared.head[h].predicted =
        static_cast<float>(team.shared.total[h]) * expf(-team.shared.state[h].log_multiplier);
  }
  const float expected = static_cast<float>(team.shared.total[team.heads()]);
  __syncthreads();
  return expected;
}

// One thread block's copy of the sample that multipliers are sought on, in registers: its estimates
// in the unit of head.shift. Every block of a team holds the same, so that rounds need no barrier.
template <int kHeads>
struct Sample {
  // A thread's tokens: a sample may be up to two blocks over kPlanTokens.
  static constexpr int kTokens = static_cast<int>(kPlanTokens / kThreads) + 2;
  float e[kHeads][kTokens];
  int stride;

  __device__ void Load(const Team<kHeads>& team, int phase) {
    const GroupScratch& w = team.group.scratch;
    const int heads = team.heads();
    const int64_t blocks = NumBlocks(team.group), items = SampledTiles(stride, blocks);
#pragma unroll
    for (int i = 0; i < kTokens; i += 2) {
      // Lanes of 8 take a tile, two tokens each.
      const int64_t item = (int64_t{i} / 2 * kThreads + threadIdx.x) / (kTileTokens / 2);
      const auto [b, tile] = SampledTile(stride, phase, item);
      const bool in = item < items && b < blocks;
      const float* const sure =
          SureScores(w, SegmentAt(team.group, FirstBlock(team.group) + b), heads);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float2 pair = make_float2(0, 0);
        if (in && h < heads) {
          const float shift = w.shift[b * heads + h], limit = SureEstimate(sure, h, shift);
          const uint16_t* at = w.estimate + (b * heads + h) * kBlockTokens + tile * kTileTokens +
                               threadIdx.x % 8 * 2;
          pair = __half22float2(*reinterpret_cast<const __half2*>(at));
          const float unit = expf(shift - team.shared.head[h].shift);
          // What underflows here still has its floor. A sure token's estimate counts no more than an
          // outlier's.
          if (pair.x > 0)
            pair.x = pair.x >= limit ? kOutlierEstimate : fmaxf(pair.x * unit, 1e-37f);
          if (pair.y > 0)
            pair.y = pair.y >= limit ? kOutlierEstimate : fmaxf(pair.y * unit, 1e-37f);
        }
        e[h][i] = pair.x, e[h][i + 1] = pair.y;
      }
    }
  }

  // As PredictSample, without a barrier of the team.
  __device__ void Predict(Team<kHeads>& team) const {
    const int heads = team.heads(), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    float gain[kHeads], floor[kHeads], variance[kHeads] = {}, expected = 0;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      gain[h] = h < heads ? expf(team.shared.log_gain[h] + team.shared.head[h].shift) : 0;
      floor[h] = h < heads ? team.shared.floor[h] : 0;
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      float weight2 = 0;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) AddWeight(e[h][i], gain[h], floor[h], HUGE_VALF, weight2);
      if (e[0][i] == 0) continue;
      const float excess = Excess(weight2, 1.f, expected);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float x = e[h][i] * gain[h];
        variance[h] = fmaf(x * x, excess, variance[h]);
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) variance[h] = WarpSum(variance[h]);
    expected = WarpSum(expected);
    if (lane == 0) {
#pragma unroll
      for (int h = 0; h < kHeads; ++h) team.shared.sums[warp][h] = variance[h];
      team.shared.sums[warp][kHeads] = expected;
    }
    __syncthreads();
    if (threadIdx.x <= heads) {
      const int from = threadIdx.x < heads ? threadIdx.x : kHeads;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kWarps; ++j) sum += team.shared.sums[j][from];
      team.shared.total[threadIdx.x] = static_cast<double>(sum) * stride;
    }
    __syncthreads();
  }
};

// The fixed point: multipliers for which every head is expected to meet its target. tops: of
// CountTops.
template <int kHeads, class Predict>
__device__ void FindMultipliers(Team<kHeads>& team, const int* tops, Predict&& predict) {
  static_assert(kTopBins == kWarp);
  const int heads = team.heads(), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const float tiny = kTiny * ValueUnit(team.group.index);
  for (int round = 0; round < kPlanRounds; ++round) {
    SetGains(team);
    predict();
    TakePrediction(team);
    for (int h = warp; h < heads; h += kWarps) {
      const float blocks = static_cast<float>(tops[h * kTopBins + lane]);
      const float variance =
          WarpSum(TopVariance(lane, blocks, team.shared.head[h], team.shared.state[h]));
      if (lane == 0) {
        team.shared.sums[0][h] =
            MoveMultiplier(tiny, variance, team.shared.head[h], team.shared.state[h]);
      }
    }
    __syncthreads();
    float worst = -100;
    for (int h = 0; h < heads; ++h) worst = Max(worst, team.shared.sums[0][h]);
    __syncthreads();
    if (fabsf(worst) < kClose) break;
  }
}

// True if heads that are not verified are answered by reading everything.
template <int kHeads>
__device__ bool ReadsWhole(const Team<kHeads>& team) {
  return team.p.promise.on_unverified == OnUnverified::kDense && team.p.task != Task::kSelect;
}

// The number of tokens that are drawn with probability 1 whatever the multipliers are. Candidates
// are to be listed anew after it.
template <int kHeads>
__device__ float CountSure(Team<kHeads>& team, Randomness randomness) {
  __syncthreads();
  for (int h = threadIdx.x; h < team.heads(); h += kThreads) {
    team.shared.log_gain[h] = -INFINITY;
    team.shared.floor[h] = 0;
  }
  PredictAll(team, 1.f, 1.f, randomness);
  const float count = static_cast<float>(team.shared.total[team.heads()]);
  SetGains(team);
  return count;
}

// Leaves sure tokens to chance. Every thread block of the team writes the same, and sees what it
// wrote.
template <int kHeads>
__device__ void ForgetSure(Team<kHeads>& team) {
  const GroupScratch& w = team.group.scratch;
  for (int i = threadIdx.x; i < IndexSegments(team.group) * team.heads(); i += kThreads)
    w.sure[i] = HUGE_VALF;
  __syncthreads();
}

// Scale of the first draw, after the passes of plan.cu: to be called by every block of the team. A
// noisy plan of a group that is read whole for it goes no further.
template <int kHeads>
__device__ Plan FinishPlan(Team<kHeads>& team) {
  const Promise& promise = team.p.promise;
  const int heads = team.heads();
  const float n = static_cast<float>(team.middle());
  const Randomness randomness{.refresh = promise.refresh,
                              .rank = static_cast<uint32_t>(team.p.slice.rank)};
  Plan plan;
  plan.bound = kCandidateScale;
  SumPredicted(team);
  plan.expected = TakePrediction(team);
  // What is left of the gap is closed for the worst head by one factor on every probability.
  float worst = kLeastScale;
  for (int h = 0; h < heads; ++h)
    worst = Max(worst, team.shared.head[h].predicted / team.shared.head[h].target);
  const float scale = PlanScale(promise, worst, plan.expected);
  const float most = promise.max_selected_share * n;
  const bool any_sure = team.group.scratch.sure != nullptr;
  // A scale below 1 takes nothing off tokens that are sure.
  float sure = 0;
  plan.feasible = plan.expected * (any_sure ? Max(scale, 1.f) : scale) <= most;
  __syncthreads();
  if (!plan.feasible && any_sure) {
    sure = CountSure(team, randomness);
    plan.noisy = sure > most;
    if (plan.noisy && ReadsWhole(team)) return plan;
    if (plan.noisy) ForgetSure(team);
    PredictAll(team, 1.f, plan.bound, randomness);  // CountSure listed other candidates
    plan.expected = TakePrediction(team);
    plan.feasible = !plan.noisy && sure + (plan.expected - sure) * scale <= most;
    __syncthreads();
  }
  if (!plan.feasible) {
    // Probabilities capped at 1 do not fall with the scale, so it goes down in several steps.
    for (int round = 0;; ++round) {
      plan.bound = plan.scale;
      PredictAll(team, plan.scale, plan.bound, randomness);
      plan.expected = TakePrediction(team);
      if (!(plan.expected > 1.05f * most) || round == kPlanRounds) return plan;
      plan.scale *= most / plan.expected;
    }
  }
  plan.expected = sure + (plan.expected - sure) * scale;
  plan.scale = scale;
  for (int h = threadIdx.x; h < heads; h += kThreads) team.shared.head[h].predicted /= scale;
  __syncthreads();
  return plan;
}

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_PLAN_CUH_
