// The certificate by a team (METHOD.md, "Certificate"), as kernels/cpu/verify.cc: terms of the tail
// by all thread blocks, verdict and growth of head h by the block of rank h modulo the team's size.
#ifndef VATTN_KERNELS_CUDA_VERIFY_CUH_
#define VATTN_KERNELS_CUDA_VERIFY_CUH_

#include "kernels/cuda/team.cuh"
#include "kernels/cuda/values.cuh"

namespace vattn::cuda {

// Sum over the thread block, the same in all threads. scratch [kWarps].
template <class T>
__device__ T BlockSum(T x, T* scratch) {
  x = WarpSum(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  T sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += scratch[i];
  return sum;
}

// Inclusive sums over the threads of the block. scratch [kWarps].
inline __device__ double BlockScan(double x, double* scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int o = 1; o < kWarp; o *= 2) {
    const double other = __shfl_up_sync(kAllLanes, x, o);
    if (lane >= o) x += other;
  }
  __syncthreads();
  if (lane == kWarp - 1) scratch[warp] = x;
  __syncthreads();
  for (int i = 0; i < warp; ++i) x += scratch[i];
  return x;
}

// The sums of the certificate in TeamShared::total, by name: five of each head, how many tokens the
// tail has, with value codes two more of each head, and the rows of all draws that were not in the
// hot set. A thread's own sums, before they are added, are in the order of Place.
struct TailTotals {
  enum Place { kVariance, kSquares, kOwn, kMass, kSpread, kTail, kRelative, kEstimate };
  static constexpr int kEach = 5, kEachCoded = 2;

  double* total;
  int heads;

  __device__ double* Head(int h) const { return total + kEach * h; }  // [kVariance .. kSpread]
  __device__ double& Tail() const { return total[kEach * heads]; }
  __device__ double* Coded(int h) const {  // relative, estimate
    return total + kEach * heads + 1 + kEachCoded * h;
  }
  // Rows of all draws so far that were not in the hot set.
  __device__ double& Fetched(bool more) const {
    return total[(more ? kEach + kEachCoded : kEach) * heads + 1];
  }
  __device__ int Count(bool more) const { return (more ? kEach + kEachCoded : kEach) * heads + 2; }
};
template <int kHeads>
__device__ TailTotals TailTotalsOf(Team<kHeads>& team) {
  return {team.shared.total, team.heads()};
}

// Sum c v over this thread block's rows of the tail; without kMoments nothing.
template <DType kType, int kHeads, bool kMoments>
struct TailMoment {
  __device__ explicit TailMoment(int) {}
  __device__ void Add(Team<kHeads>&, const TileShape&, const std::byte*, int, int, int, int,
                      float) {}
  __device__ void Finish(Team<kHeads>&, int, int) {}
};
template <DType kType, int kHeads>
struct TailMoment<kType, kHeads, true> {
  ValueSum<kType, kHeads> values;

  __device__ explicit TailMoment(int dim) : values(dim) {}

  // Row r of tile k counts with `weight` for head h; all threads call it. Rows that were not fetched
  // hold anything.
  __device__ void Add(Team<kHeads>& team, const TileShape& shape, const std::byte* tile, int k,
                      int count, int h, int r, float weight) {
    RowsShared<kHeads>& rows = team.shared.rows;
    if (h < kHeads && r < count) rows.p[r * kHeads + h] = weight;
    __syncthreads();
    if (values.group >= values.groups) return;
    const uint64_t* address = rows.address[k % team.p.storage.tiles_in_flight];
    const std::byte* at = tile + values.pair * 2 * Element<kType>::kBytes;
    for (int i = values.group; i < count; i += values.groups) {
      if (address[i] == 0) continue;
      const float2 v = Element<kType>::Pair(at + i * shape.pitch);
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        values.sum[head][0] = fmaf(rows.p[i * kHeads + head], v.x, values.sum[head][0]);
        values.sum[head][1] = fmaf(rows.p[i * kHeads + head], v.y, values.sum[head][1]);
      }
    }
  }
  __device__ void Finish(Team<kHeads>& team, int first, int heads) {
    const int dim = 2 * values.pairs;
    float* out =
        team.group.scratch.moment + (static_cast<int64_t>(team.rank) * team.heads() + first) * dim;
    values.Finish(reinterpret_cast<float*>(team.memory), heads,
                  [&](int h, int j, float x) { out[h * dim + j] = x; });
  }
};

