// Last stage of a step: a team of thread blocks answers each group. Plan, draws and their rows
// (read from the hot set or straight from the host pool), certificate, further looks, output. The
// order of work is that of kernels/cpu/decode.cc.
#ifndef VATTN_KERNELS_CUDA_ANSWER_CUH_
#define VATTN_KERNELS_CUDA_ANSWER_CUH_

#include <algorithm>

#include "kernels/cuda/attend.cuh"
#include "kernels/cuda/plan.cuh"
#include "kernels/cuda/report.cuh"
#include "kernels/cuda/stages.h"
#include "kernels/cuda/topk.cuh"
#include "kernels/cuda/verify.cuh"

namespace vattn::cuda {

// Misses of all draws of the team.
template <int kHeads>
__device__ int64_t SumFetched(Team<kHeads>& team) {
  __syncthreads();
  if (threadIdx.x == 0) team.shared.total[0] = team.shared.fetched;
  team.Add(1);
  return static_cast<int64_t>(team.shared.total[0]);
}

template <DType kType, int kHeads>
__device__ void AnswerDense(Team<kHeads>& team, Verdict verdict, bool noisy = false) {
  AttendAll<kType, kHeads>(team);
  Combine(team, false, 0);
  LoadHeads(team, false);
  WriteHeads(
      team, [](int) { return true; },
      [&](int) { return make_float2(static_cast<float>(verdict), 0); });
  WriteReport(team, {.selected = team.middle(), .fetched = team.middle(), .noisy = noisy});
}

// The first look's draw for the caller: sinks, draw and window with their log-weights.
template <int kHeads>
__device__ void AnswerSelect(Team<kHeads>& team, int64_t drawn, float scale) {
  const GroupScratch& w = team.group.scratch;
  const SelectionArrays& out = team.p.selection;
  const int64_t at = int64_t{team.group.slot} * team.p.kv_heads + team.group.kv_head;
  const int64_t before = team.group.middle_begin, after = team.group.tokens - team.group.middle_end;
  const int64_t need = before + drawn + after;
  team.Sync();
  if (team.rank == 0 && threadIdx.x == 0) out.counts[at] = static_cast<int32_t>(need);
  if (need > out.capacity) return;
  for (int64_t i = int64_t{team.rank} * kThreads + threadIdx.x; i < need;
       i += int64_t{team.size} * kThreads) {
    int64_t token = i;
    float weight = 0;
    if (i >= before + drawn) {
      token = team.group.middle_end + (i - before - drawn);
    } else if (i >= before) {
      token = LoadL2(w.token + i - before);
      weight = -logf(Min(1.f, scale * LoadL2(w.weight + i - before)));
    }
    out.tokens[at * out.capacity + i] = static_cast<int32_t>(token);
    if (out.log_weights != nullptr) out.log_weights[at * out.capacity + i] = weight;
  }
}

// Attention over the caller's tokens when the list has no room for them. Rows are read past the hot
// set.
template <DType kType, int kHeads>
__device__ void AnswerLong(Team<kHeads>& team, const int32_t* tokens, int64_t count,
                           const float* log_weights) {
  const RowLayout& row = team.p.storage.host.row;
  const TileShape shape = OfRows(team.p.storage, MakeTileShape(row.row_bytes));
  const int64_t most = team.group.tokens;
  const int tiles = team.Tiles(count, shape.rows);
  const auto place = [&](int k, int r) { return team.RowPlace(shape.rows, k, r); };
  for (int first = 0; first < team.heads(); first += kHeads) {
    const float* queries = LoadQueries(team, first);
    if (threadIdx.x < kHeads) team.shared.rows.most[threadIdx.x] = LeastLogit(team.p);
    AttendTiles<kType, kHeads>(
        row, shape, team.p.storage.tiles_in_flight, tiles, min(kHeads, team.heads() - first),
        queries, team.memory, team.shared.rows,
        team.group.scratch.state +
            (static_cast<int64_t>(team.rank) * team.heads() + first) * StateFloats(row.dim_v),
        [&](int k, int r) -> uint64_t {
          const int64_t i = place(k, r);
          if (i >= count) return 0;
          const int64_t token = tokens[i] >= 0 && tokens[i] < most ? tokens[i] : 0;
          return RowAddress(team.p.storage, team.group, token);
        },
        [&](int k) { return static_cast<int>(min(count - place(k, 0), int64_t{shape.rows})); },
        [&](int k, int r) {
          // A token out of range makes the answer NaN.
          const int32_t token = tokens[place(k, r)];
          const float factor = token >= 0 && token < most ? 1 : NAN;
          return make_float2(log_weights == nullptr ? 0 : log_weights[place(k, r)], factor);
        },
        [&](int k, int r, int h, float& logit) {
          const int32_t token = tokens[place(k, r)];
          if (team.p.num_tokens > 1 && token >= VisibleEnd(team.p, team.group, first + h))
            logit = -INFINITY;
        });
  }
  Combine(team, false, 0);
  LoadHeads(team, false);
  WriteHeads(
      team, [](int) { return true; },
      [](int) { return make_float2(static_cast<float>(Verdict::kBestEffort), 0); });
  int middle = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    middle += tokens[i] >= team.group.middle_begin && tokens[i] < team.group.middle_end;
  }
  if (middle > 0) atomicAdd(&team.shared.count, middle);
  __syncthreads();
  WriteReport(team, {.selected = team.shared.count, .fetched = team.shared.count});
}

