#include "bench/inside/index_view.h"

#include <utility>

#include "bench/cli/failure.h"
#include "kernels/cpu/attend.h"
#include "kernels/cpu/scan.h"
#include "kernels/sampling.h"

namespace vattn::bench {
namespace {

void Check(const absl::Status& status) {
  if (!status.ok()) throw Failure(std::string(status.message()));
}

Options ToOptions(const vattn_options& from) {
  Options to;
  to.num_layers = from.num_layers, to.num_q_heads = from.num_q_heads,
  to.num_kv_heads = from.num_kv_heads;
  to.head_dim_k = from.head_dim_k, to.head_dim_v = from.head_dim_v,
  to.dtype = static_cast<DType>(from.dtype);
  to.backend = BackendKind::kCpu, to.num_threads = 1, to.host_bytes = from.host_bytes;
  to.sinks = from.sinks, to.window = from.window;
  to.index = static_cast<IndexKind>(from.index), to.index_bytes = from.index_bytes,
  to.value_bits = from.value_bits;
  to.norm = static_cast<Norm>(from.norm), to.bound = static_cast<Bound>(from.bound),
  to.epsilon = from.epsilon, to.delta = from.delta;
  to.norm_floor = from.norm_floor, to.max_looks = from.max_looks;
  to.policy = Policy::kTopK;  // has room for the scores of the middle
  if (from.sign_maps != nullptr) to.sign_maps = from.sign_maps;
  return to;
}

std::unique_ptr<Sequence> AppendPrompt(const std::shared_ptr<Runtime>& runtime, const Trace& trace,
                                       const std::vector<int32_t>& layers) {
  absl::StatusOr<std::unique_ptr<Sequence>> sequence = Sequence::Create(runtime, {.id = 1});
  Check(sequence.status());
  for (size_t l = 0; l < layers.size(); ++l) {
    const int64_t dim_k = trace.head_dim_k, dim_v = trace.head_dim_v;
    AppendRequest request{.layer = static_cast<int>(l),
                          .num_tokens = trace.prompt_tokens,
                          .num_queries = static_cast<int>(trace.prompt_queries),
                          .k = trace.k.Row(layers[l], 0, 0),
                          .v = trace.v.Row(layers[l], 0, 0),
                          .k_token_stride = dim_k,
                          .k_head_stride = trace.tokens * dim_k,
                          .v_token_stride = dim_v,
                          .v_head_stride = trace.tokens * dim_v,
                          .q_token_stride = dim_k,
                          .q_head_stride = trace.prompt_queries * dim_k};
    if (trace.prompt_queries > 0) request.q = trace.q_prompt.Row(layers[l], 0, 0);
    Check((*sequence)->Append(request));
  }
  Check((*sequence)->BuildIndex());
  return *std::move(sequence);
}

}  // namespace

IndexView::IndexView(const Trace& trace, std::vector<int32_t> layers, const vattn_options& options)
    : trace_(trace), layers_(std::move(layers)) {
  absl::StatusOr<std::shared_ptr<Runtime>> runtime = Runtime::Create(ToOptions(options), nullptr);
  Check(runtime.status());
  runtime_ = *std::move(runtime);
  sequence_ = AppendPrompt(runtime_, trace_, layers_);
  const size_t bytes =
      ScratchBytes(storage(), promise(), trace_.prompt_tokens, runtime_->group_heads(0));
  memory_.reset(static_cast<std::byte*>(::operator new (bytes, std::align_val_t{64})));
}

Group IndexView::Prepare(int64_t layer, int64_t h, int64_t step) {
  const Layer& of = Of(layer);
  Group group;
  group.blocks = of.kv_heads[h].blocks.data();
  group.tokens = of.tokens;
  group.middle_begin = runtime_->options().sinks;
  group.middle_end = sequence_->MiddleEnd(of.tokens);
  if (group.middle_end <= group.middle_begin)
    throw Failure(trace_.path + ": is too short to have a middle");
  group.group_heads = runtime_->group_heads(0);
  group.segments = of.kv_heads[h].segments.data();
  group.num_segments = static_cast<int32_t>(of.kv_heads[h].segments.size());
  group.index = group.segments[0].tables;
  group.scratch = CarveScratch(storage(), promise(), of.tokens, group.group_heads, memory_.get());
  q_.clear();
  for (int g = 0; g < group.group_heads; ++g) {
    const std::byte* row = trace_.q.Row(layers_[layer], h * group.group_heads + g, step);
    q_.insert(q_.end(), row, row + trace_.head_dim_k * ElementBytes(storage().row.dtype));
  }
  group.q = q_.data();
  cpu::ScaleQueries(storage(), group);
  return group;
}

std::vector<float> IndexView::Scores(const Group& group, IndexKind kind) const {
  cpu::ScanScores(storage(), kind, group, {});
  std::vector<float> all;
  for (int g = 0; g < group.group_heads; ++g) {
    const float* at = group.scratch.score + g * group.scratch.stride;
    all.insert(all.end(), at, at + (group.middle_end - group.middle_begin));
  }
  return all;
}

std::vector<float> IndexView::ExactScores(const Group& group) const {
  return Scores(group, IndexKind::kExact);
}

std::vector<float> IndexView::PredictedScores(Group& group, const std::vector<float>& exact) const {
  cpu::PrepareQueries(storage(), promise().index, group);
  std::vector<float> predicted = Scores(group, promise().index);
  for (size_t i = 0; i < predicted.size(); ++i) {
    if (predicted[i] == -kOutlierScore) predicted[i] = exact[i];
  }
  return predicted;
}

}  // namespace vattn::bench
