// A team: the thread blocks that answer one group together, all resident at a time (a cluster, or a
// cooperative launch).
#ifndef VATTN_KERNELS_CUDA_TEAM_CUH_
#define VATTN_KERNELS_CUDA_TEAM_CUH_

#include "kernels/cuda/rows.cuh"
#include "kernels/sampling.h"

namespace vattn::cuda {

constexpr int kWarps = kThreads / kWarp;
constexpr int kMostTeam = 16;  // more thread blocks wait longer for each other than they save

// The middle is cut into at most kMostSegments runs of blocks; a warp takes one at a time.
constexpr int kMostSegments = 256;
VATTN_HD inline int64_t SegmentBlocks(int64_t blocks) {
  return (blocks + kMostSegments - 1) / kMostSegments;
}
VATTN_HD inline int NumSegments(int64_t blocks) {
  return blocks == 0
             ? 0
             : static_cast<int>((blocks + SegmentBlocks(blocks) - 1) / SegmentBlocks(blocks));
}

// Shared memory of a thread block of a team. Every block of a team keeps the same copies of the
// heads.
template <int kHeads>
struct TeamShared {
  RowsShared<kHeads> rows;
  HeadWork head[kMaxDeviceGroup];
  HeadState state[kMaxDeviceGroup];
  float quantile[1][kQuantileBins + 1];  // of the first look
  // Inclusion weights while rows are drawn (kernels/cpu/sample.h). What comes after the draw, and
  // the top-k policies, which have none, use the same places for other things.
  union {
    float log_gain[kMaxDeviceGroup];
    float log_weight[kMaxDeviceGroup];  // top-k: of a sampled row, ln(rows it stands for)
  };
  union {
    float floor[kMaxDeviceGroup];
    float done[kMaxDeviceGroup];  // 1: the head's answer is final; top-k: all its rows were read
  };
  float sums[kWarps][kMaxDeviceGroup + 1];    // of a pass over estimates
  int32_t kept[kWarps];                       // candidates that each warp draws
  double total[MostTotals(kMaxDeviceGroup)];  // what Add sums over the team
  int32_t slot[kMostTileRows];
  int32_t count, fetched;
};

// Where the parts of a list go that the warps of a team append at a time, in the order of ranks and
// warps.
struct ListPlace {
  int64_t warp;      // first place of this warp
  int64_t block;     // first place of this thread block
  int64_t in_block;  // tokens that the thread block appends
  int64_t end;       // length of the list with all parts
};

// A thread block's view of its team at work on one group.
template <int kHeads>
struct Team {
  const StepParams& p;
  const DeviceGroup& group;
  TeamShared<kHeads>& shared;
  std::byte* memory;  // dynamic shared memory
  int rank, size;
  bool clustered = false;  // the team is a cluster, for which the hardware has barriers
  uint32_t phase = 0;      // barriers passed
  uint32_t parity = 0;     // of the partial sums in use

  __device__ int heads() const { return p.group_heads; }
  __device__ int64_t middle() const { return group.middle_end - group.middle_begin; }

  __device__ void StampTime(TimelinePoint point) const {
    if (rank == 0 && threadIdx.x == 0 && &group == p.groups) cuda::StampTime(p, point);
  }

  // All threads of the team. What was written to global memory before is seen after it, past the
  // L1.
  __device__ void Sync() {
#if __CUDA_ARCH__ >= 900
    if (clustered) {
      asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
      return;
    }
#endif
    __syncthreads();
    if (size == 1) return;
    if (threadIdx.x == 0) {
      ++phase;
      const uint32_t all = phase * static_cast<uint32_t>(size);
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(group.scratch.barrier)
                   : "memory");
      uint32_t seen;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(seen)
                     : "l"(group.scratch.barrier)
                     : "memory");
      } while (seen < all);
    }
    __syncthreads();
  }

  // shared.total[0, count) of every block of the team, summed in the same order by each. Holds a
  // barrier.
  __device__ void Add(int count) {
    const int stride = MostTotals(p.group_heads);
    double* own = group.scratch.partial + (static_cast<int64_t>(parity) * size + rank) * stride;
    __syncthreads();
    if (size > 1) {
      for (int i = threadIdx.x; i < count; i += kThreads) own[i] = shared.total[i];
      Sync();
      const double* from = group.scratch.partial + static_cast<int64_t>(parity) * size * stride;
      // Parts of a sum are loaded at a time, not one after the other.
      const int part = threadIdx.x % kMostTeam;
      for (int first = 0; first < count; first += kThreads / kMostTeam) {
        const int i = first + threadIdx.x / kMostTeam;
        double sum = i < count && part < size ? LoadL2(from + part * stride + i) : 0;
#pragma unroll
        for (int o = kMostTeam / 2; o > 0; o /= 2) sum += __shfl_xor_sync(kAllLanes, sum, o);
        if (i < count && part == 0) shared.total[i] = sum;
      }
      parity ^= 1;
      __syncthreads();
    }
  }

  // The place of the `kept` tokens that this warp appends to a list of `count`. Holds a barrier.
  __device__ ListPlace PlaceOnList(int64_t count, int32_t kept) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    __syncthreads();
    if (lane == 0) shared.kept[warp] = kept;
    __syncthreads();
    int before = 0, own = 0;
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) before += shared.kept[i];
      own += shared.kept[i];
    }
    if (size == 1) return {count + before, count, own, count + own};
    double* totals =
        group.scratch.partial + static_cast<int64_t>(parity) * size * MostTotals(heads());
    if (threadIdx.x == 0) totals[rank] = own;
    Sync();
    const int of_lane = lane < size ? static_cast<int>(LoadL2(totals + lane)) : 0;
    const int64_t first = count + WarpSum(lane < rank ? of_lane : 0);
    parity ^= 1;
    return {first + before, first, own, count + WarpSum(of_lane)};
  }

  // Tiles of `rows` rows go round the thread blocks of the team: how many of a list of `count` rows
  // this one has, and the place in the list of row r of its k-th.
  __device__ int Tiles(int64_t count, int rows) const {
    const int all = static_cast<int>((count + rows - 1) / rows);
    return all > rank ? (all - rank + size - 1) / size : 0;
  }
  __device__ int64_t RowPlace(int rows, int k, int r) const {
    return (rank + int64_t{k} * size) * rows + r;
  }

  // Segments of the middle (sample.cuh) that a warp of this thread block looks at: from here up to
  // SegmentBegin(warp + 1). Those of the block are a contiguous run.
  __device__ int SegmentBegin(int warp) const {
    const int segments = NumSegments(NumBlocks(group)), warps = kWarps * size;
    return segments * (rank * kWarps + warp) / warps;
  }
  // Blocks of the middle in them.
  __device__ int64_t BlocksBegin() const {
    return SegmentBegin(0) * SegmentBlocks(NumBlocks(group));
  }
  __device__ int64_t BlocksEnd() const {
    return min(NumBlocks(group), SegmentBegin(kWarps) * SegmentBlocks(NumBlocks(group)));
  }
};

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_TEAM_CUH_
