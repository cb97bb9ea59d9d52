#include "bench/step.h"

#include <algorithm>
#include <chrono>
#include <cstddef>

#include "bench/dtype.h"
#include "bench/environment.h"
#include "bench/handles.h"
#include "bench/parallel.h"
#include "bench/statistics.h"

namespace vattn::bench {
namespace {

constexpr int64_t kWarmUp = 4;    // steps that do not count: the first may be exact
constexpr int64_t kStretch = 4;   // steps that one policy takes before the other has its turn
constexpr int64_t kChunk = 4096;  // tokens appended at a time

using Clock = std::chrono::steady_clock;

double Microseconds(Clock::time_point since) {
  return std::chrono::duration<double, std::micro>(Clock::now() - since).count();
}

// Inputs of one layer in one step, in the runtime's type.
struct LayerInputs {
  std::vector<std::byte> q;     // [batch, q_heads, head_dim]
  std::vector<std::byte> k, v;  // [batch, kv_heads, head_dim]
};

std::vector<LayerInputs> MakeInputs(const DecodeShape& shape, const DecodeData& data,
                                    int64_t step) {
  const size_t dim = shape.head_dim, row = dim * ElementBytes(shape.dtype);
  std::vector<LayerInputs> inputs(shape.layers);
  std::vector<float> a(dim), b(dim);
  for (int32_t layer = 0; layer < shape.layers; ++layer) {
    LayerInputs& in = inputs[layer];
    in.q.resize(row * shape.q_heads * shape.batch);
    in.k.resize(row * shape.kv_heads * shape.batch);
    in.v.resize(in.k.size());
    for (int32_t sequence = 0; sequence < shape.batch; ++sequence) {
      for (int32_t head = 0; head < shape.q_heads; ++head) {
        data.Query({sequence, layer, head}, step, a.data());
        FromFloat(shape.dtype, a.data(), dim, &in.q[(sequence * shape.q_heads + head) * row]);
      }
      for (int32_t head = 0; head < shape.kv_heads; ++head) {
        const size_t to = (sequence * shape.kv_heads + head) * row;
        data.Rows({sequence, layer, head}, shape.tokens + step, 1, a.data(), b.data());
        FromFloat(shape.dtype, a.data(), dim, &in.k[to]);
        FromFloat(shape.dtype, b.data(), dim, &in.v[to]);
      }
    }
  }
  return inputs;
}

// A batch of one runtime and policy.
class Decoder {
 public:
  Decoder(const DecodeShape& shape, const vattn_options& options)
      : shape_(shape),
        runtime_(CreateRuntime(options)),
        batch_(CreateBatch(runtime_.get(), shape.batch)),
        out_(static_cast<size_t>(shape.batch) * shape.q_heads * shape.head_dim),
        verdict_(static_cast<size_t>(shape.batch) * shape.q_heads),
        selected_(static_cast<size_t>(shape.batch) * shape.kv_heads),
        middle_(selected_.size()) {
    for (int32_t i = 0; i < shape.batch; ++i) {
      sequences_.push_back(CreateSequence(runtime_.get(), i + 1));
    }
  }

  vattn_sequence* sequence(int32_t i) const { return sequences_[i].get(); }

  void FinishPrompt() {
    for (int32_t i = 0; i < shape_.batch; ++i) {
      Check(vattn_sequence_build_index(sequence(i)), "vattn_sequence_build_index");
      Check(vattn_batch_set(batch_.get(), i, sequence(i)), "vattn_batch_set");
    }
  }

  void Step(const std::vector<LayerInputs>& inputs, const ReadBuffer* caches, bool counts) {
    const auto start = Clock::now();
    Check(vattn_batch_begin_step(batch_.get(), /*new_tokens=*/1, nullptr), "vattn_batch_begin_step");
    const double open_us = Microseconds(start) / shape_.layers;
    for (int32_t layer = 0; layer < shape_.layers; ++layer) {
      if (caches != nullptr) caches->ReadAll();
      vattn_attend_params params;
      vattn_attend_params_init(&params, sizeof(params));
      params.layer = layer;
      params.num_tokens = 1;
      params.out_dtype = VATTN_F32;
      params.q = inputs[layer].q.data();
      params.k_new = inputs[layer].k.data();
      params.v_new = inputs[layer].v.data();
      params.out = out_.data();
      params.verdict = verdict_.data();
      params.selected = selected_.data();
      params.middle = middle_.data();
      const auto attend_start = Clock::now();
      Check(vattn_attend(batch_.get(), &params, /*stream=*/nullptr), "vattn_attend");
      if (counts) Record(open_us + Microseconds(attend_start));
    }
  }

  const std::vector<double>& us() const { return us_; }
  double selected_share() const { return Mean(shares_); }
  double promised_share() const { return Mean(promised_); }

