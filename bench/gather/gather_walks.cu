#include <cuda_runtime_api.h>

#include "bench/gather/gather_walks.h"

namespace vattn::bench {
namespace {

constexpr int kWarpLanes = 32;
constexpr int kWarpBlock = 1024;
constexpr int kTeamBlock = 256;
constexpr int kTileRows = 64;
constexpr int kLoads = 4;  // of a lane, under way at once
constexpr int kCheckBlocks = 264;

__device__ uint4 LoadOnce(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

__global__ void __launch_bounds__(kWarpBlock) WarpWalkKernel(const RowList list) {
  const int words = list.row_bytes / 16, lane = threadIdx.x % kWarpLanes;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kWarpBlock / kWarpLanes);
  const int64_t first = (blockIdx.x * static_cast<int64_t>(kWarpBlock) + threadIdx.x) / kWarpLanes;
  for (int64_t row = first; row < list.rows; row += warps) {
    const uint4* from = reinterpret_cast<const uint4*>(list.source[row]);
    uint4* to = static_cast<uint4*>(list.destination) + row * words;
#pragma unroll 1
    for (int i = lane; i < words; i += kWarpLanes) to[i] = LoadOnce(from + i);
  }
}

// A head's list is (blockIdx.y * rows of a head) onwards; the 16-byte units of a tile are dealt to
// the warps in runs of kLoads * kWarpLanes, which are four rows of 512 bytes. The addresses of a
// run are read while the run before it is under way.
class TeamWalk {
 public:
  __device__ TeamWalk(const RowList& list, int64_t head_rows)
      : source_(list.source + blockIdx.y * head_rows),
        words_(list.row_bytes / 16),
        units_(static_cast<int>(head_rows) * words_),
        tile_(blockIdx.x),
        run_(threadIdx.x / kWarpLanes),
        lane_(threadIdx.x % kWarpLanes) {}

  // The lane's j-th unit of the run.
  __device__ int Unit(int j) const {
    return tile_ * kTileRows * words_ + (run_ * kLoads + j) * kWarpLanes + lane_;
  }
  __device__ bool Inside(int j) const { return Unit(j) < TileEnd(); }
  __device__ bool Done() const { return tile_ * kTileRows * words_ >= units_; }
  __device__ const uint4* Address(int j) const {
    const int unit = min(Unit(j), units_ - 1);
    return reinterpret_cast<const uint4*>(source_[unit / words_]) + unit % words_;
  }
  __device__ void Advance() {
    run_ += kTeamBlock / kWarpLanes;
    if (run_ * kLoads * kWarpLanes < kTileRows * words_) return;
    run_ = threadIdx.x / kWarpLanes;
    tile_ += gridDim.x;
  }

 private:
  __device__ int TileEnd() const { return min(units_, (tile_ + 1) * kTileRows * words_); }

  const uint64_t* source_;
  int words_, units_, tile_, run_, lane_;
};

__global__ void __launch_bounds__(kTeamBlock)
    TeamWalkKernel(const RowList list, int64_t head_rows) {
  TeamWalk walk(list, head_rows);
  uint4* destination =
      static_cast<uint4*>(list.destination) + blockIdx.y * head_rows * (list.row_bytes / 16);
  if (walk.Done()) return;
  const uint4* address[kLoads];
#pragma unroll
  for (int j = 0; j < kLoads; ++j) address[j] = walk.Address(j);
  while (true) {
    uint4 value[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      if (walk.Inside(j)) value[j] = LoadOnce(address[j]);
    }
    TeamWalk next = walk;
    next.Advance();
    const bool more = !next.Done();
    if (more) {
#pragma unroll
      for (int j = 0; j < kLoads; ++j) address[j] = next.Address(j);
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      if (walk.Inside(j)) destination[walk.Unit(j)] = value[j];
    }
    if (!more) return;
    walk = next;
  }
}

__global__ void CheckKernel(const RowList list, uint64_t region, unsigned long long* wrong) {
  const int words = list.row_bytes / 8;
  const int64_t total = list.rows * words, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  unsigned long long bad = 0;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < total;
       i += step) {
    const int64_t row = i / words;
    const uint64_t address =
        list.source != nullptr ? list.source[row] : list.first + row * list.row_bytes;
    const uint64_t expected = ((address - region) / 8 + i % words + 1) * kPattern;
    bad += static_cast<const uint64_t*>(list.destination)[i] != expected;
  }
  if (bad > 0) atomicAdd(wrong, bad);
}

}  // namespace

int WalkByWarps(const RowList& list, int blocks, CUstream_st* stream) {
  WarpWalkKernel<<<blocks, kWarpBlock, 0, stream>>>(list);
  return cudaGetLastError();
}

int WalkByTeams(const RowList& list, int num_heads, int team, CUstream_st* stream) {
  TeamWalkKernel<<<dim3(team, num_heads), kTeamBlock, 0, stream>>>(list, list.rows / num_heads);
  return cudaGetLastError();
}

int CountWrongWords(const RowList& list, uint64_t region, unsigned long long* wrong,
                    CUstream_st* stream) {
  CheckKernel<<<kCheckBlocks, kTeamBlock, 0, stream>>>(list, region, wrong);
  return cudaGetLastError();
}

}  // namespace vattn::bench
