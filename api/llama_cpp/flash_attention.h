// A FLASH_ATTN_EXT node of ggml as vattn sees it.
#ifndef VATTN_API_LLAMA_CPP_FLASH_ATTENTION_H_
#define VATTN_API_LLAMA_CPP_FLASH_ATTENTION_H_

#include <compare>
#include <cstdint>

struct ggml_tensor;

namespace vattn::llama_cpp {

// What a runtime is made for.
struct Shape {
  int32_t q_heads = 0, kv_heads = 0;
  int32_t head_dim_k = 0, head_dim_v = 0;
  float scale = 0;
  auto operator<=>(const Shape&) const = default;
};

// One stream of a node: query tokens over one array of cells. Strides are in elements.
struct FlashAttention {
  Shape shape;
  const float* q;  // [num_tokens, q_heads, head_dim_k]
  int64_t q_token_stride, q_head_stride;
  uint16_t *k, *v;                   // [capacity, kv_heads, head_dim] of the cache, fp16
  int64_t cell_stride, head_stride;  // of both
  int64_t capacity;                  // cells that the cache has from k on
  int64_t num_cells;                 // that the mask has a word on
  const uint16_t* mask;              // [num_tokens, mask_stride], fp16
  int64_t mask_stride;
  int32_t num_tokens;
  float* out;  // [num_tokens, q_heads, head_dim_v]
};

// Whether the node is of a kind that the backend answers: an fp16 cache whose K and V have the same
// strides, and a mask; no sinks, softcap or ALiBi. Buffers need not be there yet.
bool IsServed(const ggml_tensor& node);
// Number of streams: independent attentions in one node.
int64_t NumStreams(const ggml_tensor& node);
// A stream of a served node.
FlashAttention Describe(const ggml_tensor& node, int64_t stream);

// Cells that the query tokens see: token i all of [begin, end - (num_tokens - 1) + i), and no other.
struct Run {
  int64_t begin = 0;
  int64_t end = 0;  // begin: the mask is not like that
  bool found() const { return end > begin; }
};
Run FindRun(const FlashAttention& f);

}  // namespace vattn::llama_cpp

#endif  // VATTN_API_LLAMA_CPP_FLASH_ATTENTION_H_