// Residuals and terms of the list for outputs in scratch.output, and their sums over the tail of every
// head as TailTotals. With kMoments, for a slice of a context (kernels/merge.h) and without value codes,
// also sum c v of this thread block to scratch.moment, and sum c in place of `relative`. The function
// is long because it is one walk over the rows, whose sums stay in
// the registers of a thread until the end.
template <DType kType, int kHeads, bool kMoments = false>
__device__ __noinline__ void SumTail(Team<kHeads>& team, int64_t count, float scale) {
  const GroupScratch& w = team.group.scratch;
  RowLayout row = team.p.storage.host.row;
  // No more rows than a tile of whole rows has: two of those are what there is memory for.
  const TileShape shape = MakeTileShape(row.dim_v * Element<kType>::kBytes,
                                        MakeTileShape(row.row_bytes, count, team.size).rows);
  const int tid = threadIdx.x, heads = team.heads();
  const int tiles = team.Tiles(count, shape.rows);
  float* outputs = reinterpret_cast<float*>(
                       team.memory + RowsBytes<kHeads>(row, team.p.storage.tiles_in_flight)) -
                   kHeads * row.dim_v;
  double* sums = reinterpret_cast<double*>(team.memory);
  const bool coded = !kMoments && team.p.storage.host.value_bits > 0, more = kMoments || coded;
  const int r = tid % shape.rows, h = tid / shape.rows;
  for (int first = 0; first < heads; first += kHeads) {
    const int now = min(kHeads, heads - first);
    __syncthreads();
    for (int i = tid; i < kHeads * row.dim_v; i += kThreads) {
      outputs[i] =
          i < now * row.dim_v ? LoadL2(w.output + static_cast<int64_t>(first) * row.dim_v + i) : 0;
    }
    __syncthreads();
    const float norm2 = h < now ? team.shared.head[first + h].output_norm2 : 0;
    const float denominator = h < now ? WholeDenominator(team.shared.head[first + h]) : 1;
    double variance = 0, squares = 0, own = 0, mass = 0, spread = 0, tail = 0, relative = 0,
           estimate = 0;
    TailMoment<kType, kHeads, kMoments> moment(row.dim_v);
    const auto inclusion = [&](int64_t i) { return Min(1.f, scale * LoadL2(w.weight + i)); };
    const auto place = [&](int k, int row_of_tile) {
      return team.RowPlace(shape.rows, k, row_of_tile);
    };
    WalkTiles(
        shape, team.p.storage.tiles_in_flight, tiles, team.shared.rows.address, team.memory,
        [&](int k, int row_of_tile) -> uint64_t {
          const int64_t i = place(k, row_of_tile);
          return i < count && inclusion(i) < 1 ? ValueAddress(team.p.storage, LoadL2(w.row + i))
                                               : 0;
        },
        [&](int k, const std::byte* tile) {
          const int n = static_cast<int>(min(count - place(k, 0), int64_t{shape.rows}));
          DotTile<kType, kHeads>(shape, tile, n, 0, row.dim_v, outputs, team.shared.rows.p);
          if (coded) {
            DotCodes<kType>(
                team, shape, tile, n, team.shared.rows.address[k % team.p.storage.tiles_in_flight],
                [&](int row_of_tile) { return LoadL2(w.token + place(k, row_of_tile)); }, outputs);
          }
          __syncthreads();
          float weight = 0;
          if (h < now && r < n) {
            const int64_t i = place(k, r), at = (first + h) * w.capacity + i;
            const HeadWork& work = team.shared.head[first + h];
            TailToken token;
            token.pi = inclusion(i);
            TailTerm term;
            if (token.pi < 1) {
              token.e = expf(LoadL2(w.logit + at) - work.shift);
              token.distance2 =
                  Max(LoadL2(w.norm2 + i) - 2 * team.shared.rows.p[r * kHeads + h] + norm2, 0.f);
              token.error2 = token.e * token.e * token.distance2;
              if (coded) {
                // |e (v - o) - e^ (v^ - o)|^2 from dot products.
                const CodedDots<kHeads>& dots = DotsOf(team);
                const float predicted_e = expf(LoadL2(w.log_predicted_e + at) - work.shift);
                const float code_dot = dots.dot[r * kHeads + h];
                const float code_distance2 = dots.norm2[r] - 2 * code_dot + norm2;
                const float inner =
                    dots.cross[r] - team.shared.rows.p[r * kHeads + h] - code_dot + norm2;
                token.error2 = Max(0.f, token.error2 + predicted_e * predicted_e * code_distance2 -
                                            2 * token.e * predicted_e * inner);
                relative += (token.e - predicted_e) * (token.e - predicted_e) / token.pi;
                estimate += predicted_e * predicted_e / token.pi;
              }
              term = MakeTailTerm(token, denominator);
              variance += term.variance;
              const double square = static_cast<double>(term.variance) * term.variance;
              squares += square;
              own += square * token.pi;
              mass += token.e / token.pi;
              spread += token.e / token.pi * token.distance2;
              tail += first + h == 0;
            }
            w.residual[at] = term.residual;
            w.term[at] = term.variance;
            if (kMoments && token.pi < 1) weight = TailWeight(token, denominator);
            if (kMoments) relative += weight;
          }
          moment.Add(team, shape, tile, k, n, h, r, weight);
        });
    moment.Finish(team, first, now);
    // The rows' parts of each head: several lanes add one of its sums.
    __syncthreads();
    const double mine[kTailSums] = {variance, squares, own, mass, spread, tail, relative, estimate};
#pragma unroll
    for (int c = 0; c < kTailSums; ++c) sums[c * kThreads + tid] = mine[c];
    __syncthreads();
    constexpr int kLanes = kThreads / (kHeads * kTailSums);
    static_assert(kLanes <= kWarp);
    const int which = tid / kLanes % kTailSums, head = tid / kLanes / kTailSums;
    double sum = 0;
#pragma unroll 1
    for (int i = tid % kLanes; i < shape.rows; i += kLanes)
      sum += sums[which * kThreads + head * shape.rows + i];
#pragma unroll 1
    for (int o = kLanes / 2; o > 0; o /= 2) sum += __shfl_xor_sync(kAllLanes, sum, o);
    if (tid % kLanes == 0 && head < now) {
      const TailTotals totals = TailTotalsOf(team);
      if (which < TailTotals::kEach) {
        totals.Head(first + head)[which] = sum;
      } else if (which == TailTotals::kTail) {
        if (first + head == 0) totals.Tail() = sum;
      } else if (more) {
        totals.Coded(first + head)[which - TailTotals::kRelative] = sum;
      }
    }
  }
  if (tid == 0) TailTotalsOf(team).Fetched(more) = team.shared.fetched;
  team.Add(TailTotalsOf(team).Count(more));
}

