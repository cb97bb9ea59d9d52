// A slice of a context: what it expects, and what the records of all ranks lead to (kernels/merge.h). A
// thread block works on a group, a warp on a head at a time. The looks themselves are in ranks.cuh.
#include "kernels/cuda/merge.cuh"
#include "kernels/cuda/plan.cuh"
#include "kernels/cuda/stages.h"

namespace vattn::cuda {
namespace {

__device__ bool Samples(const StepParams& p, const DeviceGroup& group) {
  return p.promise.policy == Policy::kVerified && group.middle_end > group.middle_begin;
}

__device__ int64_t RecordPlace(const StepParams& p, const DeviceGroup& group, int head) {
  return HeadPlace(p, group, head) * PartialFloats(p.storage.host.row.dim_v);
}

// Mass of the middle without the largest token of each block, by a warp.
__device__ float LightMass(const DeviceGroup& group, int heads, int h, float shift) {
  const GroupScratch& w = group.scratch;
  float sum = 0;
  for (int64_t b = threadIdx.x % kWarp; b < NumBlocks(group); b += kWarp) {
    const int64_t at = b * heads + h;
    sum += fmaxf(w.mass[at] - 1, 0.f) * expf(w.shift[at] - shift);
  }
  return WarpSum(sum);
}

// head.shift, denominator and fixed_norm2 of the sinks and the window alone.
__device__ void SumFixed(const DeviceGroup& group, int heads, int dim, int h, HeadWork& work) {
  const auto fixed = [&](int part) {
    return ConstSoftmaxState(group.scratch.fixed + (int64_t{part} * heads + h) * StateFloats(dim),
                             dim);
  };
  float most = -INFINITY;
  for (int part = 0; part < kFixedParts; ++part) most = fmaxf(most, fixed(part).max());
  work.shift = most;
  for (int part = 0; part < kFixedParts; ++part) {
    const ConstSoftmaxState at = fixed(part);
    if (!(at.denominator() > 0)) continue;
    work.denominator += at.denominator() * expf(at.max() - most);
    work.fixed_norm2 += at.value_norm2() * expf(at.max() - most);
  }
}

template <int kHeads>
__global__ void __launch_bounds__(kThreads, 1)
    ForecastKernel(const __grid_constant__ StepParams p) {
  __shared__ TeamShared<kHeads> shared;
  if (static_cast<int>(blockIdx.x) >= NumGroups(p)) return;
  const DeviceGroup& group = p.groups[blockIdx.x];
  if (group.tokens == 0) return;
  Team<kHeads> team{p, group, shared, nullptr, 0, 1};
  const int heads = p.group_heads, tid = threadIdx.x, dim = p.storage.host.row.dim_v;
  for (int h = tid; h < heads; h += kThreads) shared.head[h] = {};
  __syncthreads();
  if (Samples(p, group)) {
    SumEstimates(team);
  } else {
    for (int h = tid; h < heads; h += kThreads) SumFixed(group, heads, dim, h, shared.head[h]);
  }
  __syncthreads();
  const float unit = ValueUnit(group.index);
  const int warp = tid / kWarp, lane = tid % kWarp;
  for (int h = warp; h < heads; h += kWarps) {
    const HeadWork& work = shared.head[h];
    float* at = p.slice.partial + RecordPlace(p, group, h);
    const float light = Samples(p, group) ? LightMass(group, heads, h, work.shift) : 0;
    for (int j = lane; j < PartialFloats(dim); j += kWarp) at[j] = 0;
    __syncwarp();
    if (lane > 0) continue;
    group.scratch.head[h] = work;
    const HeadState& state = group.state[h];
    at[kPartialIsVersion] = kPartialVersion;
    at[kPartialRank] = static_cast<float>(p.slice.rank);
    at[kPartialTokens] = static_cast<float>(team.middle());
    at[kPartialLse] = logf(work.denominator) + work.shift;
    at[kPartialNorm2] = (work.fixed_norm2 + work.mass * unit) / work.denominator;
    at[kPartialMiddle] = work.mass / work.denominator;
    at[kPartialLight] = light / work.denominator;
    at[kPartialMemory] = state.started == 0 ? -1 : state.cos2;
  }
  if (tid == 0) {
    RankStep step;
    step.rank = p.slice.rank, step.ranks = p.slice.ranks;
    *group.scratch.slice = step;
  }
}

// As StartLooks of kernels/cpu/ranks.cc, up to the plan.
__device__ void TakeForecasts(const StepParams& p, const DeviceGroup& group) {
  for (int h = threadIdx.x; h < p.group_heads; h += kThreads) {
    const float* records = p.slice.gathered + RecordPlace(p, group, h);
    const int64_t stride = p.slice.gathered_stride;
    const float others = OthersLse(records, stride, p.slice.ranks, p.slice.rank);
    group.scratch.outlook[h] = MergeOutlook(records, stride, p.slice.ranks, p.slice.rank);
    group.scratch.log_others[h] = others;
  }
}

struct Judged {
  float lse, growth;
  Verdict verdict;
};

// As JudgeLooks of kernels/cpu/ranks.cc.
__device__ void JudgeLooks(const StepParams& p, const DeviceGroup& group, RankStep& step,
                           Judged* judged) {
  const GroupScratch& w = group.scratch;
  const int heads = p.group_heads, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp,
            dim = p.storage.host.row.dim_v;
  __shared__ JointSums joint;  // of the last head that is judged: what the group has in common
  const NextLook before = step.next;
  const bool looked = before != NextLook::kWhole;
  int last = -1;
  for (int h = 0; h < heads; ++h) last = w.head[h].settled != 0 ? last : h;
  __syncthreads();
  for (int h = warp; h < heads; h += kWarps) {
    HeadWork work = w.head[h];
    if (work.settled != 0) continue;
    const float* records = p.slice.gathered + RecordPlace(p, group, h);
    const int64_t stride = p.slice.gathered_stride;
    JointSums sums;
    const float norm2 = MergeRecords(records, stride, p.slice.ranks, dim,
                                     w.output + static_cast<int64_t>(h) * dim, sums);
    __syncwarp();
    if (lane > 0) continue;
    Judged mine{.lse = sums.lse, .growth = kLeastGrowth};
    if (looked && !sums.all_whole) {
      HeadState state = group.state[h];
      JudgeJoint(p.promise, step.look, sums, records[kPartialMemory], norm2, state, work);
      if (step.look == 1) LearnHead(p.promise, group.index, work, state);
      mine.growth = JointGrowth(p.promise, step.look + 1, sums, work);
      group.state[h] = state;
    }
    work.log_others = OthersLse(records, stride, p.slice.ranks, p.slice.rank);
    mine.verdict = JointVerdict(sums, work.bound <= p.promise.epsilon);
    judged[h] = mine;
    w.head[h] = work;
    if (h == last) joint = sums;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    bool passed = true;
    float growth = kLeastGrowth;
    for (int h = 0; h < heads; ++h) {
      if (w.head[h].settled != 0) continue;
      passed = passed && judged[h].verdict != Verdict::kBestEffort;
      growth = Max(growth, judged[h].growth);
    }
    DecideLook(p.promise, joint, passed, growth, step);
  }
  __syncthreads();
  const bool ends = step.next == NextLook::kDone;
  if (!ends && step.next != NextLook::kWhole) return;
  for (int h = warp; h < heads; h += kWarps) {
    const HeadWork work = w.head[h];
    if (looked && !joint.all_whole && lane == 0) {
      HeadState state = group.state[h];
      CloseHead(!joint.unsure, work, state);
      group.state[h] = state;
    }
    if (work.settled != 0 || (!ends && judged[h].verdict == Verdict::kBestEffort)) continue;
    const Verdict verdict = judged[h].verdict;
    const bool whole = verdict == Verdict::kExact || verdict == Verdict::kDense;
    const int64_t place = HeadPlace(p, group, h);
    for (int j = lane; j < dim; j += kWarp) {
      StoreOutput(p.call.out, place * dim + j, p.call.out_dtype,
                  w.output[static_cast<int64_t>(h) * dim + j]);
    }
    __syncwarp();
    if (lane > 0) continue;
    if (p.call.lse != nullptr) p.call.lse[place] = judged[h].lse;
    if (p.call.verdict != nullptr) p.call.verdict[place] = static_cast<int32_t>(verdict);
    if (p.call.error != nullptr)
      p.call.error[place] = whole ? 0 : joint.unsure ? INFINITY : work.bound;
    w.head[h].settled = 1;
    atomicAdd(&p.counters->verdicts[static_cast<int>(verdict)], 1ull);
  }
}

__device__ void Report(const StepParams& p, const DeviceGroup& group, const RankStep& step) {
  const CallArrays& call = p.call;
  const int64_t at = int64_t{group.slot} * p.kv_heads + group.kv_head,
                middle = group.middle_end - group.middle_begin;
  if (call.selected != nullptr) call.selected[at] = static_cast<int32_t>(step.count);
  if (call.fetched != nullptr) call.fetched[at] = static_cast<int32_t>(step.fetched);
  if (call.looks != nullptr) call.looks[at] = step.look;
  if (call.middle != nullptr) call.middle[at] = middle;
  DeviceCounters& c = *p.counters;
  atomicAdd(&c.middle, static_cast<unsigned long long>(middle));
  atomicAdd(&c.selected, static_cast<unsigned long long>(step.count));
  atomicAdd(&c.fetched, static_cast<unsigned long long>(step.fetched));
  atomicAdd(&c.looks, static_cast<unsigned long long>(step.look));
}

__global__ void __launch_bounds__(kThreads, 1)
    DecideKernel(const __grid_constant__ StepParams p, bool first) {
  __shared__ RankStep step;
  __shared__ Judged judged[kMaxDeviceGroup];
  if (static_cast<int>(blockIdx.x) >= NumGroups(p)) return;
  const DeviceGroup& group = p.groups[blockIdx.x];
  if (group.tokens == 0) return;
  if (threadIdx.x == 0) {
    step = *group.scratch.slice;
    *group.scratch.barrier = 0;
  }
  __syncthreads();
  bool fit = first || step.round > 0;
  for (int i = threadIdx.x; i < p.group_heads * p.slice.ranks; i += kThreads) {
    const int r = i / p.group_heads;
    fit = fit && Fits(p.slice.gathered + r * p.slice.gathered_stride +
                          RecordPlace(p, group, i % p.group_heads),
                      r, static_cast<float>(step.round));
  }
  fit = __syncthreads_and(fit);
  if (fit && first) {
    TakeForecasts(p, group);
  } else if (fit && step.next != NextLook::kDone) {
    JudgeLooks(p, group, step, judged);
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  // A group that does not fit makes the number negative, whatever the others add.
  if (p.slice.again != nullptr && (!fit || step.next != NextLook::kDone))
    atomicAdd(p.slice.again, fit ? 1 : -(1 << 24));
  if (fit && step.next == NextLook::kDone && group.scratch.slice->next != NextLook::kDone)
    Report(p, group, step);
  step.fits = fit ? 1 : 0;
  if (fit) ++step.round;
  *group.scratch.slice = step;
}

}  // namespace

int WriteForecasts(const StepParams& p, Stream stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream.handle);
  if (p.group_heads <= 4) {
    ForecastKernel<4><<<p.most_groups, kThreads, 0, s>>>(p);  // on the caller's stream
  } else {
    ForecastKernel<8><<<p.most_groups, kThreads, 0, s>>>(p);  // on the caller's stream
  }
  return cudaGetLastError();
}

int DecideLooks(const StepParams& p, bool first, Stream stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream.handle);
  if (p.slice.again != nullptr) {
    const cudaError_t error = cudaMemsetAsync(p.slice.again, 0, sizeof(*p.slice.again), s);
    if (error != cudaSuccess) return error;
  }
  DecideKernel<<<p.most_groups, kThreads, 0, s>>>(p, first);  // on the caller's stream
  return cudaGetLastError();
}

}  // namespace vattn::cuda
