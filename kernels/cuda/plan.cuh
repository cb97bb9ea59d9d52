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

// Which head a thread looks at in a pass over numbers [][G]: thread t has head t % G, and starts with
// its t / G-th number. The last threads have none where G does not divide their number.
struct HeadShare {
  int head, first, step;

  __device__ explicit HeadShare(int heads) {
    step = kThreads / heads;
    first = static_cast<int>(threadIdx.x) / heads;
    head = static_cast<int>(threadIdx.x) - first * heads;
  }
  __device__ bool idle() const { return first >= step; }
};

// shared.head[h].shift, mass and denominator.
template <int kHeads>
__device__ __noinline__ void SumEstimates(Team<kHeads>& team) {
  const GroupScratch& w = team.group.scratch;
  const int heads = team.heads(), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int stride = MostTotals(heads), dim = team.p.storage.host.row.dim_v,
            floats = StateFloats(dim);
  const HeadShare share(heads);
  float most = -INFINITY, mass = 0;
  if (!share.idle()) {
    const int end = static_cast<int>(team.BlocksEnd());
#pragma unroll 4
    for (int b = static_cast<int>(team.BlocksBegin()) + share.first; b < end; b += share.step)
      MergeSum(most, mass, w.shift[b * heads + share.head], w.mass[b * heads + share.head]);
  }
  // The threads' parts of each head, one warp a head.
  static_assert(sizeof(team.shared.sums) >= 2 * kThreads * sizeof(float));
  float* const sums = &team.shared.sums[0][0];
  double* parts = w.partial + static_cast<int64_t>(team.parity) * team.size * stride;
  __syncthreads();
  sums[threadIdx.x] = most, sums[kThreads + threadIdx.x] = mass;
  __syncthreads();
#pragma unroll 1
  for (int h = warp; h < heads; h += kWarps) {
    most = -INFINITY, mass = 0;
#pragma unroll 1
    for (int i = lane; i < share.step; i += kWarp)
      MergeSum(most, mass, sums[i * heads + h], sums[kThreads + i * heads + h]);
    MergeOverWarp(most, mass);
    if (lane == 0) {
      parts[team.rank * stride + 2 * h] = most;
      parts[team.rank * stride + 2 * h + 1] = mass;
    }
  }
  team.Sync();
  static_assert(kMostTeam <= kWarp && kFixedParts <= kWarp);
#pragma unroll 1
  for (int h = warp; h < heads; h += kWarps) {
    const ConstSoftmaxState fixed(
        w.fixed + (static_cast<int64_t>(lane % kFixedParts) * heads + h) * floats, dim);
    const bool has = lane < team.size;
    const double* part = parts + (has ? lane : 0) * stride + 2 * h;
    const float own_top = has ? static_cast<float>(LoadL2(part)) : -INFINITY,
                own_mass = has ? static_cast<float>(LoadL2(part + 1)) : 0, max = fixed.max(),
                denominator = fixed.denominator(), value_norm2 = fixed.value_norm2();
    const float top = WarpMax(own_top), shift = fmaxf(top, WarpMax(max));
    const double all = WarpSum(static_cast<double>(own_mass) * expf(own_top - shift));
    const bool counts = lane < kFixedParts && denominator > 0;
    const float factor = counts ? expf(max - shift) : 0;
    const double sum = WarpSum(static_cast<double>(counts ? denominator * factor : 0)),
                 norm2 = WarpSum(static_cast<double>(counts ? value_norm2 * factor : 0));
    if (lane > 0) continue;
    HeadWork& work = team.shared.head[h];
    work.shift = shift;
    work.mass = static_cast<float>(all);
    work.top = top - shift;
    work.denominator = static_cast<float>(all + sum);
    work.fixed_norm2 = static_cast<float>(norm2);
  }
  team.parity ^= 1;
  __syncthreads();
}

// Blocks by their largest e^, to tops [G][kTopBins] in shared memory, after SumEstimates. Every block
// of a team counts them all.
template <int kHeads>
__device__ void CountTops(Team<kHeads>& team, int* tops) {
  const int heads = team.heads();
  for (int i = threadIdx.x; i < heads * kTopBins; i += kThreads) tops[i] = 0;
  __syncthreads();
  const HeadShare share(heads);
  if (!share.idle()) {
    const float* const shifts = team.group.scratch.shift;
    const int blocks = static_cast<int>(NumBlocks(team.group));
#pragma unroll 4
    for (int b = share.first; b < blocks; b += share.step) {
      const int bin = TopBin(team.shared.head[share.head], shifts[b * heads + share.head]);
      if (bin < kTopBins) atomicAdd(tops + share.head * kTopBins + bin, 1);
    }
  }
  __syncthreads();
}

// scratch.sure of every segment of the index and head, after PlanHead. Every block of a team writes the
// same.
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

// A thread block's part of the sample that multipliers are sought on, in shared memory. Bring and Settle
// fill it; what lies between them is done while it is on its way.
struct Sample {
  static constexpr int kMostTiles =
      static_cast<int>(kPlanTokens / kTileTokens) + 2 * kTilesPerBlock;
  __half* estimate;  // [G][tiles * 16] e^ over its block's largest, as the scan left it
  float* unit;       // [G][tiles] what e^ is in the unit of HeadWork::shift
  float* excess;     // [tiles * 16] 1 / pi - 1
  int first, tiles, tokens, heads, stride, phase;

  // Bytes of shared memory that a thread block takes, for so many heads and a team of this size.
  static VATTN_HD int Bytes(int heads, int size) {
    return (kMostTiles / size + 1) * (heads * (kTileTokens * 2 + 4) + kTileTokens * 4) + 16;
  }