// Mean squared cosine between the residuals v - o, or e (v - o) - e^ (v^ - o) with value codes, of
// the kRankDraws listed places for head h; negative if no two differ. memory: [kRankDraws][dim +
// 4].
template <DType kType, int kHeads>
__device__ float MeanCos2(Team<kHeads>& team, const int64_t* places, int h, const float* output,
                          float* memory) {
  using E = Element<kType>;
  const GroupScratch& w = team.group.scratch;
  const RowLayout& row = team.p.storage.host.row;
  const int tid = threadIdx.x, dim = row.dim_v, pitch = dim + 4, chunks = dim / E::kPer16;
  const bool coded = team.p.storage.host.value_bits > 0;
  __shared__ uint64_t rows[kRankDraws];
  __shared__ const std::byte* codes[kRankDraws];
  __shared__ float exact[kRankDraws], predicted_e[kRankDraws], cosines[kWarps], pairs[kWarps];
  if (tid < kRankDraws) {
    const int64_t i = places[tid], at = h * w.capacity + i;
    rows[tid] = ValueAddress(team.p.storage, LoadL2(w.row + i));
    if (coded) {
      exact[tid] = expf(LoadL2(w.logit + at) - team.shared.head[h].shift);
      predicted_e[tid] = expf(LoadL2(w.log_predicted_e + at) - team.shared.head[h].shift);
      codes[tid] = ValueCode(team.p.storage, team.group, LoadL2(w.token + i));
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = tid; i < kRankDraws * chunks; i += kThreads) {
    const int draw = i / chunks, at = (i - draw * chunks) * E::kPer16;
    float x[E::kPer16];
    E::Unpack(reinterpret_cast<const uint4*>(rows[draw])[i - draw * chunks], x);
#pragma unroll
    for (int j = 0; j < E::kPer16; ++j) memory[draw * pitch + at + j] = x[j] - output[at + j];
  }
  __syncthreads();
#pragma unroll 1
  for (int i = tid; coded && i < kRankDraws * dim; i += kThreads) {
    const int draw = i / dim, j = i - draw * dim;
    const float predicted = CodedValue(team.p.storage.host, team.group.index, codes[draw], j);
    float& residual = memory[draw * pitch + j];
    residual = exact[draw] * residual - predicted_e[draw] * (predicted - output[j]);
  }
  if (coded) __syncthreads();
  // A pair of draws is for kShare lanes, with the norms of both on the way.
  constexpr int kPairs = kRankDraws * (kRankDraws - 1) / 2, kShare = 4;
  static_assert(kPairs * kShare <= kThreads);
  const int pair = tid / kShare;
  int a = 1;
  while (a * (a + 1) / 2 <= pair) ++a;
  const int b = pair - a * (a - 1) / 2;
  float dot = 0, norm_a = 0, norm_b = 0;
  if (pair < kPairs) {
#pragma unroll 2
    for (int j = tid % kShare * 4; j < dim; j += kShare * 4) {
      const float4 x = *reinterpret_cast<const float4*>(memory + a * pitch + j);
      const float4 y = *reinterpret_cast<const float4*>(memory + b * pitch + j);
      dot = fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, fmaf(x.w, y.w, dot))));
      norm_a = fmaf(x.x, x.x, fmaf(x.y, x.y, fmaf(x.z, x.z, fmaf(x.w, x.w, norm_a))));
      norm_b = fmaf(y.x, y.x, fmaf(y.y, y.y, fmaf(y.z, y.z, fmaf(y.w, y.w, norm_b))));
    }
  }
