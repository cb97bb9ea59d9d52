#include "bench/step/step_prompt.h"

#include <algorithm>

#include "bench/cli/dtype.h"
#include "bench/cli/handles.h"
#include "bench/cli/parallel.h"

namespace vattn::bench {
namespace {

constexpr int64_t kChunk = 16384;  // tokens appended at a time
constexpr int64_t kPiece = 512;    // of them made by a thread at a time

// Rows of `count` tokens of every KV head, [kv_heads, count, head_dim].
void MakeRows(const DecodeShape& shape, const DecodeData& data, int32_t sequence, int32_t layer,
              int64_t first, int64_t count, int threads, std::vector<std::byte>* k,
              std::vector<std::byte>* v) {
  const size_t dim = shape.head_dim, row = dim * ElementBytes(shape.dtype);
  k->resize(count * row * shape.kv_heads);
  v->resize(k->size());
  const int64_t pieces = (count + kPiece - 1) / kPiece;
  ParallelFor(threads, pieces * shape.kv_heads, [&](int64_t task) {
    const int64_t head = task / pieces, begin = task % pieces * kPiece;
    const int64_t tokens = std::min(kPiece, count - begin);
    std::vector<float> a(tokens * dim), b(a.size());
    data.Rows({sequence, layer, head}, first + begin, tokens, a.data(), b.data());
    const size_t to = (head * count + begin) * row;
    FromFloat(shape.dtype, a.data(), a.size(), k->data() + to);
    FromFloat(shape.dtype, b.data(), b.size(), v->data() + to);
  });
}

// The calibrating queries, [prompt_queries, q_heads, head_dim].
std::vector<std::byte> MakePromptQueries(const DecodeShape& shape, const DecodeData& data,
                                         int32_t sequence, int32_t layer) {
  const size_t row = shape.head_dim * ElementBytes(shape.dtype);
  std::vector<std::byte> queries(data.prompt_queries() * shape.q_heads * row);
  std::vector<float> q(shape.head_dim);
  for (int64_t i = 0; i < data.prompt_queries(); ++i) {
    for (int32_t head = 0; head < shape.q_heads; ++head) {
      data.PromptQuery({sequence, layer, head}, i, q.data());
      FromFloat(shape.dtype, q.data(), q.size(), &queries[(i * shape.q_heads + head) * row]);
    }
  }
  return queries;
}

}  // namespace

void AppendPrompt(const DecodeShape& shape, const DecodeData& data, int32_t sequence, int32_t layer,
                  int threads, const std::vector<vattn_sequence*>& to) {
  const std::vector<std::byte> queries = MakePromptQueries(shape, data, sequence, layer);
  std::vector<std::byte> k, v;
  for (int64_t first = 0; first < shape.tokens;) {
    // The last chunk has to be as long as the queries that go with it.
    const int64_t left = shape.tokens - first;
    const int64_t count = left <= kChunk + data.prompt_queries() ? left : kChunk;
    MakeRows(shape, data, sequence, layer, first, count, threads, &k, &v);
    vattn_append_params params;
    vattn_append_params_init(&params, sizeof(params));
    params.layer = layer;
    params.num_tokens = count;
    params.k = k.data();
    params.v = v.data();
    params.k_token_stride = params.v_token_stride = shape.head_dim;
    params.k_head_stride = params.v_head_stride = count * shape.head_dim;
    if (count == left && !queries.empty()) {
      params.q = queries.data();
      params.num_queries = static_cast<int32_t>(data.prompt_queries());
    }
    for (vattn_sequence* const one : to) Check(vattn_append(one, &params), "vattn_append");
    first += count;
  }
}

std::vector<LayerInputs> MakeInputs(const DecodeShape& shape, const DecodeData& data,
                                    const StepInputs& step) {
  const size_t dim = shape.head_dim, row = dim * ElementBytes(shape.dtype);
  std::vector<LayerInputs> inputs(shape.layers);
  std::vector<float> a(dim), b(dim);
  for (int32_t layer = 0; layer < shape.layers; ++layer) {
    LayerInputs& in = inputs[layer];
    in.q.resize(row * shape.q_heads * shape.batch);
    in.k.resize(row * shape.kv_heads * shape.batch);
    in.v.resize(in.k.size());
    for (int32_t sequence = 0; sequence < shape.batch; ++sequence) {
      const int32_t source = step.shared ? 0 : sequence;
      const int64_t query = step.query + (sequence - source);
      for (int32_t head = 0; head < shape.q_heads; ++head) {
        data.Query({source, layer, head}, query, a.data());
        FromFloat(shape.dtype, a.data(), dim, &in.q[(sequence * shape.q_heads + head) * row]);
      }
      for (int32_t head = 0; head < shape.kv_heads; ++head) {
        const size_t to = (sequence * shape.kv_heads + head) * row;
        data.Rows({source, layer, head}, shape.tokens + step.token, 1, a.data(), b.data());
        FromFloat(shape.dtype, a.data(), dim, &in.k[to]);
        FromFloat(shape.dtype, b.data(), dim, &in.v[to]);
      }
    }
  }
  return inputs;
}

}  // namespace vattn::bench
