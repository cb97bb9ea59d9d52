// The plan of a draw by a team, as kernels/cpu/plan.cc: units and sums of the scan, multipliers, scale.
#ifndef VATTN_KERNELS_CUDA_PLAN_CUH_
#define VATTN_KERNELS_CUDA_PLAN_CUH_

#include "kernels/cuda/draw.cuh"

namespace vattn::cuda {

// Candidates of the first pass over all tokens reach up to this scale, which leaves room for a second
// look without another pass.
constexpr float kCandidateScale = 8;

struct Plan {
  float scale = 1;
  float expected = 0;     // tokens drawn
  float bound = 0;        // candidates are kept up to this scale
  bool feasible = true;   // false: more than max_selected_share of the middle would be needed
};

// shared.head[h].shift, mass and denominator.
template <int kHeads>
__device__ __noinline__ void SumEstimates(Team<kHeads>& team) {
  const GroupScratch& w = team.group.scratch;
  const int heads = team.heads(), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int stride = kPartials(heads), floats = team.p.storage.host.row.dim_v + 3;
  double* parts = w.partial + static_cast<int64_t>(team.parity) * team.size * stride;
  for (int h = warp; h < heads; h += kWarps) {
    float most = -INFINITY, mass = 0;
    for (int64_t b = team.BlocksBegin() + lane; b < team.BlocksEnd(); b += kWarp) {
      const float shift = w.shift[b * heads + h];
      if (shift > most) {
        mass *= expf(most - shift);
        most = shift;
      }
      mass += w.mass[b * heads + h] * expf(shift - most);
    }
    const float all = WarpMax(most);
    mass = WarpSum(most > -INFINITY ? mass * expf(most - all) : 0);
    if (lane == 0) {
      parts[team.rank * stride + 2 * h] = all;
      parts[team.rank * stride + 2 * h + 1] = mass;
    }
  }
  team.Sync();
  for (int h = threadIdx.x; h < heads; h += kThreads) {
    const float* fixed = w.fixed + static_cast<int64_t>(h) * floats + floats - 3;
    float shift = -INFINITY;
    for (int part = 0; part < kFixedParts; ++part) shift = fmaxf(shift, fixed[static_cast<int64_t>(part) * heads * floats]);
    for (int r = 0; r < team.size; ++r) {
      shift = fmaxf(shift, static_cast<float>(LoadShared(parts + r * stride + 2 * h)));
    }
    double mass = 0, sum = 0;
    for (int r = 0; r < team.size; ++r) {
      mass += LoadShared(parts + r * stride + 2 * h + 1) *
              expf(static_cast<float>(LoadShared(parts + r * stride + 2 * h)) - shift);
    }
    for (int part = 0; part < kFixedParts; ++part) {
      const float* at = fixed + static_cast<int64_t>(part) * heads * floats;
      if (at[1] > 0) sum += at[1] * expf(at[0] - shift);
    }
    HeadWork& work = team.shared.head[h];
    work.shift = shift;
    work.mass = static_cast<float>(mass);
    work.denominator = static_cast<float>(mass + sum);
  }
  team.parity ^= 1;
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

template <int kHeads>
__device__ Plan MakePlan(Team<kHeads>& team) {
  const Promise& promise = team.p.promise;
  const IndexTables& index = team.group.index;
  const int heads = team.heads();
  const float n = static_cast<float>(team.middle());
  for (int h = threadIdx.x; h < heads; h += kThreads) {
    PlanHead(false, promise, index, n, team.shared.state[h], team.shared.head[h]);
  }
  const float tiny = kTiny * ValueUnit(index);
  const int stride = PlanStride(team.middle());
  const int phase = static_cast<int>(team.group.step % static_cast<uint64_t>(stride));
  for (int round = 0; round < kPlanRounds; ++round) {
    SetGains(team);
    PredictSample(team, 1.f, stride, phase);
    TakePrediction(team);
    for (int h = threadIdx.x; h < heads; h += kThreads) {
      team.shared.sums[0][h] = MoveMultiplier(tiny, team.shared.head[h], team.shared.state[h]);
    }
    __syncthreads();
    float worst = -100;
    for (int h = 0; h < heads; ++h) worst = Max(worst, team.shared.sums[0][h]);
    if (round >= kLeastRounds && fabsf(worst) < kClose) break;
  }
  SetGains(team);
  const Randomness randomness{.refresh = promise.refresh};
  Plan plan;
  plan.bound = kCandidateScale;
  PredictAll(team, 1.f, plan.bound, randomness);
  plan.expected = TakePrediction(team);
  // What is left of the gap is closed for the worst head by one factor on every probability.
  float scale = kLeastScale;
  for (int h = 0; h < heads; ++h) scale = Max(scale, team.shared.head[h].predicted / team.shared.head[h].target);
  scale = Min(scale, kMostScale);
  scale = Max(scale, static_cast<float>(promise.min_selected) / Max(plan.expected, 1e-6f));
  const float most = promise.max_selected_share * n;
  plan.feasible = plan.expected * scale <= most;
  __syncthreads();
  if (!plan.feasible) {
    // Probabilities capped at 1 do not fall with the scale, so it goes down in several steps.
    int round = 0;
    do {
      plan.scale *= most / plan.expected;
      plan.bound = plan.scale;
      PredictAll(team, plan.scale, plan.bound, randomness);
      plan.expected = TakePrediction(team);
    } while (plan.expected > 1.05f * most && ++round < kPlanRounds);
    return plan;
  }
  plan.expected *= scale;
  plan.scale = scale;
  for (int h = threadIdx.x; h < heads; h += kThreads) team.shared.head[h].predicted /= scale;
  __syncthreads();
  return plan;
}

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_PLAN_CUH_
