#include "runtime/sequence.h"

#include <algorithm>
#include <cstring>

#include "absl/cleanup/cleanup.h"
#include "kernels/cpu/rows.h"
#include "kernels/rng.h"
#include "memory/status.h"
#include "runtime/batch.h"

namespace vattn {
namespace {

constexpr int64_t kCalibrationTokens = 8192;  // keys that an index is made from, at most

// Rows of `count` tokens as fp32: of every `stride` runs of `run` tokens from `first` on, one. Which one is
// random (always the same for i): a text with a period would show a regular walk a fraction of its keys.
void SampleRows(const Storage& s, const std::vector<int32_t>& blocks, int64_t first, int64_t run, int64_t stride,
                int64_t count, bool values, std::vector<float>& out) {
  const int dim = values ? s.row.dim_v : s.row.dim_k;
  out.resize(static_cast<size_t>(count) * dim);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t stratum = static_cast<uint32_t>(i / run);
    const int64_t pick = Philox({{stratum, 0, 0, 0}}, 0, 0).word[0] % static_cast<uint64_t>(stride);
    const int64_t token = first + (stratum * stride + pick) * run + i % run;
    const uint8_t* row = reinterpret_cast<const uint8_t*>(s.base + blocks[token / kBlockTokens] * s.block.bytes +
                                                          token % kBlockTokens * s.row.row_bytes);
    cpu::LoadRows({.rows = &row,
                   .count = 1,
                   .offset = values ? s.row.v_offset : 0,
                   .dim = dim,
                   .dtype = s.row.dtype},
                  out.data() + i * dim);
  }
}

}  // namespace

Sequence::Sequence(std::shared_ptr<Runtime> runtime, const SequenceOptions& options)
    : runtime_(std::move(runtime)),
      tenant_(runtime_->store(), options.tenant),
      id_(options.id == 0 ? runtime_->NextId() : options.id) {
  const Options& o = runtime_->options();
  layers_.resize(o.num_layers);
  for (int l = 0; l < o.num_layers; ++l) {
    layers_[l].groups.resize(runtime_->kv_heads(l));
    for (HeadGroup& group : layers_[l].groups) group.states.resize(runtime_->group(l));
  }
  CountTables();
}

Sequence::~Sequence() {
  if (Batch* const sits_in = batch.load()) sits_in->Forget(this);
  {
    // Whoever spills it now ends first, and nobody finds it afterwards.
    const std::lock_guard<std::mutex> lock(use_);
    runtime_->Delist(this);
  }
  Pull().IgnoreError();  // blocks are free only when no step reads them
  ReleaseBlocks();
}

absl::StatusOr<std::unique_ptr<Sequence>> Sequence::Create(std::shared_ptr<Runtime> runtime,
                                                           const SequenceOptions& options) {
  std::unique_ptr<Sequence> sequence(new Sequence(std::move(runtime), options));
  VATTN_RETURN_IF_ERROR(sequence->Reserve(options.reserve_tokens));
  sequence->Enlist();
  return sequence;
}

absl::StatusOr<CudaSequence*> Sequence::Cuda() {
  if (!cuda_) {
    absl::StatusOr<std::unique_ptr<CudaSequence>> made = CudaSequence::Create(*runtime_->cuda(), *this);
    if (!made.ok()) return made.status();
    cuda_ = *std::move(made);
    for (Layer& layer : layers_) {
      for (HeadGroup& group : layer.groups) group.changed_from = 0;
    }
  }
  return cuda_.get();
}

absl::Status Sequence::Pull() {
  const Batch* const sits_in = batch.load();
  return cuda_ ? cuda_->Pull(*this, sits_in != nullptr && sits_in->open()) : absl::OkStatus();
}

