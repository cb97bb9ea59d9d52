// A look at a slice of a context by a team of thread blocks, and what it leaves in the records, as
// kernels/cpu/ranks.cc. What follows from the records of all ranks is in ranks.cu.
#ifndef VATTN_KERNELS_CUDA_RANKS_CUH_
#define VATTN_KERNELS_CUDA_RANKS_CUH_

#include <algorithm>

#include "kernels/cuda/attend.cuh"
#include "kernels/cuda/plan.cuh"
#include "kernels/cuda/stages.h"
#include "kernels/cuda/verify.cuh"
#include "kernels/merge.h"

namespace vattn::cuda {

template <int kHeads>
__device__ float* RecordOf(Team<kHeads>& team, int head) {
  return team.p.slice.partial +
         HeadPlace(team.p, team.group, head) * PartialFloats(team.p.storage.host.row.dim_v);
}

// What every record of a group says alike, of this block's heads.
template <int kHeads>
__device__ void StampRecords(Team<kHeads>& team, const RankStep& step) {
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int h = team.rank; h < team.heads(); h += team.size) {
    float* at = RecordOf(team, h);
    const HeadState& state = team.group.state[h];
    at[kPartialIsVersion] = kPartialVersion;
    at[kPartialRank] = static_cast<float>(step.rank);
    at[kPartialRound] = static_cast<float>(step.round);
    at[kPartialFlags] = static_cast<float>(step.flags);
    at[kPartialLook] = static_cast<float>(step.look);
    at[kPartialTokens] = static_cast<float>(team.middle());
    at[kPartialMemory] = state.started == 0 ? -1 : state.cos2;
  }
}

// Exact records of the heads that are not settled: the slice is read whole.
template <DType kType, int kHeads>
__device__ void ReadWhole(Team<kHeads>& team, RankStep& step) {
  const int dim = team.p.storage.host.row.dim_v;
  AttendAll<kType, kHeads>(team);
  Combine(team, false, 0);
  LoadHeads(team, false);
  for (int h = team.rank; h < team.heads(); h += team.size) {
    const HeadWork& work = team.shared.head[h];
    if (work.settled != 0) continue;
    float* at = RecordOf(team, h);
    for (int j = threadIdx.x; j < PartialFloats(dim); j += kThreads) {
      const int of_output = j - kPartialScalars;
      at[j] = of_output >= 0 && of_output < dim
                  ? LoadL2(team.group.scratch.output + static_cast<int64_t>(h) * dim + of_output)
                  : 0;
    }
    __syncthreads();
    if (threadIdx.x > 0) continue;
    at[kPartialCount] = static_cast<float>(team.middle());
    at[kPartialLse] = logf(work.denominator) + work.shift;
    at[kPartialNorm2] = work.value_norm2;
  }
  step.flags |= kPartialWhole;
  step.count = step.fetched = team.middle();
}

// The records of this block's heads after SumTail.
template <DType kType, int kHeads>
__device__ __noinline__ void WriteRecords(Team<kHeads>& team, int64_t count, float scale) {
  const GroupScratch& w = team.group.scratch;
  const int heads = team.heads(), dim = team.p.storage.host.row.dim_v, tid = threadIdx.x;
  __shared__ float scratch[kWarps];
  float* output = reinterpret_cast<float*>(team.memory);  // [dim], and behind it room for TailCos2
  const int64_t tail = static_cast<int64_t>(TailTotalsOf(team).Tail());
  for (int h = team.rank; h < heads; h += team.size) {
    const double* total = TailTotalsOf(team).Head(h);
    const HeadWork& work = team.shared.head[h];
    const float weight = static_cast<float>(TailTotalsOf(team).Coded(h)[0]);  // sum of c
    __syncthreads();
    for (int j = tid; j < dim; j += kThreads)
      output[j] = LoadL2(w.output + static_cast<int64_t>(h) * dim + j);
    __syncthreads();
    const float cos2 =
        TailCos2<kType, kHeads>(team, count, tail, total[TailTotals::kVariance], h, output);
    float grown[kGrowths] = {};
    const float* residual = w.residual + h * w.capacity;
    for (int64_t i = tid; i < count; i += kThreads) {
      const float own = scale * LoadL2(w.weight + i), part = LoadL2(residual + i);
#pragma unroll
      for (int k = 0; k < kGrowths; ++k) {
        const float pi = Min(1.f, GrowthFactor(k) * own);
        grown[k] += part * (1 - pi) / pi;
      }
    }
    float* at = RecordOf(team, h);
#pragma unroll
    for (int k = 0; k < kGrowths; ++k) {
      const float sum = BlockSum(grown[k], scratch);
      if (tid == 0) at[kPartialGrowth + k] = sum;
    }
    for (int j = tid; j < dim; j += kThreads) {
      float moment = 0;
      for (int r = 0; r < team.size; ++r)
        moment += LoadL2(w.moment + (static_cast<int64_t>(r) * heads + h) * dim + j);
      at[kPartialScalars + j] = output[j];
      at[kPartialScalars + dim + j] = moment - weight * output[j];
    }
    if (tid > 0) continue;
    at[kPartialCount] = static_cast<float>(count);
    at[kPartialTail] = static_cast<float>(tail);
    at[kPartialLse] = logf(work.denominator) + work.shift;
    at[kPartialNorm2] = work.value_norm2;
    at[kPartialMiddle] = at[kPartialLight] = 0;
    at[kPartialLogUnit] = logf(WholeDenominator(work)) + work.shift;
    at[kPartialVariance] = static_cast<float>(total[TailTotals::kVariance]);
    at[kPartialSquares] = static_cast<float>(total[TailTotals::kSquares]);
    at[kPartialOwn] = static_cast<float>(total[TailTotals::kOwn]);
    at[kPartialMass] = static_cast<float>(total[TailTotals::kMass]) / work.denominator;
    at[kPartialSpread] = static_cast<float>(total[TailTotals::kSpread]) / work.denominator;
    at[kPartialWeight] = weight;
    at[kPartialCos2] = cos2;
    at[kPartialPredicted] = work.predicted;
  }
}

