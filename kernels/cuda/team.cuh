// A team: the thread blocks that answer one group together, all resident at a time (cooperative launch).
#ifndef VATTN_KERNELS_CUDA_TEAM_CUH_
#define VATTN_KERNELS_CUDA_TEAM_CUH_

#include "kernels/cuda/rows.cuh"
#include "kernels/sampling.h"

namespace vattn::cuda {

constexpr int kWarps = kThreads / kWarp;

// Shared memory of a thread block of a team. Every block of a team keeps the same copies of the heads.
template <int kHeads>
struct TeamShared {
  RowsShared<kHeads> rows;
  HeadWork head[kMaxDeviceGroup];
  HeadState state[kMaxDeviceGroup];
  float log_gain[kMaxDeviceGroup];  // of inclusion weights, see kernels/cpu/sample.h
  float floor[kMaxDeviceGroup];
  float sums[kWarps][kMaxDeviceGroup + 1];  // of a pass over estimates
  int32_t offset[kThreads + 1];             // of blocks in the list
  double total[kPartials(kMaxDeviceGroup)];
  int32_t slot[kMostTileRows];
  int64_t key[kMostTileRows];
  int32_t count, fetched;
  float factor;
};

// A thread block's view of its team at work on one group.
template <int kHeads>
struct Team {
  const DecodeParams& p;
  const DeviceGroup& group;
  TeamShared<kHeads>& shared;
  std::byte* memory;  // dynamic shared memory
  int rank, size;
  uint32_t phase = 0;   // barriers passed
  uint32_t parity = 0;  // of the partial sums in use

  __device__ int heads() const { return p.q_heads; }
  __device__ int64_t middle() const { return group.middle_end - group.middle_begin; }

  // All threads of the team. What was written to global memory before is seen after it, past the L1.
  __device__ void Sync() {
    __syncthreads();
    if (size == 1) return;
    if (threadIdx.x == 0) {
      ++phase;
      __threadfence();
      atomicAdd(group.scratch.barrier, 1u);
      const uint32_t all = phase * static_cast<uint32_t>(size);
      uint32_t seen;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(group.scratch.barrier) : "memory");
      } while (seen < all);
      __threadfence();
    }
    __syncthreads();
  }

  // shared.total[0, count) of every block of the team, summed in the same order by each. Holds a barrier.
  __device__ void Add(int count) {
    const int stride = kPartials(p.q_heads);
    double* own = group.scratch.partial + (static_cast<int64_t>(parity) * size + rank) * stride;
    __syncthreads();
    if (size > 1) {
      for (int i = threadIdx.x; i < count; i += kThreads) own[i] = shared.total[i];
      Sync();
      const double* from = group.scratch.partial + static_cast<int64_t>(parity) * size * stride;
      for (int i = threadIdx.x; i < count; i += kThreads) {
        double sum = 0;
        for (int r = 0; r < size; ++r) sum += LoadShared(from + r * stride + i);
        shared.total[i] = sum;
      }
      parity ^= 1;
      __syncthreads();
    }
  }

  // Blocks of the middle that this thread block looks at: a contiguous run.
  __device__ int64_t BlocksBegin() const { return NumBlocks(group) * rank / size; }
  __device__ int64_t BlocksEnd() const { return NumBlocks(group) * (rank + 1) / size; }
};

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_TEAM_CUH_
