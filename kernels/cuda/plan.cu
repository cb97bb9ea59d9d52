// Planning stages of a step, as kernels/cpu/plan.cc: multipliers by one thread block a group, then
// a pass over all estimates by the whole device.
#include "kernels/cuda/plan.cuh"
#include "kernels/cuda/stages.h"

namespace vattn::cuda {
namespace {

constexpr int kPredictThreads = 128;
constexpr int kPredictWarps = kPredictThreads / kWarp;

template <int kHeads>
__device__ void FindPlan(Team<kHeads>& team, int* tops) {
  const int heads = team.heads(), tid = threadIdx.x;
  const int stride = PlanStride(team.middle());
  const int phase = static_cast<int>(team.group.step % static_cast<uint64_t>(stride));
  for (int h = tid; h < heads; h += kThreads) {
    team.shared.head[h] = {};
    team.shared.state[h] = team.group.state[h];
  }
  __syncthreads();
  team.StampTime(TimelinePoint::kScanned);
  SumEstimates(team);
  const bool slice = team.p.task == Task::kMore;
  for (int h = tid; h < heads; h += kThreads) {
    HeadWork& work = team.shared.head[h];
    if (slice) {
      work.sliced = 1;
      work.log_others = team.group.scratch.log_others[h];
    }
    const Outlook outlook =
        slice ? team.group.scratch.outlook[h]
              : OutlookOf(team.group.index, static_cast<float>(team.middle()), work);
    PlanHead(team.p.storage.host.value_bits > 0, team.p.promise, team.group.index, outlook,
             team.shared.state[h], work);
  }
  __syncthreads();
  FindSure(team);
  CountTops(team, tops);
  if (heads <= kHeads) {
    Sample<kHeads> sample;
    sample.stride = stride;
    sample.Load(team, phase);
    FindMultipliers(team, tops, [&] { sample.Predict(team); });
  } else {
    FindMultipliers(team, tops, [&] { PredictSample(team, 1.f, stride, phase); });
  }
  SetGains(team);
  for (int h = tid; h < heads; h += kThreads) {
    team.group.scratch.log_gain[h] = team.shared.log_gain[h];
    team.group.scratch.floor[h] = team.shared.floor[h];
    team.group.scratch.head[h] = team.shared.head[h];
    team.group.state[h] = team.shared.state[h];
  }
  team.StampTime(TimelinePoint::kPlanned);
}

template <int kHeads>
__global__ void __launch_bounds__(kThreads, 1) PlanKernel(const __grid_constant__ StepParams p) {
  __shared__ TeamShared<kHeads> shared;
  extern __shared__ int tops[];  // [G][kTopBins]
  if (static_cast<int>(blockIdx.x) >= NumGroups(p)) return;
  const DeviceGroup& group = p.groups[blockIdx.x];
  if (group.tokens == 0 || group.middle_end == group.middle_begin) return;
  Team<kHeads> team{p, group, shared, nullptr, 0, 1};
  FindPlan(team, tops);
}

template <int kHeads>
__global__ void __launch_bounds__(kPredictThreads, 4)
    PredictKernel(const __grid_constant__ StepParams p) {
  const int warp = threadIdx.x / kWarp, groups = NumGroups(p);
  // Segments go round the groups, so that neighbouring warps share no group's tables but all have
  // work.
  const int64_t all = static_cast<int64_t>(groups) * kMostSegments;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kPredictWarps + warp; i < all;
       i += static_cast<int64_t>(gridDim.x) * kPredictWarps) {
    const DeviceGroup& group = p.groups[i / kMostSegments];
    const int segment = static_cast<int>(i % kMostSegments);
    if (group.tokens == 0 || segment >= NumSegments(NumBlocks(group))) continue;
    PredictSegment<kHeads>(
        group, p.group_heads, segment, group.scratch.log_gain, group.scratch.floor, 1.f,
        kCandidateScale,
        {.refresh = p.promise.refresh, .rank = static_cast<uint32_t>(p.slice.rank)});
  }
}

template <int kHeads>
int LaunchPredict(const StepParams& p, cudaStream_t stream) {
  const int64_t warps = static_cast<int64_t>(p.most_groups) * kMostSegments;
  const int64_t blocks = (warps + kPredictWarps - 1) / kPredictWarps;
  PredictKernel<kHeads>
      <<<static_cast<unsigned>(blocks < 65536 ? blocks : 65536), kPredictThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <int kHeads>
int LaunchPlan(const StepParams& p, cudaStream_t stream) {
  const auto kernel = PlanKernel<kHeads>;
  const int bytes = p.group_heads * kTopBins * static_cast<int>(sizeof(int));
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<p.most_groups, kThreads, bytes, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

int PlanDraw(const StepParams& p, Stream stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream.handle);
  return p.group_heads <= 4 ? LaunchPlan<4>(p, s) : LaunchPlan<8>(p, s);
}

int Predict(const StepParams& p, Stream stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream.handle);
  return p.group_heads <= 4 ? LaunchPredict<4>(p, s) : LaunchPredict<8>(p, s);
}

}  // namespace vattn::cuda