// Attention over the caller's tokens.
template <DType kType, int kHeads>
__device__ void AnswerSelected(Team<kHeads>& team) {
  const GroupScratch& w = team.group.scratch;
  const SelectionArrays& in = team.p.selection;
  const int64_t at = int64_t{team.group.slot} * team.p.kv_heads + team.group.kv_head;
  const int64_t count = min(static_cast<int64_t>(in.counts[at]), in.capacity);
  if (count > w.capacity)
    return AnswerLong<kType, kHeads>(
        team, in.tokens + at * in.capacity, count,
        in.log_weights == nullptr ? nullptr : in.log_weights + at * in.capacity);
  const unsigned long long call = *team.p.hot.call;
  const int lane = threadIdx.x % kWarp;
  bool wrong = false;
  for (int64_t i = int64_t{team.rank} * kThreads + threadIdx.x; i - lane < count;
       i += int64_t{team.size} * kThreads) {
    const uint32_t token = i < count ? static_cast<uint32_t>(in.tokens[at * in.capacity + i]) : 0;
    const bool there = token < team.group.tokens;
    const bool middle =
        i < count && token >= team.group.middle_begin && token < team.group.middle_end;
    wrong = wrong || !there;
    const int misses = Resolve(team.p, team.group, call, middle, token, i);
    if (i < count) {
      w.token[i] = token;
      if (!middle) {
        w.slot[i] = -1;
        w.row[i] = RowAddress(team.p.storage, team.group, there ? token : 0);
      }
    }
    const int of_middle = __popc(__ballot_sync(kAllLanes, middle));
    if (lane == 0) {
      atomicAdd(&team.shared.fetched, misses);
      atomicAdd(&team.shared.count, of_middle);
    }
  }
  wrong = __syncthreads_or(wrong);
  if (threadIdx.x == 0) {
    team.shared.total[0] = team.shared.fetched, team.shared.total[1] = team.shared.count;
    team.shared.total[2] = wrong;
  }
  team.Add(3);
  const Report report{.selected = static_cast<int64_t>(team.shared.total[1]),
                      .fetched = static_cast<int64_t>(team.shared.total[0])};
  if (in.log_weights == nullptr) {  // weights are 1
    for (int64_t i = int64_t{team.rank} * kThreads + threadIdx.x; i < count;
         i += int64_t{team.size} * kThreads) {
      w.weight[i] = INFINITY;
    }
    for (int h = threadIdx.x; h < team.heads(); h += kThreads)
      team.shared.head[h].shift = LeastLogit(team.p);
  }
  team.Sync();
  AttendList<kType, kHeads>(
      team, count, 1.f, in.log_weights == nullptr ? nullptr : in.log_weights + at * in.capacity);
  wrong = team.shared.total[2] > 0;
  Combine(team, false, count);
  LoadHeads(team, false);
  if (wrong) {
    // A token out of range cannot be reported from here: NaN says that the answer is none.
    const int dim = team.p.storage.host.row.dim_v;
    for (int h = team.rank; h < team.heads(); h += team.size) {
      for (int j = threadIdx.x; j < dim; j += kThreads)
        w.output[static_cast<int64_t>(h) * dim + j] = NAN;
    }
    __syncthreads();
  }
  WriteHeads(
      team, [](int) { return true; },
      [](int) { return make_float2(static_cast<float>(Verdict::kBestEffort), 0); });
  WriteReport(team, report);
}

