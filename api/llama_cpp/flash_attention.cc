#include "api/llama_cpp/flash_attention.h"

#include <algorithm>
#include <cstring>

#include "ggml.h"

namespace vattn::llama_cpp {
namespace {

constexpr uint16_t kVisible = 0, kHidden = 0xFC00;  // 0 and -infinity in fp16

bool IsHeadDim(int64_t dim) { return dim >= 16 && dim <= 1024 && dim % 16 == 0; }

// Whether a tensor is part of one that no node computes, as a KV cache is.
bool IsStored(const ggml_tensor& t) {
  return t.view_src != nullptr && t.view_src->op == GGML_OP_NONE;
}

bool All(const uint16_t* mask, int64_t begin, int64_t end, uint16_t value) {
  uint16_t differs = 0;
  for (int64_t i = begin; i < end; ++i) differs |= static_cast<uint16_t>(mask[i] ^ value);
  return differs == 0;
}

}  // namespace

bool IsServed(const ggml_tensor& node) {
  const ggml_tensor *q = node.src[0], *k = node.src[1], *v = node.src[2], *mask = node.src[3];
  if (node.op != GGML_OP_FLASH_ATTN_EXT || mask == nullptr || node.src[4] != nullptr) return false;
  float scale_bias_softcap[3];
  std::memcpy(scale_bias_softcap, node.op_params, sizeof(scale_bias_softcap));
  if (!(scale_bias_softcap[0] > 0) || scale_bias_softcap[1] != 0 || scale_bias_softcap[2] != 0)
    return false;
  return q->type == GGML_TYPE_F32 && k->type == GGML_TYPE_F16 && v->type == GGML_TYPE_F16 &&
         mask->type == GGML_TYPE_F16 && node.type == GGML_TYPE_F32 && ggml_is_contiguous(&node) &&
         IsStored(*k) && IsStored(*v) && IsHeadDim(k->ne[0]) && IsHeadDim(v->ne[0]) &&
         q->nb[0] == sizeof(float) && q->nb[1] % sizeof(float) == 0 &&
         q->nb[2] % sizeof(float) == 0 && k->nb[0] == 2 && v->nb[0] == 2 && k->nb[1] == v->nb[1] &&
         k->nb[2] == v->nb[2] && k->nb[1] % 2 == 0 && k->nb[2] % 2 == 0 && k->nb[1] > 0 &&
         k->ne[1] == v->ne[1] && k->ne[2] == v->ne[2] && k->ne[3] == q->ne[3] &&
         v->ne[3] == q->ne[3] && q->ne[2] % k->ne[2] == 0 && q->ne[2] <= 1024 && mask->nb[0] == 2 &&
         mask->ne[0] >= k->ne[1] && mask->ne[1] >= q->ne[1] && mask->ne[2] == 1 &&
         mask->ne[3] == q->ne[3];
}

int64_t NumStreams(const ggml_tensor& node) { return node.src[0]->ne[3]; }

FlashAttention Describe(const ggml_tensor& node, int64_t stream) {
  const ggml_tensor *q = node.src[0], *k = node.src[1], *v = node.src[2], *mask = node.src[3];
  const auto at = [stream](const ggml_tensor& t) {
    return static_cast<char*>(t.data) + stream * static_cast<int64_t>(t.nb[3]);
  };
  FlashAttention f;
  f.shape = {.q_heads = static_cast<int32_t>(q->ne[2]),
             .kv_heads = static_cast<int32_t>(k->ne[2]),
             .head_dim_k = static_cast<int32_t>(k->ne[0]),
             .head_dim_v = static_cast<int32_t>(v->ne[0])};
  std::memcpy(&f.shape.scale, node.op_params, sizeof(float));
  f.q = reinterpret_cast<const float*>(at(*q));
  f.q_token_stride = static_cast<int64_t>(q->nb[1] / sizeof(float));
  f.q_head_stride = static_cast<int64_t>(q->nb[2] / sizeof(float));
  f.k = reinterpret_cast<uint16_t*>(at(*k));
  f.v = reinterpret_cast<uint16_t*>(at(*v));
  f.cell_stride = static_cast<int64_t>(k->nb[1] / 2);
  f.head_stride = static_cast<int64_t>(k->nb[2] / 2);
  // A stream ends where the next one begins, the last one with the cache.
  const auto cells = [&](const ggml_tensor& t) {
    const char* const end = static_cast<char*>(t.view_src->data) + ggml_nbytes(t.view_src);
    const int64_t rest = (end - at(t)) / static_cast<int64_t>(t.nb[1]);
    const int64_t row = t.ne[2] * static_cast<int64_t>(t.nb[2]);
    // The last cell may be shorter than a stride.
    const int64_t last = (end - at(t)) % static_cast<int64_t>(t.nb[1]) >= row ? 1 : 0;
    const int64_t in_stream = t.ne[3] > 1 ? static_cast<int64_t>(t.nb[3] / t.nb[1]) : rest + last;
    return std::max(t.ne[1], std::min(in_stream, rest + last));
  };
  f.capacity = std::min(cells(*k), cells(*v));
  f.num_cells = k->ne[1];
  f.mask = reinterpret_cast<const uint16_t*>(at(*mask));
  f.mask_stride = static_cast<int64_t>(mask->nb[1] / 2);
  f.num_tokens = static_cast<int32_t>(q->ne[1]);
  f.out = reinterpret_cast<float*>(at(node));
  return f;
}

Run FindRun(const FlashAttention& f) {
  const uint16_t* const first = f.mask;
  int64_t begin = 0;
  while (begin < f.num_cells && first[begin] == kHidden) ++begin;
  int64_t end = begin;
  while (end < f.num_cells && first[end] == kVisible) ++end;
  if (end == begin || end + f.num_tokens - 1 > f.num_cells) return {};
  for (int32_t i = 0; i < f.num_tokens; ++i) {
    const uint16_t* const row = f.mask + i * f.mask_stride;
    if (!All(row, 0, begin, kHidden) || !All(row, begin, end + i, kVisible) ||
        !All(row, end + i, f.num_cells, kHidden))
      return {};
  }
  return {begin, end + f.num_tokens - 1};
}

}  // namespace vattn::llama_cpp