  template <int kHeads>
  __device__ Sample(const Team<kHeads>& team, int plan_stride, std::byte* memory) {
    heads = team.heads(), stride = plan_stride;
    phase = static_cast<int>(team.group.step % static_cast<uint64_t>(stride));
    const int all = SampledTiles(stride, static_cast<int>(NumBlocks(team.group)));
    first = all * team.rank / team.size;
    tiles = all * (team.rank + 1) / team.size - first;
    tokens = tiles * kTileTokens;
    excess = reinterpret_cast<float*>(memory);
    unit = excess + tokens;
    estimate = reinterpret_cast<__half*>(unit + (heads * tiles + 3) / 4 * 4);
  }

  // Starts to copy estimates, and the shifts of their blocks to `unit`.
  __device__ void Bring(const DeviceGroup& group) {
    const int blocks = static_cast<int>(NumBlocks(group));
    const GroupScratch& w = group.scratch;
    const int all = 2 * tiles * heads;  // halves of tiles
#pragma unroll 1
    for (int i = threadIdx.x; i < all; i += kThreads) {
      const int h = i / (2 * tiles), t = i / 2 - h * tiles, half = i % 2;
      const auto [b, tile] = SampledTile(stride, phase, first + t);
      __half* to = estimate + h * tokens + t * kTileTokens + half * 8;
      if (b < blocks) {
        __pipeline_memcpy_async(
            to,
            w.estimate + (int64_t{b} * heads + h) * kBlockTokens + tile * kTileTokens + half * 8,
            16);
        if (half == 0) __pipeline_memcpy_async(unit + h * tiles + t, w.shift + b * heads + h, 4);
      } else {
        *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
        if (half == 0) unit[h * tiles + t] = 0;
      }
    }
    __pipeline_commit();
  }

  // Brings all heads to one unit. The estimate of a sure token counts no more than an outlier's. Call
  // it when HeadWork::shift and scratch.sure are there.
  template <int kHeads>
  __device__ void Settle(const Team<kHeads>& team) {
    __pipeline_wait_prior(0);
    __syncthreads();
    const GroupScratch& w = team.group.scratch;
#pragma unroll 1
    for (int i = threadIdx.x; i < tiles * heads; i += kThreads) {
      const int h = i / tiles, t = i - h * tiles;
      const float shift = unit[i];
      unit[i] = expf(shift - team.shared.head[h].shift);
      if (w.sure == nullptr) continue;
      const int64_t block = FirstBlock(team.group) + SampledTile(stride, phase, first + t).block;
      const float limit =
          SureEstimate(SureScores(w, SegmentAt(team.group, block), heads), h, shift);
      __half* const e = estimate + h * tokens + t * kTileTokens;
#pragma unroll 1
      for (int j = 0; j < kTileTokens; ++j) {
        if (__half2float(e[j]) >= limit) e[j] = __float2half_rn(kOutlierEstimate);
      }
    }
    __syncthreads();
  }

  // e^ of two tokens in the unit of HeadWork::shift. What underflows still has its floor.
  __device__ float2 At(int h, int pair) const {
    float2 e = __half22float2(*reinterpret_cast<const __half2*>(estimate + h * tokens + 2 * pair));
    const float u = unit[h * tiles + pair / (kTileTokens / 2)];
    if (e.x > 0) e.x = fmaxf(e.x * u, 1e-37f);
    if (e.y > 0) e.y = fmaxf(e.y * u, 1e-37f);
    return e;
  }

  // As PredictSample, without the expected draws: into shared.total [0, G), over the team.
  template <int kHeads>
  __device__ void Predict(Team<kHeads>& team) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    float* const gains = &team.shared.sums[kWarps / 2][0];  // [G]
    for (int h = threadIdx.x; h < heads; h += kThreads)
      gains[h] = expf(team.shared.log_gain[h] + team.shared.head[h].shift);
    __syncthreads();
#pragma unroll 1
    for (int pair = threadIdx.x; pair < tokens / 2; pair += kThreads) {
      float weight2[2] = {}, none = 0;
      float2 e = {};
#pragma unroll 2
      for (int h = 0; h < heads; ++h) {
        e = At(h, pair);
        AddWeight(e.x, gains[h], team.shared.floor[h], HUGE_VALF, weight2[0]);
        AddWeight(e.y, gains[h], team.shared.floor[h], HUGE_VALF, weight2[1]);
      }
      excess[2 * pair] = e.x == 0 ? 0 : Excess(weight2[0], 1.f, none);
      excess[2 * pair + 1] = e.y == 0 ? 0 : Excess(weight2[1], 1.f, none);
    }
    __syncthreads();
    // A head has as many warps as there are for it; sums [warps of a head][G].
    const int warps = heads < kWarps ? kWarps / heads : 1, part = warp / heads;
    float* const sums = &team.shared.sums[0][0];
#pragma unroll 1
    for (int h = warp - part * heads; part < warps && h < heads; h += kWarps) {
      float sum = 0;
#pragma unroll 4
      for (int pair = part * kWarp + lane; pair < tokens / 2; pair += warps * kWarp) {
        const float2 e = At(h, pair), x = *reinterpret_cast<const float2*>(excess + 2 * pair);
        sum = fmaf(e.x * e.x, x.x, sum);
        sum = fmaf(e.y * e.y, x.y, sum);
      }
      sum = WarpSum(sum);
      if (lane == 0) sums[part * heads + h] = sum * gains[h] * gains[h];
    }
    __syncthreads();
    for (int h = threadIdx.x; h < heads; h += kThreads) {
      float sum = 0;
      for (int i = 0; i < warps; ++i) sum += sums[i * heads + h];
      team.shared.total[h] = static_cast<double>(sum) * stride;
    }
    team.Add(heads);
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
