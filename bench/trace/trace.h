// Reader of recorded attention: `vattn-trace-1`, a safetensors file with
//   k, v      [layers, kv_heads, tokens, head_dim]   post-RoPE
//   q         [layers, q_heads, steps, head_dim]     post-RoPE, unscaled
//   q_prompt  [layers, q_heads, n, head_dim]         optional: queries of the last n prompt tokens
// in F32, F16 or BF16 and metadata `prompt_tokens`: step t sees tokens 0 .. prompt_tokens + t
// inclusive. Metadata `format`, if there, says vattn-trace-1; `layers`, if there, names the model
// layers that were recorded ("16" or "0,8,16").
#ifndef VATTN_BENCH_TRACE_TRACE_H_
#define VATTN_BENCH_TRACE_TRACE_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace vattn::bench {

struct Tensor {
  int32_t dtype = 0;           // vattn_dtype
  std::vector<int64_t> shape;  // four extents, or empty: not in the file
  std::vector<std::byte> bytes;

  // The head_dim elements at (layer, head, token); REQUIRES all three in range.
  const std::byte* Row(int64_t layer, int64_t head, int64_t token) const;
};

struct Trace {
  std::string path;
  std::map<std::string, std::string> metadata;
  std::vector<std::string> layer_names;  // [layers] number in the model, else place in the file
  int64_t layers = 0, kv_heads = 0, q_heads = 0;
  int64_t tokens = 0, prompt_tokens = 0, steps = 0, prompt_queries = 0;
  int64_t head_dim_k = 0, head_dim_v = 0;
  int32_t dtype = 0;  // vattn_dtype of all four; a file that mixes types is widened to F32
  Tensor k, v, q, q_prompt;
};

// Queries are there for tokens FirstQuery .. prompt_tokens + steps - 1, those of the prompt in
// q_prompt.
int64_t FirstQuery(const Trace& trace);
// REQUIRES a position of those.
const std::byte* QueryRow(const Trace& trace, int64_t layer, int64_t q_head, int64_t position);

// Trusts nothing in the file: every length is checked against the file's size before anything is
// allocated. Throws Failure, which names the file and the field.
Trace ReadTrace(const std::string& path);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_TRACE_TRACE_H_
