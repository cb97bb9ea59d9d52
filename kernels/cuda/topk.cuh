// Answers of the baseline policies (METHOD.md, "Policies") by a team, as kernels/cpu/topk.cc: each
// head's best tokens by score, and with Policy::kTopKUniform a base sample of the rest, a budget
// from its moments, and the sample of that size, which holds the base sample. The rows that some
// head takes are a list; walks over such lists leave softmax states that are merged at the end.
#ifndef VATTN_KERNELS_CUDA_TOPK_CUH_
#define VATTN_KERNELS_CUDA_TOPK_CUH_

#include <cmath>

#include "kernels/cuda/attend.cuh"
#include "kernels/cuda/rank.cuh"
#include "kernels/cuda/report.cuh"

namespace vattn::cuda {

// The state of head h from part r: sinks and window first, then walk by walk the team's thread
// blocks.
template <int kHeads>
__device__ SoftmaxState StateOf(Team<kHeads>& team, int r, int h) {
  const GroupScratch& w = team.group.scratch;
  const int dim = team.p.storage.host.row.dim_v;
  const int64_t floats = StateFloats(dim);
  return {r < kFixedParts
              ? w.fixed + (static_cast<int64_t>(r) * team.heads() + h) * floats
              : w.state + (static_cast<int64_t>(r - kFixedParts) * team.heads() + h) * floats,
          dim};
}

// shared.head[h].shift = the largest logit of sinks, window and the first `walks` walks.
template <int kHeads>
__device__ void SetShifts(Team<kHeads>& team, int walks) {
  __syncthreads();
  for (int h = threadIdx.x; h < team.heads(); h += kThreads) {
    float most = -INFINITY;
    for (int r = 0; r < kFixedParts + walks * team.size; ++r)
      most = fmaxf(most, LoadL2(&StateOf(team, r, h).max()));
    team.shared.head[h].shift = most;
  }
  __syncthreads();
}

// States of walk number `walk` over this block's tiles of the list: each head takes the rows that
// masks [blocks][G][kMaskWords] mark for it, with weight 1. moments: also sums of e, e^2 and e^2
// |v|^2 over them to shared.total [3 G], e in the unit exp(shared.head[h].shift).
template <DType kType, int kHeads>
__device__ __noinline__ void AttendMasked(Team<kHeads>& team, int64_t count, const uint32_t* masks,
                                          int walk, bool moments) {
  const GroupScratch& w = team.group.scratch;
  const RowLayout& row = team.p.storage.host.row;
  const TileShape shape = OfRows(team.p.storage, MakeTileShape(row.row_bytes, count, team.size));
  const int heads = team.heads(), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first_block = FirstBlock(team.group);
  const auto place = [&](int k, int r) { return team.RowPlace(shape.rows, k, r); };
  for (int first = 0; first < heads; first += kHeads) {
    const float* queries = LoadQueries(team, first);
    const int now = min(kHeads, heads - first);
    // Finite where the window is, so that rows can be left out.
    if (threadIdx.x < kHeads) {
      team.shared.rows.most[threadIdx.x] = static_cast<int>(threadIdx.x) < now
                                               ? team.shared.head[first + threadIdx.x].shift
                                               : -INFINITY;
    }
    double e = 0, e2 = 0, ev2 = 0;  // of head `warp`, this lane's rows
    AttendTiles<kType, kHeads>(
        row, shape, team.p.storage.tiles_in_flight, team.Tiles(count, shape.rows), now, queries,
        team.memory, team.shared.rows,
        StateOf(team, kFixedParts + walk * team.size + team.rank, first).numerator,
        [&](int k, int r) -> uint64_t {
          return place(k, r) < count ? LoadL2(w.row + place(k, r)) : 0;
        },
        [&](int k) { return static_cast<int>(min(count - place(k, 0), int64_t{shape.rows})); },
        [&](int k, int r) {
          team.shared.slot[r] = first == 0 ? LoadL2(w.slot + place(k, r)) : -1;
          return make_float2(0, 1);
        },
        [&](int k, int r, int h, float& logit) {
          const uint32_t token = LoadL2(w.token + place(k, r)), at = token % kBlockTokens;
          const int64_t b = token / kBlockTokens - first_block;
          const uint32_t word = LoadL2(masks + (b * heads + first + h) * kMaskWords + at / kWarp);
          if ((word >> at % kWarp & 1) == 0) {
            logit = -INFINITY;
          } else if (moments) {
            const double x = exp(static_cast<double>(logit) -
                                 static_cast<double>(team.shared.head[first + h].shift));
            e += x;
            e2 += x * x;
            ev2 += x * x * static_cast<double>(team.shared.rows.norm2[r]);
          }
        },
        [&](int k, const std::byte* tile) {
          if (first == 0)
            KeepRows(team, shape, tile,
                     static_cast<int>(min(count - place(k, 0), int64_t{shape.rows})));
        });
    if (!moments || warp >= now) continue;
    e = WarpSum(e), e2 = WarpSum(e2), ev2 = WarpSum(ev2);
    if (lane > 0) continue;
    double* total = team.shared.total + 3 * (first + warp);
    total[0] = e, total[1] = e2, total[2] = ev2;
  }
  __syncthreads();
}

// Rows that head h samples, from the moments of its base sample, the team's sums in shared.total,
// and the states of `walks` walks, of which the last was over the base sample.
template <int kHeads>
__device__ int64_t FindBudget(Team<kHeads>& team, int h, int walks, int64_t residual,
                              int64_t base) {
  __shared__ double scratch[kWarps];
  const Promise& promise = team.p.promise;
  const int dim = team.p.storage.host.row.dim_v, tid = threadIdx.x;
  const int exact = kFixedParts + (walks - 1) * team.size, parts = exact + team.size;
  double* factor = reinterpret_cast<double*>(team.memory + sizeof(Ranks));  // [parts]
  __syncthreads();
  for (int r = tid; r < parts; r += kThreads) {
    const SoftmaxState at = StateOf(team, r, h);
    factor[r] = LoadL2(&at.denominator()) == 0
                    ? 0
                    : exp(static_cast<double>(LoadL2(&at.max())) -
                          static_cast<double>(team.shared.head[h].shift));
  }
  __syncthreads();
  const double n = static_cast<double>(residual), share = 1 / static_cast<double>(base);
  double mass = 0, mean2 = 0, norm2 = 0;
  for (int r = 0; r < exact; ++r)
    mass += factor[r] * static_cast<double>(LoadL2(&StateOf(team, r, h).denominator()));
  for (int j = tid; j < dim; j += kThreads) {
    double sum = 0, mean = 0;
    for (int r = 0; r < exact; ++r)
      sum += factor[r] * static_cast<double>(LoadL2(StateOf(team, r, h).numerator + j));
    for (int r = exact; r < parts; ++r)
      mean += factor[r] * static_cast<double>(LoadL2(StateOf(team, r, h).numerator + j));
    mean *= share;
    sum += n * mean;
    mean2 += mean * mean;
    norm2 += sum * sum;
  }
  mean2 = BlockSum(mean2, scratch), norm2 = BlockSum(norm2, scratch);
  const double* total = team.shared.total + 3 * h;
  const SampleMoments m{
      .e = total[0] * share, .e2 = total[1] * share, .ev_norm2 = mean2, .ev2 = total[2] * share};
  return SampleBudget(promise.target, promise.epsilon, promise.normal_quantile, residual, base, m,
                      mass + n * m.e, sqrt(norm2));
}

// The sample of every head: walks over the base sample and over what the budgets add to it. Heads
// that read their whole residual are done. Returns the number of rows of the last list.
template <DType kType, int kHeads>
__device__ int64_t AttendSample(Team<kHeads>& team, int64_t residual, int64_t base,
                                const uint32_t* top, int& walks) {
  const GroupScratch& w = team.group.scratch;
  const int heads = team.heads(), tid = threadIdx.x;
  Ranks& ranks = RanksOf(team);
  UniformKeys keys(team.group, heads, team.p.promise.refresh, top);
  const auto list = [&](bool more) {
    FindLast(team, keys);
    SelectBest(team, keys, w.drawn, more);
    const int64_t count = ListMasked(team, w.drawn, !more && top == nullptr);
    team.Sync();
    return count;
  };
  const auto weigh = [&] {  // the sample stands for the whole residual
    for (int h = tid; h < heads; h += kThreads) {
      StateOf(team, kFixedParts + (walks - 1) * team.size + team.rank, h).max() +=
          team.shared.log_weight[h];
    }
  };
  for (int h = tid; h < heads; h += kThreads) ranks.want[h] = static_cast<uint32_t>(base);
  __syncthreads();
  int64_t count = list(false);
  AttendMasked<kType, kHeads>(team, count, w.drawn, walks++, true);
  team.Add(3 * heads);
  Publish(team, count);
  for (int h = team.rank; h < heads; h += team.size) {
    const int64_t budget = FindBudget(team, h, walks, residual, base);
    if (tid == 0) ranks.want[h] = static_cast<uint32_t>(budget);
  }
  __syncthreads();
  for (int h = tid; h < heads; h += kThreads) {
    team.shared.total[h] = h % team.size == team.rank ? static_cast<double>(ranks.want[h]) : 0;
  }
  team.Add(heads);
  bool more = false;  // the same in the whole team
  for (int h = 0; h < heads; ++h) more = more || team.shared.total[h] > static_cast<double>(base);
  for (int h = tid; h < heads; h += kThreads) {
    const double drawn = team.shared.total[h];
    ranks.want[h] = static_cast<uint32_t>(drawn);
    team.shared.log_weight[h] = static_cast<float>(log(static_cast<double>(residual) / drawn));
    team.shared.done[h] = static_cast<int64_t>(drawn) == residual ? 1 : 0;
  }
  __syncthreads();
  weigh();
  team.StampTime(TimelinePoint::kJudged);
  if (!more) return 0;
  count = list(true);
  AttendMasked<kType, kHeads>(team, count, w.drawn, walks++, false);
  weigh();
  return count;
}

template <DType kType, int kHeads>
__device__ __noinline__ void AnswerTopK(Team<kHeads>& team) {
  const GroupScratch& w = team.group.scratch;
  const Promise& promise = team.p.promise;
  const int heads = team.heads(), tid = threadIdx.x;
  const int64_t n = team.middle(), k = ShareOf(promise.topk_share, n);
  int walks = 0;
  int64_t count = 0;
  team.StampTime(TimelinePoint::kScanned);
  SetShifts(team, 0);
  for (int h = tid; h < heads; h += kThreads) team.shared.done[h] = k == n ? 1 : 0;
  if (k > 0) {
    for (int h = tid; h < heads; h += kThreads) RanksOf(team).want[h] = static_cast<uint32_t>(k);
    __syncthreads();
    ScoreKeys keys(team.group, heads);
    FindLast(team, keys);
    team.StampTime(TimelinePoint::kPlanned);
    SelectBest(team, keys, w.top, false);
    count = ListMasked(team, w.top, true);
    team.Sync();
    team.StampTime(TimelinePoint::kDrawn);
    AttendMasked<kType, kHeads>(team, count, w.top, walks++, false);
    team.StampTime(TimelinePoint::kAttended);
  }
  if (promise.policy == Policy::kTopKUniform && k < n) {
    team.Sync();
    Publish(team, count);
    SetShifts(team, walks);
    count = AttendSample<kType, kHeads>(team, n - k, BaseSample(promise, n, k),
                                        k > 0 ? w.top : nullptr, walks);
  }
  Combine(team, true, count, walks);
  LoadHeads(team, false);
  if (tid == 0)
    team.shared.total[0] = team.shared.count, team.shared.total[1] = team.shared.fetched;
  team.Add(2);
  const int64_t selected = static_cast<int64_t>(team.shared.total[0]);
  WriteHeads(
      team, [](int) { return true; },
      [&](int h) {
        const Verdict verdict = team.shared.done[h] > 0 ? Verdict::kExact : Verdict::kBestEffort;
        return make_float2(static_cast<float>(verdict), 0);
      });
  team.StampTime(TimelinePoint::kDone);
  // A row that is in two lists and has no hot slot is read twice, and counts once.
  const int64_t fetched = Min(selected, static_cast<int64_t>(team.shared.total[1]));
  WriteReport(team, {.selected = selected, .fetched = fetched, .looks = 1});
}

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_TOPK_CUH_
