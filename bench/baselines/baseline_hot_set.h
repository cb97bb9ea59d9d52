// The HiSparse-style hot set on the device: resolve and fetch in one kernel. For .cu files only.
#ifndef VATTN_BENCH_BASELINES_BASELINE_HOT_SET_H_
#define VATTN_BENCH_BASELINES_BASELINE_HOT_SET_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace vattn::bench {

constexpr int32_t kMaxHotSetList = 8192;
constexpr int32_t kMaxHotSetSlots = 32767;

struct HotSetParams {
  const int32_t* tokens = nullptr;       // [units][k] lists of this step, without repeats
  const int32_t* counts = nullptr;       // [units] tokens in the list, up to k
  const uint64_t* host_rows = nullptr;   // [units] address of the unit's row 0
  std::byte* hot_rows = nullptr;         // [units][slots][row_bytes]
  int32_t* slot_token = nullptr;         // [units][slots] -1: free
  int16_t* order = nullptr;              // [units][slots] slots, the least recently used first
  int32_t* slot_of = nullptr;            // [units][k] out: slot of each token of the list
  unsigned long long* missed = nullptr;  // the number of rows fetched is added
  int32_t units = 0, k = 0, slots = 0, row_bytes = 0;
};

// Enqueues; a cudaError_t value. REQUIRES k <= slots and the limits above.
int ResolveAndFetch(const HotSetParams& params, cudaStream_t stream);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_BASELINES_BASELINE_HOT_SET_H_
