// Planning stages of a step, as kernels/cpu/plan.cc: multipliers by a team a group, then a pass over all
// estimates by the whole device.
#include "kernels/cuda/plan.cuh"
#include "kernels/cuda/stages.h"

namespace vattn::cuda {
namespace {

constexpr int kMostPlanTeam = 8;  // the most thread blocks that every device has clusters of
constexpr int kPredictThreads = 128;
constexpr int kPredictWarps = kPredictThreads / kWarp;

// Room for the histogram of FindPlan, a multiple of 16 bytes.
VATTN_HD inline int TopsBytes(int heads) {
  return heads * kTopBins * static_cast<int>(sizeof(int));
}

// sampled: memory has room for a Sample behind the histogram. Else every round reads its tiles anew.
template <int kHeads>
__device__ void FindPlan(Team<kHeads>& team, bool sampled) {
  const int heads = team.heads(), tid = threadIdx.x;
  const int stride = PlanStride(team.middle());
  int* const tops = reinterpret_cast<int*>(team.memory);  // [G][kTopBins]
  Sample sample(team, stride, team.memory + TopsBytes(heads));
  if (sampled) sample.Bring(team.group);
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
  if (sampled) sample.Settle(team);
  const int phase = static_cast<int>(team.group.step % static_cast<uint64_t>(stride));
  FindMultipliers(team, tops, [&] {
    if (sampled) {
      sample.Predict(team);
    } else {
      PredictSample(team, 1.f, stride, phase);
    }
  });
  SetGains(team);
  for (int h = tid; team.rank == 0 && h < heads; h += kThreads) {
    team.group.scratch.log_gain[h] = team.shared.log_gain[h];
    team.group.scratch.floor[h] = team.shared.floor[h];
    team.group.scratch.head[h] = team.shared.head[h];
    team.group.state[h] = team.shared.state[h];
  }
  team.StampTime(TimelinePoint::kPlanned);
}

__global__ void __launch_bounds__(kThreads, 1)
    PlanKernel(const __grid_constant__ StepParams p, int size, bool sampled) {
  __shared__ TeamShared<4> shared;
  extern __shared__ __align__(16) std::byte memory[];
  const int g = static_cast<int>(blockIdx.x) / size;
  if (g >= NumGroups(p)) return;
  const DeviceGroup& group = p.groups[g];
  if (group.tokens == 0 || group.middle_end == group.middle_begin) return;
  Team<4> team{p, group, shared, memory, static_cast<int>(blockIdx.x) % size, size, size > 1};
  FindPlan(team, sampled);
}

template <int kHeads, int kRounds>
__global__ void __launch_bounds__(kPredictThreads, 4)
    PredictKernel(const __grid_constant__ StepParams p) {
  __shared__ float part[kRounds > 0 ? 1 : kPredictWarps][kRounds > 0 ? 1 : kMaxDeviceGroup];
  const int warp = threadIdx.x / kWarp, groups = NumGroups(p);
  // Segments go round the groups, so that neighbouring warps share no group's tables but all have
  // work.
  const int all = groups * kMostSegments;
#pragma unroll 1
  for (int i = static_cast<int>(blockIdx.x) * kPredictWarps + warp; i < all;
       i += static_cast<int>(gridDim.x) * kPredictWarps) {
    const DeviceGroup& group = p.groups[i / kMostSegments];
    const int segment = i % kMostSegments;
    if (group.tokens == 0 || segment >= NumSegments(NumBlocks(group))) continue;
    PredictSegment<kHeads, kRounds>(
        group, p.group_heads, segment, group.scratch.log_gain, group.scratch.floor, 1.f,
        kCandidateScale,
        {.refresh = p.promise.refresh, .rank = static_cast<uint32_t>(p.slice.rank)},
        part[kRounds > 0 ? 0 : warp]);
  }
}

template <int kHeads, int kRounds>
int LaunchPredict(const StepParams& p, cudaStream_t stream) {
  const int64_t warps = static_cast<int64_t>(p.most_groups) * kMostSegments;
  const int64_t blocks = (warps + kPredictWarps - 1) / kPredictWarps;
  PredictKernel<kHeads, kRounds>
      <<<static_cast<unsigned>(blocks < 65536 ? blocks : 65536), kPredictThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

// Teams are clusters where the device has them and this code was compiled for such a device (Team::Sync
// has the cluster's barrier from compute capability 9.0 on), and single thread blocks elsewhere.
int LaunchPlan(const StepParams& p, int size, cudaStream_t stream) {
  int device = 0, most = 0, clusters = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, PlanKernel);
  if (error != cudaSuccess) return error;
  if (clusters == 0 || attributes.ptxVersion < 90) size = 1;
  int bytes = TopsBytes(p.group_heads) + Sample::Bytes(p.group_heads, size);
  bool sampled = bytes + static_cast<int>(attributes.sharedSizeBytes) <= most;
  if (!sampled) bytes = TopsBytes(p.group_heads);
  error = cudaFuncSetAttribute(PlanKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(size);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(p.most_groups * size);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = size > 1 ? 1 : 0;
  StepParams params = p;
  void* arguments[] = {&params, &size, &sampled};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(PlanKernel), arguments);
}

}  // namespace

int PlanDraw(const StepParams& p, int team, Stream stream) {
  return LaunchPlan(p, team < kMostPlanTeam ? team : kMostPlanTeam,
                    static_cast<cudaStream_t>(stream.handle));
}

int Predict(const StepParams& p, Stream stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream.handle);
  return p.group_heads <= 4    ? LaunchPredict<4, 1>(p, s)
         : p.group_heads <= 8  ? LaunchPredict<8, 1>(p, s)
         : p.group_heads <= 16 ? LaunchPredict<8, 2>(p, s)
                               : LaunchPredict<8, 0>(p, s);
}

}  // namespace vattn::cuda
