// Every warp works alone on a ring of stages in shared memory: bulk copies bring the rows of a
// chunk into a stage and announce themselves at its mbarrier, bulk copies take them out to the
// destination. Chunks are dealt to the warps of all blocks in turn, so that at any time what is
// under way lies close together in a list in address order.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "bench/gather/rows.h"

namespace vattn::cuda {
namespace {

constexpr int kWarpLanes = 32;
constexpr int kWarps = 4;
constexpr int kStageBytes = 16 << 10;
constexpr int kMinStages = 2;
constexpr int kMaxStages = 3;

// Rows of a chunk: one a lane, as far as a stage has room.
__host__ __device__ constexpr int ChunkRows(int row_bytes) {
  const int fit = kStageBytes / row_bytes;
  return fit < kWarpLanes ? fit : kWarpLanes;
}

// What one warp has to do: chunks first, first + step, ... of the list.
struct Walk {
  int64_t first, step;
  int chunk_rows, count;

  __device__ int64_t Begin(int64_t turn) const { return (first + turn * step) * chunk_rows; }
  __device__ int Rows(int64_t turn) const {
    const int64_t left = count - Begin(turn);
    return left <= 0 ? 0 : left < chunk_rows ? static_cast<int>(left) : chunk_rows;
  }
};

#if __CUDA_ARCH__ >= 900

__device__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ void InitBarrier(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

__device__ void ExpectBytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ void WaitForPhase(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, "
        "p;}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

__device__ void CopyIn(uint32_t to, uint64_t from, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ void CopyOut(uint64_t to, uint32_t from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}

// Rows of the run that starts at this lane's row; 0 if the row before it goes on into this one.
// `place` is where a row lies, in units such that its successor's is larger by `stride`.
__device__ int RunLength(int64_t place, int64_t stride, int lane, int rows) {
  const int64_t previous = __shfl_up_sync(~0u, place, 1);
  const bool starts = lane < rows && (lane == 0 || place != previous + stride);
  const uint32_t all = __ballot_sync(~0u, starts);
  const uint32_t later = lane == kWarpLanes - 1 ? 0 : all >> (lane + 1);
  const int end = later ? lane + __ffs(later) : rows;
  return starts ? end - lane : 0;
}

__device__ void MoveRows(const GatherParams& params, const Walk& walk, int stages) {
  extern __shared__ __align__(128) char ring[];
  __shared__ __align__(8) uint64_t barriers[kWarps][kMaxStages];
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  const int row_bytes = params.row_bytes;
  const uint32_t stage0 = SharedAddress(ring) + warp * stages * kStageBytes;
  const uint32_t barrier0 = SharedAddress(&barriers[warp][0]);
  if (lane < stages) {
    InitBarrier(barrier0 + lane * 8);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncwarp();

  // Addresses are read one turn before they are needed.
  int64_t source =
      lane < walk.Rows(0) ? static_cast<int64_t>(params.source[walk.Begin(0) + lane]) : 0;
  auto bring = [&](int64_t turn, int stage) {
    const int rows = walk.Rows(turn);
    if (rows == 0) return;
    const uint32_t barrier = barrier0 + stage * 8;
    const int run = RunLength(source, row_bytes, lane, rows);
    if (lane == 0) ExpectBytes(barrier, rows * row_bytes);
    __syncwarp();
    if (run > 0) {
      CopyIn(stage0 + stage * kStageBytes + lane * row_bytes, static_cast<uint64_t>(source),
             run * row_bytes, barrier);
    }
    if (lane < walk.Rows(turn + 1)) {
      source = static_cast<int64_t>(params.source[walk.Begin(turn + 1) + lane]);
    }
  };

  for (int turn = 0; turn < stages - 1; ++turn) bring(turn, turn);
  int stage = 0;
  uint32_t parity = 0;
  for (int64_t turn = 0;; ++turn) {
    const int rows = walk.Rows(turn);
    if (rows == 0) break;
    int64_t place = walk.Begin(turn) + lane;
    if (params.slot != nullptr && lane < rows) place = params.slot[place];
    const int run = RunLength(place, 1, lane, rows);
    WaitForPhase(barrier0 + stage * 8, parity);
    if (run > 0) {
      CopyOut(reinterpret_cast<uint64_t>(params.destination) + place * row_bytes,
              stage0 + stage * kStageBytes + lane * row_bytes, run * row_bytes);
    }
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    // The stage before this one is free as soon as its rows have been read.
    asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
    __syncwarp();
    bring(turn + stages - 1, stage == 0 ? stages - 1 : stage - 1);
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

#else  // no bulk copies: lanes load and store 16 bytes, four loads under way

__device__ void MoveRows(const GatherParams& params, const Walk& walk, int) {
  constexpr int kUnroll = 4;
  const int lane = threadIdx.x % kWarpLanes, words = params.row_bytes / 16;
  for (int64_t turn = 0;; ++turn) {
    const int units = walk.Rows(turn) * words;
    if (units == 0) return;
    for (int first = lane; first < units; first += kUnroll * kWarpLanes) {
      uint4 value[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int unit = first + u * kWarpLanes;
        if (unit >= units) break;
        const uint64_t row = params.source[walk.Begin(turn) + unit / words];
        value[u] = __ldcs(reinterpret_cast<const uint4*>(row) + unit % words);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int unit = first + u * kWarpLanes;
        if (unit >= units) break;
        const int64_t i = walk.Begin(turn) + unit / words;
        const int64_t place = params.slot != nullptr ? params.slot[i] : i;
        static_cast<uint4*>(params.destination)[place * words + unit % words] = value[u];
      }
    }
  }
}

#endif

__global__ void __launch_bounds__(kWarps* kWarpLanes)
    GatherKernel(const GatherParams params, int stages) {
  const int count = min(*params.count, params.capacity);
  const int warp = threadIdx.x / kWarpLanes;
  const Walk walk = {.first = warp * static_cast<int64_t>(gridDim.x) + blockIdx.x,
                     .step = static_cast<int64_t>(gridDim.x) * kWarps,
                     .chunk_rows = ChunkRows(params.row_bytes),
                     .count = count};
  if (walk.Rows(0) > 0) MoveRows(params, walk, stages);
}

}  // namespace

int Gather(const GatherParams& params, CUstream_st* stream) {
  const int row_bytes = params.row_bytes;
  if (row_bytes <= 0 || row_bytes % 16 != 0 || row_bytes > kMaxGatherRowBytes ||
      params.capacity < 0 || params.num_blocks < 0) {
    return cudaErrorInvalidValue;
  }
  if (params.capacity == 0) return cudaSuccess;
  int device = 0, major = 0, shared = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return error;
  constexpr int kReserved = kWarps * kMaxStages * 8 + 1024;  // barriers and the system's own
  const int fit = (shared - kReserved) / (kWarps * kStageBytes);
  const int stages = major < 9 ? 0 : std::min(fit, kMaxStages);
  if (major >= 9 && stages < kMinStages) return cudaErrorInvalidConfiguration;
  const int ring = stages * kWarps * kStageBytes;
  error = cudaFuncSetAttribute(GatherKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, ring);
  if (error != cudaSuccess) return error;
  const int blocks = params.num_blocks > 0 ? params.num_blocks : kDefaultGatherBlocks;
  GatherKernel<<<blocks, kWarps * kWarpLanes, ring, stream>>>(params, stages);
  return cudaGetLastError();
}

}  // namespace vattn::cuda
