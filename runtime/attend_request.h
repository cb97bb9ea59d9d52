// Arrays of one attention call as the C API passes them.
#ifndef VATTN_RUNTIME_ATTEND_REQUEST_H_
#define VATTN_RUNTIME_ATTEND_REQUEST_H_

#include <cstdint>

#include "memory/status.h"

namespace vattn {

// Extents as vattn_attend_params. Optional ones may be null.
struct AttendRequest {
  int layer = 0;
  int num_tokens = 1;
  bool dense = false;  // every row is read, whatever the runtime's policy is
  int out_dtype = 0;
  const void* q = nullptr;
  const void* k_new = nullptr;
  const void* v_new = nullptr;
  void* out = nullptr;
  float* lse = nullptr;
  int32_t* verdict = nullptr;
  float* error = nullptr;
  int32_t* selected = nullptr;
  int32_t* fetched = nullptr;
  int32_t* looks = nullptr;
  int64_t* middle = nullptr;
  uint64_t* timeline = nullptr;
  const void* scores = nullptr;
  int32_t score_heads = 0;
  int32_t scores_dtype = 0;  // DType
  int64_t scores_stride = 0;
  // A slice of a context (kernels/merge.h); partial null: the sequences have their contexts whole.
  float* partial = nullptr;
  const float* gathered = nullptr;
  int32_t* again = nullptr;
  int32_t rank = 0, ranks = 1;
};

// As vattn_selection.
struct Selection {
  int64_t capacity = 0;
  int32_t* tokens = nullptr;
  float* log_weights = nullptr;
  int32_t* counts = nullptr;
};

// FULL if a selection needs more entries than the arrays have.
inline absl::Status CheckCapacity(int64_t need, const Selection& selection) {
  if (need <= selection.capacity) return absl::OkStatus();
  return FullError("capacity is ", selection.capacity, ", this selection needs ", need,
                   " entries; counts has them");
}

class Runtime;

// INVALID_ARGUMENT unless the runtime has the layer and keeps it.
absl::Status CheckLayer(const Runtime& runtime, int32_t layer);
// INVALID_ARGUMENT unless the caller's scores are given where they are wanted, by heads of the layer,
// which has been checked. What their stride must be at least is left to who knows the lengths.
absl::Status CheckScores(const Runtime& runtime, const AttendRequest& request);
// The most that the stride of scores may be: more than a context has tokens, so that the place of a
// score does not wrap around.
inline constexpr int64_t kMostScoresStride = int64_t{1} << 32;

}  // namespace vattn

#endif  // VATTN_RUNTIME_ATTEND_REQUEST_H_
