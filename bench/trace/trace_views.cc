#include "bench/trace/trace_views.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <string>
#include <utility>

#include "bench/cli/dtype.h"
#include "bench/cli/failure.h"

namespace vattn::bench {
namespace {

// Rows [layers][heads][tokens] of `from`; head_of and token_of say which row of it goes where.
Tensor Pick(const Tensor& from, std::span<const int32_t> layers, int64_t heads, int64_t tokens,
            const std::function<int64_t(int64_t)>& head_of,
            const std::function<int64_t(int64_t)>& token_of) {
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

namespace {

// Queries of the tokens that position_of gives, for all layers.
Tensor PickQueries(const Trace& trace, int64_t count,
                   const std::function<int64_t(int64_t)>& position_of) {
  Tensor to;
  if (count == 0) return to;
  const size_t row = static_cast<size_t>(trace.head_dim_k) * ElementBytes(trace.q.dtype);
  to.dtype = trace.q.dtype;
  to.shape = {trace.layers, trace.q_heads, count, trace.head_dim_k};
  to.bytes.reserve(trace.layers * trace.q_heads * count * row);
  for (int64_t layer = 0; layer < trace.layers; ++layer) {
    for (int64_t head = 0; head < trace.q_heads; ++head) {
      for (int64_t i = 0; i < count; ++i) {
        const std::byte* at = QueryRow(trace, layer, head, position_of(i));
        to.bytes.insert(to.bytes.end(), at, at + row);
      }
    }
  }
  return to;
}

std::vector<int32_t> AllLayers(const Trace& trace) {
  std::vector<int32_t> layers(trace.layers);
  std::iota(layers.begin(), layers.end(), 0);
  return layers;
}

// With q and q_prompt of the new split.
Trace Resplit(const Trace& trace, int64_t prompt_tokens, int64_t tokens, Tensor q_prompt,
              Tensor q) {
  Trace to;
  to.path = trace.path;
  to.metadata = trace.metadata;
  to.layer_names = trace.layer_names;
  to.layers = trace.layers, to.kv_heads = trace.kv_heads, to.q_heads = trace.q_heads;
  to.head_dim_k = trace.head_dim_k, to.head_dim_v = trace.head_dim_v;
  to.dtype = trace.dtype;
  to.prompt_tokens = prompt_tokens, to.tokens = tokens;
  to.prompt_queries = q_prompt.shape.empty() ? 0 : q_prompt.shape[2];
  to.steps = q.shape[2];
  to.q_prompt = std::move(q_prompt);
  to.q = std::move(q);
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

Trace Shorten(const Trace& trace, std::span<const int32_t> layers, int64_t prompt_tokens,
              int64_t sinks) {
  if (prompt_tokens > trace.prompt_tokens ||
      prompt_tokens < std::max(sinks, trace.prompt_queries)) {
    throw UsageError("--tokens: " + std::to_string(prompt_tokens) + ", must be " +
                     std::to_string(std::max(sinks, trace.prompt_queries)) +
                     " to the recording's " + std::to_string(trace.prompt_tokens));
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

Trace SplitAt(const Trace& trace, int64_t prompt_tokens, int64_t steps, int64_t queries,
              int64_t queries_end) {
  const int64_t first = FirstQuery(trace), last = trace.prompt_tokens + trace.steps;
  if (queries_end == 0) queries_end = prompt_tokens;
  if (queries == 0) queries = std::max<int64_t>(0, queries_end - first);
  if (steps == 0) steps = last - prompt_tokens;
  const auto check = [&](const char* what, int64_t begin, int64_t end) {
    if (begin >= first && end <= last && begin <= end) return;
    throw UsageError(std::string(what) + ": tokens " + std::to_string(begin) + " to " +
                     std::to_string(end - 1) + ", the recording has queries of " +
                     std::to_string(first) + " to " + std::to_string(last - 1));
  };
  check("--prompt-tokens", prompt_tokens, prompt_tokens + steps);
  check("--queries-end", queries_end - queries, queries_end);
  const std::vector<int32_t> layers = AllLayers(trace);
  const auto same = [](int64_t i) { return i; };
  Trace to =
      Resplit(trace, prompt_tokens, prompt_tokens + steps,
              PickQueries(trace, queries, [&](int64_t i) { return queries_end - queries + i; }),
              PickQueries(trace, steps, [&](int64_t i) { return prompt_tokens + i; }));
  to.k = Pick(trace.k, layers, trace.kv_heads, to.tokens, same, same);
  to.v = Pick(trace.v, layers, trace.kv_heads, to.tokens, same, same);
  return to;
}

Trace RepeatStep(const Trace& trace, int64_t step, int64_t times) {
  if (step >= trace.steps) {
    throw UsageError("--repeat-step: " + std::to_string(step) + ", the recording has " +
                     std::to_string(trace.steps) + ", counted from 0");
  }
  const int64_t at = trace.prompt_tokens + step;
  const std::vector<int32_t> layers = AllLayers(trace);
  const auto same = [](int64_t i) { return i; };
  const auto token_of = [&](int64_t token) { return std::min(token, at); };
  Trace to = Resplit(
      trace, at, at + times,
      PickQueries(trace, trace.prompt_queries, [&](int64_t i) { return FirstQuery(trace) + i; }),
      PickQueries(trace, times, [&](int64_t) { return at; }));
  to.k = Pick(trace.k, layers, trace.kv_heads, to.tokens, same, token_of);
  to.v = Pick(trace.v, layers, trace.kv_heads, to.tokens, same, token_of);
  return to;
}

}  // namespace vattn::bench