// The policy kVerified, step by step as DecodeVerified of kernels/cpu/decode.cc. It is kept in one piece
// so that the two can be read side by side.
template <DType kType, int kHeads>
__device__ void AnswerVerified(Team<kHeads>& team) {
  const Promise& promise = team.p.promise;
  const int heads = team.heads();
  for (int i = threadIdx.x; i < heads; i += kThreads) {
    team.shared.log_gain[i] = team.group.scratch.log_gain[i];
    team.shared.floor[i] = team.group.scratch.floor[i];
  }
  LoadHeads(team, true);
  Plan plan = FinishPlan(team);
  if (plan.noisy && ReadsWhole(team))
    return AnswerDense<kType, kHeads>(team, Verdict::kDense, true);
  // With NaN in a head's query or in codes nothing is drawn.
  const bool sampled = IsFinite(plan.expected);
  const bool coded = team.p.storage.host.value_bits > 0;
  if (team.p.task == Task::kSelect) {
    const int64_t drawn =
        Max(DrawTokens(team, 0, plan.scale, {.refresh = promise.refresh}, 0), int64_t{0});
    if (team.rank == 0) {
      for (int i = threadIdx.x; i < heads; i += kThreads)
        team.group.state[i] = team.shared.state[i];
    }
    AnswerSelect(team, drawn, plan.scale);
    const int64_t fetched = SumFetched(team);
    WriteReport(team, {.selected = drawn, .fetched = fetched, .looks = 1});
    return;
  }
  Randomness randomness{.refresh = promise.refresh};
  Report report{.noisy = plan.noisy};
  float previous = 0;
  int64_t count = 0;
  for (int look = 1; look <= promise.max_looks; ++look) {
    if (plan.scale > plan.bound) {
      plan.bound = plan.scale * kMostGrowth;
      PredictAll(team, 1.f, plan.bound, randomness);
    }
    const int64_t now = DrawTokens(team, previous, plan.scale, randomness, count);
    if (now < 0) break;  // no room: the heads that have not passed stay so
    const int64_t before = count;
    count = now;
    team.Sync();
    if (look == 1) team.StampTime(TimelinePoint::kDrawn);
    AttendList<kType, kHeads>(team, count, plan.scale, nullptr);
    if (coded) CorrectList(team, before, count, plan.scale);
    Combine(team, true, count);
    if (look == 1) team.StampTime(TimelinePoint::kAttended);
    LoadHeads(team, look > 1);
    SumTail<kType, kHeads>(team, count, plan.scale);
    JudgeHeads<kType, kHeads>(team, count, look);
    team.Sync();
    LoadHeads(team, true);
    if (look == 1) team.StampTime(TimelinePoint::kJudged);
    report.looks = look;
    report.fetched = static_cast<int64_t>(TailTotalsOf(team).Fetched(coded));
    bool passed = true;
    for (int h = 0; h < heads; ++h) passed = passed && team.shared.head[h].bound <= promise.epsilon;
    if (passed || look == promise.max_looks || !plan.feasible) break;
    GrowHeads(team, count, plan.scale, look + 1);
    team.Sync();
    float growth = 1;
    for (int h = 0; h < heads; ++h) growth = Max(growth, LoadL2(team.group.scratch.growth + h));
    const int64_t tail = static_cast<int64_t>(TailTotalsOf(team).Tail());
    if (GrownCount(count, tail, growth) >
        promise.max_selected_share * static_cast<float>(team.middle()))
      break;
    if (growth <= kMostGrowth) {
      previous = plan.scale;
      plan.scale *= growth;
    } else {
      // A heavy token that the index held for light was drawn by luck: what is known is taken as
      // exact, and the others are drawn anew (kernels/cpu/decode.cc).
      FixDrawn(team, count);
      SumEstimates(team);
      ++randomness.redraw;
      if (randomness.redraw > 1) plan.scale *= kMostGrowth;
      previous = 0;
      plan.bound = 0;  // the candidates had other random numbers
    }
  }
  report.selected = count;
  for (int h = threadIdx.x; h < heads; h += kThreads) {
    if (report.looks == 0) team.shared.head[h].bound = INFINITY;
    CloseHead(sampled && report.looks > 0, team.shared.head[h], team.shared.state[h]);
    if (team.rank == 0) team.group.state[h] = team.shared.state[h];
  }
  __syncthreads();
  const bool dense = promise.on_unverified == OnUnverified::kDense;
  const bool judged = sampled && !plan.noisy;
  const auto passed = [&](int h) { return judged && team.shared.head[h].bound <= promise.epsilon; };
  bool all = true;
  for (int h = 0; h < heads; ++h) all = all && passed(h);
  if (report.looks == 0 && !dense) {  // nothing was drawn: sinks, window and value codes alone
    AttendList<kType, kHeads>(team, 0, plan.scale, nullptr);
    if (coded) CorrectList(team, 0, 0, plan.scale);
    Combine(team, true, 0);
    LoadHeads(team, false);
  }
  WriteHeads(
      team, [&](int h) { return passed(h) || !dense; },
      [&](int h) {
        return make_float2(
            static_cast<float>(passed(h) ? Verdict::kVerified : Verdict::kBestEffort),
            judged ? team.shared.head[h].bound : INFINITY);
      });
  if (!all && dense) {
    // Verdicts are kept from what the exact answer is about to overwrite.
    for (int h = threadIdx.x; h < heads; h += kThreads) team.shared.done[h] = passed(h) ? 1 : 0;
    AttendAll<kType, kHeads>(team);
    Combine(team, false, 0);
    LoadHeads(team, false);
    WriteHeads(
        team, [&](int h) { return team.shared.done[h] == 0; },
        [](int) { return make_float2(static_cast<float>(Verdict::kDense), 0); });
    report.selected = report.fetched = team.middle();
  }
  team.StampTime(TimelinePoint::kDone);
  WriteReport(team, report);
}