 private:
  void Record(double us) {
    us_.push_back(us);
    for (size_t i = 0; i < selected_.size(); ++i) {
      if (middle_[i] > 0) shares_.push_back(selected_[i] / static_cast<double>(middle_[i]));
    }
    for (const int32_t verdict : verdict_) {
      promised_.push_back(verdict == VATTN_VERDICT_VERIFIED || verdict == VATTN_VERDICT_EXACT);
    }
  }

  const DecodeShape shape_;
  Runtime runtime_;
  std::vector<Sequence> sequences_;
  Batch batch_;
  std::vector<float> out_;
  std::vector<int32_t> verdict_, selected_;
  std::vector<int64_t> middle_;
  std::vector<double> us_, shares_, promised_;
};

// Rows of `count` tokens of every KV head, [kv_heads, count, head_dim].
void MakeRows(const DecodeShape& shape, const DecodeData& data, int32_t sequence, int32_t layer,
              int64_t first, int64_t count, std::vector<std::byte>* k, std::vector<std::byte>* v) {
  const size_t head_bytes = count * shape.head_dim * ElementBytes(shape.dtype);
  k->resize(head_bytes * shape.kv_heads);
  v->resize(head_bytes * shape.kv_heads);
  ParallelFor(UsableCores(), shape.kv_heads, [&](int64_t head) {
    std::vector<float> a(count * shape.head_dim), b(a.size());
    data.Rows({sequence, layer, head}, first, count, a.data(), b.data());
    FromFloat(shape.dtype, a.data(), a.size(), k->data() + head * head_bytes);
    FromFloat(shape.dtype, b.data(), b.size(), v->data() + head * head_bytes);
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

void AppendPrompt(const DecodeShape& shape, const DecodeData& data, int32_t sequence, int32_t layer,
                  const std::vector<Decoder*>& decoders) {
  const std::vector<std::byte> queries = MakePromptQueries(shape, data, sequence, layer);
  std::vector<std::byte> k, v;
  for (int64_t first = 0; first < shape.tokens;) {
    // The last chunk has to be as long as the queries that go with it.
    const int64_t left = shape.tokens - first;
    const int64_t count = left <= kChunk + data.prompt_queries() ? left : kChunk;
    MakeRows(shape, data, sequence, layer, first, count, &k, &v);
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
    for (Decoder* decoder : decoders) {
      Check(vattn_append(decoder->sequence(sequence), &params), "vattn_append");
    }
    first += count;
  }
}

}  // namespace

void SetShape(const DecodeShape& shape, int64_t steps, vattn_options* options) {
  options->num_layers = shape.layers;
  options->num_q_heads = shape.q_heads;
  options->num_kv_heads = shape.kv_heads;
  options->head_dim_k = options->head_dim_v = shape.head_dim;
  options->dtype = shape.dtype;
  options->host_bytes = HostBytes(*options, shape.tokens + kWarmUp + steps, shape.batch);
}

StepFigures MeasureStep(const DecodeShape& shape, const DecodeData& data,
                        const vattn_options& options, int64_t steps, const ReadBuffer* caches,
                        Progress* progress) {
  progress->Begin(std::to_string(shape.tokens) + " tokens: prompt");
  vattn_options dense_options = options;
  dense_options.policy = VATTN_POLICY_DENSE;
  Decoder verified(shape, options), dense(shape, dense_options);
  for (int32_t sequence = 0; sequence < shape.batch; ++sequence) {
    for (int32_t layer = 0; layer < shape.layers; ++layer) {
      AppendPrompt(shape, data, sequence, layer, {&verified, &dense});
      progress->Count(sequence * shape.layers + layer + 1, shape.batch * shape.layers);
    }
  }
  verified.FinishPrompt();
  dense.FinishPrompt();

  progress->Begin(std::to_string(shape.tokens) + " tokens: step");
  for (int64_t begin = 0; begin < kWarmUp + steps; begin += kStretch) {
    const int64_t end = std::min(begin + kStretch, kWarmUp + steps);
    for (Decoder* decoder : {&verified, &dense}) {
      for (int64_t step = begin; step < end; ++step) {
        decoder->Step(MakeInputs(shape, data, step), caches, step >= kWarmUp);
      }
    }
    progress->Count(end, kWarmUp + steps);
  }

  StepFigures figures;
  figures.tokens = shape.tokens;
  figures.verified_p50 = Quantile(verified.us(), .5);
  figures.verified_p90 = Quantile(verified.us(), .9);
  figures.dense_p50 = Quantile(dense.us(), .5);
  figures.dense_p90 = Quantile(dense.us(), .9);
  const double bytes = 2.0 * shape.head_dim * ElementBytes(shape.dtype) * shape.kv_heads *
                       shape.batch * static_cast<double>(shape.tokens);
  figures.dense_gbps = bytes / figures.dense_p50 / 1e3;
  figures.selected_share = verified.selected_share();
  figures.promised_share = verified.promised_share();
  return figures;
}

}  // namespace vattn::bench