// One look: draws what `step` says, estimates, and writes the records.
template <DType kType, int kHeads>
__device__ void Look(Team<kHeads>& team, RankStep& step) {
  const Randomness randomness{.refresh = team.p.promise.refresh,
                              .redraw = static_cast<uint32_t>(step.redraw),
                              .rank = static_cast<uint32_t>(step.rank)};
  if (step.scale > step.bound) {
    step.bound = step.scale * kMostGrowth;
    PredictAll(team, 1.f, step.bound, randomness);
  }
  const int64_t count = DrawTokens(team, step.previous, step.scale, randomness, step.count);
  if (count < 0) return ReadWhole<kType, kHeads>(team, step);  // the list has no room
  team.Sync();
  AttendList<kType, kHeads>(team, count, step.scale, nullptr);
  Combine(team, true, count);
  LoadHeads(team, false);
  SumTail<kType, kHeads, true>(team, count, step.scale);
  WriteRecords<kType, kHeads>(team, count, step.scale);
  step.count = count;
  __syncthreads();
  if (threadIdx.x == 0) team.shared.total[0] = team.shared.fetched;
  team.Add(1);
  step.fetched += static_cast<int64_t>(team.shared.total[0]);
}

template <DType kType, int kHeads>
__device__ void LookOnGroup(Team<kHeads>& team, RankStep& step) {
  const Promise& promise = team.p.promise;
  const bool whole = (step.flags & kPartialWhole) != 0;
  for (int i = threadIdx.x; i < team.heads(); i += kThreads) {
    team.shared.log_gain[i] = team.group.scratch.log_gain[i];
    team.shared.floor[i] = team.group.scratch.floor[i];
  }
  LoadHeads(team, true);
  if (step.next == NextLook::kFirst) {
    step.look = 1;
    if (promise.policy != Policy::kVerified || team.middle() == 0) {
      step.flags |= kPartialNothing;
      ReadWhole<kType, kHeads>(team, step);
    } else {
      const Plan plan = FinishPlan(team);
      if (!plan.feasible && promise.on_unverified == OnUnverified::kDense)
        return ReadWhole<kType, kHeads>(team, step);
      if (plan.noisy || !IsFinite(plan.expected)) step.flags |= kPartialUnsure;
      if (!plan.feasible) step.flags |= kPartialStuck;
      step.scale = plan.scale;
      step.bound = plan.bound;
      // What the plan expects is with its heads in shared memory: Combine takes it from there.
      Look<kType, kHeads>(team, step);
    }
  } else if (step.next == NextLook::kGrow || step.next == NextLook::kRedraw) {
    ++step.look;
    if (whole) return;
    if (step.next == NextLook::kRedraw) {
      FixDrawn(team, step.count);
      SumEstimates(team);
      step.bound = 0;  // the candidates had other random numbers
    }
    Look<kType, kHeads>(team, step);
  } else if (step.next == NextLook::kWhole && !whole) {
    ReadWhole<kType, kHeads>(team, step);
  }
}

// Thread block b is number b % size of the team of group b / size.
template <DType kType, int kHeads>
__global__ void __launch_bounds__(kThreads, 1)
    LookKernel(const __grid_constant__ StepParams p, int size) {
  extern __shared__ __align__(16) std::byte memory[];
  __shared__ TeamShared<kHeads> shared;
  const int rank = blockIdx.x % size, teams = gridDim.x / size;
  for (int g = blockIdx.x / size; g < NumGroups(p); g += teams) {
    const DeviceGroup& group = p.groups[g];
    if (group.tokens == 0) continue;
    RankStep step = *group.scratch.slice;
    if (step.fits == 0) continue;
    Team<kHeads> team{p, group, shared, memory, rank, size};
    __syncthreads();
    if (threadIdx.x == 0) shared.fetched = shared.count = 0;
    __syncthreads();
    LookOnGroup<kType, kHeads>(team, step);
    StampRecords(team, step);
    // Every block has read the step before the first one writes it.
    team.Sync();
    if (rank == 0 && threadIdx.x == 0) *group.scratch.slice = step;
  }
}

template <DType kType, int kHeads>
int LaunchLook(const StepParams& p, const AnswerShape& shape, Stream stream) {
  const auto kernel = LookKernel<kType, kHeads>;
  const int bytes = RowsBytes<kHeads>(p.storage.host.row, p.storage.tiles_in_flight);
  int device = 0, multiprocessors = 0, each = 0;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, bytes);
  if (error != cudaSuccess) return error;
  // As many teams as are resident: fewer than of the answer kernel, if this one takes more registers.
  const int teams = std::max(1, std::min(shape.teams, multiprocessors * each / shape.team));
  StepParams params = p;
  int team = shape.team;
  void* arguments[] = {&params, &team};
  return cudaLaunchCooperativeKernel(kernel, dim3(teams * team), dim3(kThreads), arguments, bytes,
                                     static_cast<cudaStream_t>(stream.handle));
}

template <DType kType>
int LookOf<kType>::Launch(const StepParams& p, const AnswerShape& shape, Stream stream) {
  return p.group_heads <= 4 ? LaunchLook<kType, 4>(p, shape, stream)
                            : LaunchLook<kType, 8>(p, shape, stream);
}

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_RANKS_CUH_
