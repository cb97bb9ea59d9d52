#include "bench/trace/trace_views.h"

#include <algorithm>
#include <functional>
#include <string>

#include "bench/cli/dtype.h"
#include "bench/cli/failure.h"

namespace vattn::bench {
namespace {

// Rows [layers][heads][tokens] of `from`; head_of and token_of say which row of it goes where.
Tensor Pick(const Tensor& from, std::span<const int32_t> layers, int64_t heads, int64_t tokens,
            const std::function<int64_t(int64_t)>& head_of, const std::function<int64_t(int64_t)>& token_of) {
  const int64_t dim = from.shape[3];
  const size_t row = static_cast<size_t>(dim) * ElementBytes(from.dtype);
  Tensor to;
  to.dtype = from.dtype;
  to.shape = {static_cast<int64_t>(layers.size()), heads, tokens, dim};
  to.bytes.reserve(layers.size() * heads * tokens * row);
  for (const int32_t layer : layers) {
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t token = 0; token < tokens; ++token) {
        const std::byte* at = from.Row(layer, head_of(head), token_of(token));
        to.bytes.insert(to.bytes.end(), at, at + row);
      }
    }
  }
  return to;
}

Tensor PickLayers(const Tensor& from, std::span<const int32_t> layers) {
  if (from.shape.empty()) return {};
  const auto same = [](int64_t i) { return i; };
  return Pick(from, layers, from.shape[1], from.shape[2], same, same);
}

// Everything but k and v.
Trace Rest(const Trace& trace, std::span<const int32_t> layers) {
  Trace to;
  to.path = trace.path;
  to.metadata = trace.metadata;
  for (const int32_t layer : layers) to.layer_names.push_back(trace.layer_names[layer]);
  to.layers = static_cast<int64_t>(layers.size());
  to.kv_heads = trace.kv_heads, to.q_heads = trace.q_heads;
  to.tokens = trace.tokens, to.prompt_tokens = trace.prompt_tokens, to.steps = trace.steps;
  to.prompt_queries = trace.prompt_queries;
  to.head_dim_k = trace.head_dim_k, to.head_dim_v = trace.head_dim_v;
  to.dtype = trace.dtype;
  to.q = PickLayers(trace.q, layers);
  to.q_prompt = PickLayers(trace.q_prompt, layers);
  return to;
}

}  // namespace

Trace SplitHeads(const Trace& trace, std::span<const int32_t> layers) {
  Trace to = Rest(trace, layers);
  const int64_t group = trace.q_heads / trace.kv_heads;
  const auto head_of = [&](int64_t head) { return head / group; };
  const auto same = [](int64_t token) { return token; };
  to.kv_heads = trace.q_heads;
  to.k = Pick(trace.k, layers, trace.q_heads, trace.tokens, head_of, same);
  to.v = Pick(trace.v, layers, trace.q_heads, trace.tokens, head_of, same);
  return to;
}

Trace Shorten(const Trace& trace, std::span<const int32_t> layers, int64_t prompt_tokens, int64_t sinks) {
  if (prompt_tokens > trace.prompt_tokens || prompt_tokens < std::max(sinks, trace.prompt_queries)) {
    throw UsageError("--tokens: " + std::to_string(prompt_tokens) + ", must be " +
                     std::to_string(std::max(sinks, trace.prompt_queries)) + " to the recording's " +
                     std::to_string(trace.prompt_tokens));
  }
  Trace to = Rest(trace, layers);
  const int64_t left_out = trace.prompt_tokens - prompt_tokens;
  const auto same = [](int64_t head) { return head; };
  const auto token_of = [&](int64_t token) { return token < sinks ? token : token + left_out; };
  to.prompt_tokens = prompt_tokens;
  to.tokens = trace.tokens - left_out;
  to.k = Pick(trace.k, layers, trace.kv_heads, to.tokens, same, token_of);
  to.v = Pick(trace.v, layers, trace.kv_heads, to.tokens, same, token_of);
  return to;
}

}  // namespace vattn::bench