#pragma unroll
  for (int o = kShare / 2; o > 0; o /= 2) {
    dot += __shfl_xor_sync(kAllLanes, dot, o);
    norm_a += __shfl_xor_sync(kAllLanes, norm_a, o);
    norm_b += __shfl_xor_sync(kAllLanes, norm_b, o);
  }
  const bool counts =
      pair < kPairs && tid % kShare == 0 && places[a] != places[b] && norm_a != 0 && norm_b != 0;
  // Roots first: products of four small values leave fp32.
  const float cosine = counts ? dot / (sqrtf(norm_a) * sqrtf(norm_b)) : 0;
  const float sum = BlockSum(cosine * cosine, cosines);
  const float count = BlockSum(counts ? 1.f : 0.f, pairs);
  __syncthreads();
  return count > 0 ? sum / count : -1;
}

// The mean squared cosine of the residuals of head h, between places that are drawn in proportion to
// their terms of V; -1 if there are no two. memory [dim_v]: the output, and behind it room for
// MeanCos2.
template <DType kType, int kHeads>
__device__ float TailCos2(Team<kHeads>& team, int64_t count, int64_t tail, double variance, int h,
                          float* memory) {
  const GroupScratch& w = team.group.scratch;
  const int tid = threadIdx.x;
  __shared__ double scratch[kWarps];
  __shared__ int64_t places[kRankDraws];
  const float* output = memory;
  float* residuals = memory + team.p.storage.host.row.dim_v;  // [kRankDraws][dim + 4]
  float cos2 = -1;
  if (tid < kRankDraws) places[tid] = 0;
  if (tail > 1 && variance > 0) {
    // Places drawn systematically in proportion to their terms of V.
    const int64_t per = (count + kThreads - 1) / kThreads, from = min(per * tid, count),
                  to = min(from + per, count);
    const float* term = w.term + h * w.capacity;
    double own = 0;
#pragma unroll 1
    for (int64_t i = from; i < to; ++i) own += LoadL2(term + i);
    const double until = BlockScan(own, scratch);
    double before = until - own;
    __syncthreads();
    if (tid == kThreads - 1) scratch[0] = until;
    __syncthreads();
    const double all = scratch[0];
    const auto target = [&](int k) { return (k + .5) / kRankDraws * all; };
    int next = 0;
    while (next < kRankDraws && target(next) <= before) ++next;
#pragma unroll 1
    for (int64_t i = from; i < to && next < kRankDraws && target(next) <= until; ++i) {
      before += LoadL2(term + i);
      const bool last = i == to - 1;  // rounding of the sums must leave no place open
      while (next < kRankDraws && (target(next) <= before || (last && target(next) <= until)))
        places[next++] = i;
    }
    __syncthreads();
    cos2 = MeanCos2<kType, kHeads>(team, places, h, output, residuals);
  }
  return cos2;
}

