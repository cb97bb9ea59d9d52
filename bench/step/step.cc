#include "bench/step/step.h"

#include <algorithm>
#include <chrono>

#include "bench/cli/dtype.h"
#include "bench/cli/environment.h"
#include "bench/cli/handles.h"
#include "bench/cli/statistics.h"
#include "bench/step/step_prompt.h"

namespace vattn::bench {
namespace {

constexpr int64_t kWarmUp = 4;   // steps that do not count: the first may be exact
constexpr int64_t kStretch = 4;  // steps that one policy takes before the other has its turn

using Clock = std::chrono::steady_clock;

double Microseconds(Clock::time_point since) {
  return std::chrono::duration<double, std::micro>(Clock::now() - since).count();
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
    Check(vattn_batch_begin_step(batch_.get(), /*new_tokens=*/1, nullptr),
          "vattn_batch_begin_step");
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
      AppendPrompt(shape, data, sequence, layer, UsableCores(),
                   {verified.sequence(sequence), dense.sequence(sequence)});
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
        decoder->Step(MakeInputs(shape, data, {.query = step, .token = step}), caches,
                      step >= kWarmUp);
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