template <DType kType, int kHeads>
__device__ void AnswerGroup(const StepParams& p, const DeviceGroup& group,
                            TeamShared<kHeads>& shared, std::byte* memory, int rank, int size) {
  Team<kHeads> team{p, group, shared, memory, rank, size};
  __syncthreads();
  if (threadIdx.x == 0) shared.fetched = shared.count = 0;
  for (int i = threadIdx.x; i < p.group_heads; i += kThreads)
    shared.head[i] = HeadWork{.shift = -INFINITY};
  // On its way until a draw waits for its first rows.
  for (int i = threadIdx.x; p.promise.policy == Policy::kVerified && i <= kQuantileBins;
       i += kThreads)
    __pipeline_memcpy_async(shared.quantile[0] + i, p.promise.quantile[0] + i, sizeof(float));
  __pipeline_commit();
  __syncthreads();
  if (p.task == Task::kAttendSelected) {
    AnswerSelected<kType, kHeads>(team);
  } else if (team.middle() == 0 || p.promise.policy == Policy::kDense) {
    if (p.task == Task::kSelect) {
      AnswerSelect(team, 0, 1.f);
      WriteReport(team, {});
    } else {
      AnswerDense<kType, kHeads>(team, Verdict::kExact);
    }
  } else if (p.promise.policy == Policy::kVerified) {
    AnswerVerified<kType, kHeads>(team);
  } else {
    AnswerTopK<kType, kHeads>(team);
  }
  if (group.carried == nullptr || rank > 0) return;
  __syncthreads();
  const int heads = p.group_heads / p.num_tokens;
  for (int i = threadIdx.x; i < heads; i += kThreads)
    group.carried[i] = group.state[(group.num_queries - 1) * heads + i];
}

// Thread block b is number b % size of the team of group b / size.
template <DType kType, int kHeads>
__global__ void __launch_bounds__(kThreads, 1)
    AnswerKernel(const __grid_constant__ StepParams p, int size) {
  extern __shared__ __align__(16) std::byte memory[];
  __shared__ TeamShared<kHeads> shared;
  const int rank = blockIdx.x % size, teams = gridDim.x / size;
  for (int g = blockIdx.x / size; g < NumGroups(p); g += teams) {
    if (p.groups[g].tokens > 0)
      AnswerGroup<kType, kHeads>(p, p.groups[g], shared, memory, rank, size);
  }
}

template <DType kType, int kHeads>
int LaunchAnswer(const StepParams& p, const AnswerShape& shape, Stream stream) {
  const auto kernel = AnswerKernel<kType, kHeads>;
  const int bytes = RowsBytes<kHeads>(p.storage.host.row, p.storage.tiles_in_flight);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  StepParams params = p;
  int team = shape.team;
  void* arguments[] = {&params, &team};
  return cudaLaunchCooperativeKernel(kernel, dim3(shape.teams * shape.team), dim3(kThreads),
                                     arguments, bytes, static_cast<cudaStream_t>(stream.handle));
}

template <DType kType, int kHeads>
AnswerShape ShapeOf(const DeviceStorage& storage, int groups) {
  const auto kernel = AnswerKernel<kType, kHeads>;
  const int bytes = RowsBytes<kHeads>(storage.host.row, storage.tiles_in_flight);
  int device = 0, multiprocessors = 0, each = 0;
  AnswerShape shape;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) ==
          cudaSuccess &&
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) ==
          cudaSuccess &&
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, bytes) ==
          cudaSuccess &&
      each > 0) {
    const int resident = multiprocessors * each;
    shape.team = std::clamp(resident / groups, 1, kMostTeam);
    shape.teams = std::min(groups, resident / shape.team);
  }
  cudaGetLastError();
  return shape;
}

template <DType kType>
int AnswerOf<kType>::Launch(const StepParams& p, const AnswerShape& shape, Stream stream) {
  return p.group_heads <= 4 ? LaunchAnswer<kType, 4>(p, shape, stream)
                            : LaunchAnswer<kType, 8>(p, shape, stream);
}

template <DType kType>
AnswerShape AnswerOf<kType>::Shape(const DeviceStorage& storage, int group_heads, int groups) {
  return group_heads <= 4 ? ShapeOf<kType, 4>(storage, groups) : ShapeOf<kType, 8>(storage, groups);
}

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_ANSWER_CUH_