// Certificates of this block's heads at a look, after SumTail: to scratch.head and group.state.
template <DType kType, int kHeads>
__device__ __noinline__ void JudgeHeads(Team<kHeads>& team, int64_t count, int look) {
  const GroupScratch& w = team.group.scratch;
  const int heads = team.heads(), dim = team.p.storage.host.row.dim_v, tid = threadIdx.x;
  float* output = reinterpret_cast<float*>(team.memory);  // [dim], and behind it room for TailCos2
  const int64_t tail = static_cast<int64_t>(TailTotalsOf(team).Tail());
  const bool coded = team.p.storage.host.value_bits > 0;
  for (int h = team.rank; h < heads; h += team.size) {
    const double* total = TailTotalsOf(team).Head(h);
    const double* rest = TailTotalsOf(team).Coded(h);
    const TailSums sums{.variance = total[TailTotals::kVariance],
                        .squares = total[TailTotals::kSquares],
                        .own = total[TailTotals::kOwn],
                        .mass = total[TailTotals::kMass],
                        .spread = total[TailTotals::kSpread],
                        .relative = coded ? rest[0] : 0,
                        .estimate = coded ? rest[1] : 0,
                        .coded = coded ? team.shared.head[h].mass : 0};
    __syncthreads();
#pragma unroll 1
    for (int j = tid; j < dim; j += kThreads)
      output[j] = LoadL2(w.output + static_cast<int64_t>(h) * dim + j);
    const float norm2 = team.shared.head[h].output_norm2;
    const float cos2 = TailCos2<kType, kHeads>(team, count, tail, sums.variance, h, output);
    if (tid == 0) {
      HeadState state = team.shared.state[h];
      HeadWork work = team.shared.head[h];
      const bool exact = tail == 0 && count == team.middle();
      Promise promise = team.p.promise;
      if (look == 1) promise.quantile = team.shared.quantile;
      JudgeHead(promise, look, sums, cos2, tail, exact, norm2, state, work);
      if (look == 1) LearnHead(promise, team.group.index, work, state);
      w.head[h] = work;
      team.group.state[h] = state;
    }
  }
}

// The least factor on all inclusion probabilities for which this block's heads are expected to pass
// at look `look`, to scratch.growth.
template <int kHeads>
__device__ __noinline__ void GrowHeads(Team<kHeads>& team, int64_t count, float scale, int look) {
  const GroupScratch& w = team.group.scratch;
  __shared__ float scratch[kWarps];
  const int64_t tail = static_cast<int64_t>(TailTotalsOf(team).Tail());
  for (int h = team.rank; h < team.heads(); h += team.size) {
    const float root = GrowthRoot(team.p.promise, look, team.shared.head[h]);
    const float* residual = w.residual + h * w.capacity;
    // The first rows of each thread stay in registers over the search.
    constexpr int kHeld = 8;
    float held_weight[kHeld], held_residual[kHeld];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int64_t i = threadIdx.x + int64_t{k} * kThreads;
      held_weight[k] = i < count ? scale * LoadL2(w.weight + i) : INFINITY;
      held_residual[k] = i < count ? LoadL2(residual + i) : 0;
    }
    const auto enough = [&](float by) {
      float variance = 0;
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        const float pi = Min(1.f, by * held_weight[k]);
        variance += held_residual[k] * (1 - pi) / pi;
      }
      for (int64_t i = threadIdx.x + int64_t{kHeld} * kThreads; i < count; i += kThreads) {
        const float pi = Min(1.f, by * scale * LoadL2(w.weight + i));
        variance += LoadL2(residual + i) * (1 - pi) / pi;
      }
      return BlockSum(variance, scratch) <= root * root;
    };
    float factor = tail < kLeastTail ? kTailGrowth : kLeastGrowth;
    if (!enough(factor)) {
      float low = factor, high = kLargestGrowth;
      for (int i = 0; i < kGrowthHalvings; ++i) {
        const float middle = sqrtf(low * high);
        (enough(middle) ? high : low) = middle;
      }
      factor = high;
    }
    if (threadIdx.x == 0) w.growth[h] = factor;
  }
}

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_VERIFY_CUH_