absl::Status Sequence::CheckWhole() const {
  const Batch* const sits_in = batch.load();
  return sits_in != nullptr ? sits_in->CheckWhole() : absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Sequence>> Sequence::Fork(uint64_t id) {
  std::unique_ptr<Sequence> copy(new Sequence(runtime_, {.id = id, .tenant = tenant_.number()}));
  copy->codes_to_load_ = codes_to_load_;
  absl::StatusOr<SharedLayers> layers = Share(kAllTokens);
  if (!layers.ok()) return layers.status();
  copy->Adopt(*std::move(layers));
  copy->step_ = step_;
  copy->Enlist();
  return copy;
}

absl::StatusOr<std::unique_ptr<Sequence>> Sequence::FromLayers(std::shared_ptr<Runtime> runtime,
                                                               const SequenceOptions& options, SharedLayers layers) {
  std::unique_ptr<Sequence> sequence(new Sequence(std::move(runtime), options));
  sequence->Adopt(std::move(layers));
  sequence->ResetStates();
  VATTN_RETURN_IF_ERROR(sequence->Reserve(options.reserve_tokens));
  sequence->Enlist();
  return sequence;
}

void Sequence::ResetStates() {
  for (Layer& layer : layers_) {
    for (HeadGroup& group : layer.groups) group.states.assign(group.states.size(), HeadState());
  }
}

void Sequence::AddTokens(int l, int64_t count) {
  layers_[l].tokens += count;
  CountTokens(l, count);
}

void Sequence::CountTokens(int l, int64_t count) {
  if (runtime_->kv_heads(l) > 0) runtime_->counters().tokens += static_cast<uint64_t>(count);
}

absl::Status Sequence::Append(const AppendRequest& r) {
  if (Batch* const sits_in = batch.load()) VATTN_RETURN_IF_ERROR(sits_in->EndStep());
  VATTN_RETURN_IF_ERROR(Pull());
  if (cuda_) cuda_->ForgetFixed();
  Layer& layer = layers_[r.layer];
  const Storage& s = runtime_->storage();
  std::vector<std::unique_ptr<QueryMoment>> moments(layer.groups.size());
  if (r.num_queries > 0) VATTN_RETURN_IF_ERROR(AddQueries(r, moments));
  std::vector<Need> needs;
  ListNeeds(r.layer, layer.tokens, layer.tokens + r.num_tokens, needs);
  std::vector<const int32_t*> blocks(layer.groups.size());
  absl::Cleanup undo = [this] { ReleaseSpare(); };
  VATTN_RETURN_IF_ERROR(Meet(needs));
  ClaimTail(layer);
  for (size_t g = 0; g < blocks.size(); ++g) blocks[g] = layer.groups[g].blocks.data();
  const WriteParams write{.storage = s,
                          .blocks = blocks.data(),
                          .kv_heads = static_cast<int32_t>(blocks.size()),
                          .first = layer.tokens,
                          .count = r.num_tokens,
                          .k = r.k,
                          .v = r.v,
                          .k_token_stride = r.k_token_stride,
                          .k_head_stride = r.k_head_stride,
                          .v_token_stride = r.v_token_stride,
                          .v_head_stride = r.v_head_stride};
  if (OnDevice(r.k)) {
    VATTN_RETURN_IF_ERROR(runtime_->cuda()->Write(write));
  } else {
    runtime_->ops().write(write, runtime_->stream());
  }
  std::move(undo).Cancel();
  AddTokens(r.layer, r.num_tokens);
  for (size_t g = 0; g < moments.size(); ++g) {
    if (moments[g]) layer.groups[g].moment = std::move(moments[g]);
  }
  CountTables();
  return absl::OkStatus();
}

bool Sequence::OnDevice(const void* pointer) const {
  return runtime_->cuda() != nullptr && pointer != nullptr && runtime_->cuda()->device().CanFollow(pointer);
}

absl::Status Sequence::AddQueries(const AppendRequest& r, std::vector<std::unique_ptr<QueryMoment>>& moments) const {
  const Storage& s = runtime_->storage();
  // Those on the device come over whole, from the first element to the last.
  const uint8_t* q = static_cast<const uint8_t*>(r.q);
  std::vector<uint8_t> copied;
  if (OnDevice(r.q)) {
    const int64_t last = (r.num_queries - 1) * r.q_token_stride +
                         (runtime_->options().num_q_heads - 1) * r.q_head_stride + s.row.dim_k;
    copied.resize(static_cast<size_t>(last * ElementBytes(s.row.dtype)));
    VATTN_RETURN_IF_ERROR(runtime_->cuda()->Read(copied.data(), r.q, copied.size()));
    q = copied.data();
  }
  const int group = runtime_->group(r.layer), dim = s.row.dim_k, element = ElementBytes(s.row.dtype);
  for (size_t g = 0; g < moments.size(); ++g) {
    const HeadGroup& heads = layers_[r.layer].groups[g];
    if (heads.index) continue;
    moments[g] = heads.moment ? std::make_unique<QueryMoment>(*heads.moment) : std::make_unique<QueryMoment>(dim);
    std::vector<float> queries(static_cast<size_t>(r.num_queries) * group * dim);
    for (int64_t i = 0; i < int64_t{r.num_queries} * group; ++i) {
      const int64_t at = i / group * r.q_token_stride + (static_cast<int64_t>(g) * group + i % group) * r.q_head_stride;
      const uint8_t* row = q + at * element;
      cpu::LoadRows({.rows = &row, .count = 1, .offset = 0, .dim = dim, .dtype = s.row.dtype}, queries.data() + i * dim);
    }
    for (float& x : queries) x *= s.scale;
    moments[g]->Add(queries.data(), int64_t{r.num_queries} * group, group);
  }
  return absl::OkStatus();
}

int64_t Sequence::MiddleEnd(int64_t tokens) const {
  const Options& o = runtime_->options();
  const int64_t end = (tokens - o.window) / kCodeTokens * kCodeTokens;
  return end - o.sinks >= o.exact_below ? end : std::min<int64_t>(o.sinks, tokens);
}

absl::Status Sequence::BuildIndex() {
  if (Batch* const sits_in = batch.load()) VATTN_RETURN_IF_ERROR(sits_in->EndStep());
  VATTN_RETURN_IF_ERROR(MakeRoomAndCode(0));
  if (runtime_->cuda() == nullptr) return absl::OkStatus();
  absl::StatusOr<CudaSequence*> cuda = Cuda();
  if (!cuda.ok()) return cuda.status();
  Device& device = runtime_->cuda()->device();
  VATTN_RETURN_IF_ERROR((*cuda)->Flush(*this, device.stream()));
  return device.Synchronize(device.stream());
}

absl::Status Sequence::OpenStep(int new_tokens) {
  states_before_step_.clear();
  for (const Layer& layer : layers_) {
    if (layer.groups.empty()) continue;
    tokens_before_step_ = layer.tokens;
    if (runtime_->cuda() != nullptr) continue;
    for (const HeadGroup& group : layer.groups) {
      states_before_step_.insert(states_before_step_.end(), group.states.begin(), group.states.end());
    }
  }
  return MakeRoomAndCode(new_tokens);
}

void Sequence::GiveUpStep() {
  CutTo(tokens_before_step_);
  --step_;
  if (runtime_->cuda() != nullptr) return;
  auto before = states_before_step_.cbegin();
  for (Layer& layer : layers_) {
    for (HeadGroup& group : layer.groups) {
      std::copy_n(before, group.states.size(), group.states.begin());
      before += static_cast<std::ptrdiff_t>(group.states.size());
    }
  }
}

absl::Status Sequence::MakeRoomAndCode(int new_tokens) {
  const int64_t sinks = runtime_->options().sinks;
  std::vector<Need> needs;
  for (int l = 0; l < static_cast<int>(layers_.size()); ++l) {
    const Layer& layer = layers_[l];
    const int64_t tokens = layer.tokens + new_tokens, end = MiddleEnd(tokens);
    const int64_t code_from = std::max(layer.coded, sinks);
    // One list per layer without repeats: what is coded lies before what is written.
    const int64_t write_from = layer.tokens / kBlockTokens * kBlockTokens;
    if (end > code_from) ListNeeds(l, code_from, std::min(end, write_from), needs);
    ListNeeds(l, end > code_from ? std::min(layer.tokens, std::max(code_from, write_from)) : layer.tokens, tokens,
              needs);
  }
  VATTN_RETURN_IF_ERROR(Meet(needs));
  for (Layer& layer : layers_) {
    if (new_tokens > 0) ClaimTail(layer);
    // An index is made from rows that steps have written.
    if (!layer.groups.empty() && !layer.groups[0].index && MiddleEnd(layer.tokens + new_tokens) > sinks) {
      VATTN_RETURN_IF_ERROR(Pull());
    }
  }
  for (int l = 0; l < static_cast<int>(layers_.size()); ++l) CodeLayer(l, MiddleEnd(layers_[l].tokens + new_tokens));
  CountTables();
  return absl::OkStatus();
}

void Sequence::CodeLayer(int l, int64_t end) {
  Layer& layer = layers_[l];
  const int64_t begin = std::max<int64_t>(layer.coded, runtime_->options().sinks);
  if (end <= begin || layer.groups.empty()) return;
  if (!layer.groups[0].index) FreezeIndex(l, end);
  if (runtime_->cuda() != nullptr) {
    layer.coded = end;  // CudaSequence::Flush codes
    return;
  }
  const Stream stream = runtime_->stream();
  cpu::ParallelFor(stream, static_cast<int64_t>(layer.groups.size()), [&](int64_t g) {
    const HeadGroup& group = layer.groups[g];
    runtime_->ops().encode({.storage = runtime_->storage(),
                            .index = group.index->tables(),
                            .blocks = group.blocks.data(),
                            .begin = begin,
                            .end = end},
                           stream);
  });
  layer.coded = end;
}

void Sequence::FreezeIndex(int l, int64_t end) {
  Layer& layer = layers_[l];
  const Storage& s = runtime_->storage();
  const int64_t sinks = runtime_->options().sinks, n = end - sinks;
  // Indices that speak for tiles are fitted on whole ones; n is a multiple of 16.
  const int64_t run = s.code.kind == IndexKind::kPage ? kTileTokens : 1;
  const int64_t stride = (n + kCalibrationTokens - 1) / kCalibrationTokens, count = n / run / stride * run;
  // All groups or none: one that fails throws.
  std::vector<std::shared_ptr<const Index>> made(layer.groups.size());
  cpu::ParallelFor(runtime_->stream(), static_cast<int64_t>(layer.groups.size()), [&](int64_t g) {
    const HeadGroup& group = layer.groups[g];
    std::vector<float> keys, values;
    SampleRows(s, group.blocks, sinks, run, stride, count, false, keys);
    SampleRows(s, group.blocks, sinks, run, stride, count, true, values);
    const QueryMoment moment = group.moment ? *group.moment : runtime_->ProfileMoment(l, static_cast<int>(g));
    made[g] =
        Index::Make(s, keys.data(), values.data(), count, moment, runtime_->LearnedMap(l, static_cast<int>(g)));
  });
  for (size_t g = 0; g < made.size(); ++g) {
    layer.groups[g].index = std::move(made[g]);
    layer.groups[g].moment.reset();
  }
}

void Sequence::CountTables() {
  int64_t bytes = static_cast<int64_t>(sizeof(Sequence) + states_before_step_.capacity() * sizeof(HeadState));
  for (const Layer& layer : layers_) {
    for (const HeadGroup& group : layer.groups) {
      bytes += static_cast<int64_t>(sizeof(HeadGroup) + group.blocks.capacity() * sizeof(int32_t) +
                                    group.states.capacity() * sizeof(HeadState)) +
               group.hot.bytes();
      if (group.index) bytes += group.index->bytes();
      if (group.moment) bytes += int64_t{group.moment->dim()} * group.moment->dim() * 8;
    }
  }
  table_bytes_.store(bytes, std::memory_order_relaxed);
}

}  // namespace vattn
