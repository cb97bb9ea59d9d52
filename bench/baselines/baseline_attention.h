// Exact attention of one query token over rows in device memory, for the baselines: split over many
// thread blocks (items), whose softmax states are merged by a second kernel. For .cu files only.
#ifndef VATTN_BENCH_BASELINES_BASELINE_ATTENTION_H_
#define VATTN_BENCH_BASELINES_BASELINE_ATTENTION_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace vattn::bench {

constexpr int kMaxBaselineGroup = 8;
constexpr int kAttendTile = 16;   // tokens that a warp takes at a time
constexpr int kAttendWarps = 4;   // of a thread block
constexpr int kAttendBlocks = 3;  // thread blocks that fit a multiprocessor

// Some rows of one unit (a sequence and KV head), for one thread block. A row is K then V in bf16,
// 4 * head_dim bytes.
struct AttendItem {
  const std::byte* rows = nullptr;
  const int32_t* slot = nullptr;  // [tokens]: row i is at rows + slot[i] * 4 * head_dim; null: i
  int32_t tokens = 0;             // at least 1
  int32_t unit = 0;
};

struct AttendParams {
  const AttendItem* items = nullptr;  // [num_items], all with or all without slots
  int32_t num_items = 0;
  int32_t group = 0;            // query heads of a unit, up to kMaxBaselineGroup
  int32_t head_dim = 0;         // 64 or 128
  bool indirect = false;        // items have slots
  const uint16_t* q = nullptr;  // [units][group][head_dim] bf16
  float* state = nullptr;  // [num_items][group][head_dim + 2]: sums, largest logit (base 2), mass
};

struct MergeParams {
  const float* state = nullptr;    // of all items, those of a unit next to each other
  const int32_t* first = nullptr;  // [units + 1] first item of a unit
  int32_t units = 0;
  int32_t group = 0;
  int32_t head_dim = 0;
  float* out = nullptr;  // [units][group][head_dim]
};

// Enqueue; a cudaError_t value.
int AttendItems(const AttendParams& params, cudaStream_t stream);
int MergeItems(const MergeParams& params, cudaStream_t stream);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_BASELINES_BASELINE_ATTENTION_H_
