// A pool of blocks of the caller's own, as vattn_paged_options and the arrays of its steps have it.
#ifndef VATTN_RUNTIME_PAGED_POOL_H_
#define VATTN_RUNTIME_PAGED_POOL_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/params.h"
#include "runtime/index/index.h"

namespace vattn {

// Fields are those of vattn_paged_options.
struct PagedOptions {
  std::string tables, model;  // empty: none
  std::vector<void*> k, v;    // [layers]; v is empty with shared_kv
  std::vector<void*> codes;   // [layers], or empty
  int64_t num_blocks = 0;
  int64_t block_stride = 0, token_stride = 0, head_stride = 0;  // elements
  int64_t code_block_stride = 0;                                // bytes
  int64_t max_tokens = 0, max_step_tokens = 0;
  uint64_t hot_bytes = 0;
  int32_t block_tokens = 0, max_requests = 0, max_query_tokens = 0;
  bool pinned = false;
};

// As vattn_paged_rows; strides are resolved.
struct PagedRows {
  int layer = 0;
  int64_t num_tokens = 0;
  const int64_t* slots = nullptr;
  const void* k = nullptr;
  const void* v = nullptr;
  int64_t k_token_stride = 0, k_head_stride = 0;
  int64_t v_token_stride = 0, v_head_stride = 0;
};

// As vattn_paged_step.
struct PagedStep {
  int32_t num_requests = 0;
  int32_t max_query_tokens = 1;
  int64_t num_query_tokens = 0;
  const int32_t* block_table = nullptr;
  int64_t block_table_stride = 0;
  const int32_t* lengths = nullptr;
  const int32_t* query_starts = nullptr;
  const int32_t* request_rows = nullptr;
  const int32_t* resets = nullptr;
};

// As vattn_paged_prefill_params; strides are resolved.
struct PagedPrefill {
  int layer = 0;
  int out_dtype = 0;
  int64_t num_tokens = 0, length = 0;
  const int32_t* blocks = nullptr;
  const void* q = nullptr;
  int64_t q_token_stride = 0, q_head_stride = 0;
  void* out = nullptr;
  float* lse = nullptr;
};

// Options that were checked, with what follows from them.
struct PagedPool {
  PagedOptions options;
  // Rows of each layer as the host finds them: base is that of the layer's K, and V lies row.v_offset
  // bytes behind. codes are the caller's, or null.
  std::vector<Storage> layers;
  // [layers][KV heads]; empty where nothing is coded.
  std::vector<std::vector<std::shared_ptr<const Index>>> tables;

  bool coded() const { return !tables.empty(); }
  int64_t num_slots() const { return options.num_blocks * options.block_tokens; }
  int64_t BlocksOf(int64_t tokens) const {
    return (tokens + options.block_tokens - 1) / options.block_tokens;
  }
};

// The number that keys the random numbers of a request: that of its row, and how many requests the row
// had before.
VATTN_HD inline uint64_t RequestId(uint64_t row, uint64_t requests_before) {
  return requests_before << 16 | row;
}

}  // namespace vattn

#endif  // VATTN_RUNTIME_PAGED_POOL_H_
