#include "runtime/sequence.h"

#include <algorithm>

#include "absl/cleanup/cleanup.h"
#include "memory/status.h"
#include "runtime/batch.h"

namespace vattn {

Sequence::Sequence(std::shared_ptr<Runtime> runtime, const SequenceOptions& options)
    : runtime_(std::move(runtime)),
      tenant_(runtime_->store(), options.tenant),
      id_(options.id == 0 ? runtime_->NextId() : options.id) {
  const Options& o = runtime_->options();
  layers_.resize(o.num_layers);
  for (int l = 0; l < o.num_layers; ++l) {
    layers_[l].kv_heads.resize(runtime_->kv_heads(l));
    for (KvHead& kv_head : layers_[l].kv_heads) kv_head.states.resize(runtime_->group_heads(l));
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
    absl::StatusOr<std::unique_ptr<CudaSequence>> made =
        CudaSequence::Create(*runtime_->cuda(), *this);
    if (!made.ok()) return made.status();
    cuda_ = *std::move(made);
    for (Layer& layer : layers_) {
      for (KvHead& kv_head : layer.kv_heads) kv_head.changed_from = 0;
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
                                                               const SequenceOptions& options,
                                                               SharedLayers layers) {
  std::unique_ptr<Sequence> sequence(new Sequence(std::move(runtime), options));
  sequence->Adopt(std::move(layers));
  sequence->ResetStates();
  VATTN_RETURN_IF_ERROR(sequence->Reserve(options.reserve_tokens));
  sequence->Enlist();
  return sequence;
}

void Sequence::ResetStates() {
  for (Layer& layer : layers_) {
    for (KvHead& kv_head : layer.kv_heads) kv_head.states.assign(kv_head.states.size(), HeadState());
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
  std::vector<std::unique_ptr<QueryMoment>> moments(layer.kv_heads.size());
  if (r.num_queries > 0) VATTN_RETURN_IF_ERROR(AddQueries(r, moments));
  std::vector<Need> needs;
  ListNeeds(r.layer, layer.tokens, layer.tokens + r.num_tokens, needs);
  std::vector<const int32_t*> blocks(layer.kv_heads.size());
  absl::Cleanup undo = [this] { ReleaseSpare(); };
  VATTN_RETURN_IF_ERROR(Meet(needs));
  ClaimTail(layer);
  for (size_t g = 0; g < blocks.size(); ++g) blocks[g] = layer.kv_heads[g].blocks.data();
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
    if (moments[g]) layer.kv_heads[g].moment = std::move(moments[g]);
  }
  CountTables();
  return absl::OkStatus();
}

bool Sequence::OnDevice(const void* pointer) const {
  return runtime_->cuda() != nullptr && pointer != nullptr &&
         runtime_->cuda()->device().CanFollow(pointer);
}

void Sequence::CountTables() {
  int64_t bytes =
      static_cast<int64_t>(sizeof(Sequence) + states_before_step_.capacity() * sizeof(HeadState));
  for (const Layer& layer : layers_) {
    for (const KvHead& kv_head : layer.kv_heads) {
      bytes += static_cast<int64_t>(sizeof(KvHead) + kv_head.blocks.capacity() * sizeof(int32_t) +
                                    kv_head.states.capacity() * sizeof(HeadState)) +
               kv_head.hot.bytes();
      for (const SegmentTables& tables : kv_head.tables) bytes += tables.index->bytes();
      bytes += kv_head.recent.bytes() +
               static_cast<int64_t>(kv_head.segments.capacity() * sizeof(IndexSegment));
      if (kv_head.moment) bytes += int64_t{kv_head.moment->dim()} * kv_head.moment->dim() * 8;
    }
  }
  table_bytes_.store(bytes, std::memory_order_relaxed);
}

}  // namespace vattn
