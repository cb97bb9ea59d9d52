// Rows of host memory to device memory, by few thread blocks and bulk copies.
#ifndef VATTN_BENCH_GATHER_ROWS_H_
#define VATTN_BENCH_GATHER_ROWS_H_

#include <cstdint>

struct CUstream_st;

namespace vattn::cuda {

constexpr int kMaxGatherRowBytes = 4096;

// Row i goes from source[i] to destination + slot[i] * row_bytes. All pointers are the device's.
// Fastest with sources in address order: address translation then limits least, and rows that
// follow each other, on either side, are moved by one operation.
struct GatherParams {
  const uint64_t* source = nullptr;  // [capacity] addresses the device can read, 16-byte aligned
  const int32_t* slot = nullptr;     // [capacity] or null: row i goes to place i
  const int32_t* count = nullptr;    // [1] rows to move, read when the work runs: graphs replay it
  void* destination = nullptr;       // [places, row_bytes], 16-byte aligned
  int32_t capacity = 0;              // a larger count is cut to it
  int32_t row_bytes = 0;             // multiple of 16, up to kMaxGatherRowBytes
  int32_t num_blocks = 0;            // thread blocks; 0: kDefaultGatherBlocks
};

constexpr int kDefaultGatherBlocks = 16;

// Enqueues; a cudaError_t value. Slots must differ. Sources must stay as they are until it is done.
int Gather(const GatherParams& params, CUstream_st* stream);

}  // namespace vattn::cuda

#endif  // VATTN_BENCH_GATHER_ROWS_H_
