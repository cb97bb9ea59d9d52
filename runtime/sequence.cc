#include "runtime/sequence.h"

#include <algorithm>

#include "absl/cleanup/cleanup.h"
#include "memory/status.h"

namespace vattn {

Sequence::Sequence(std::shared_ptr<Runtime> runtime, const SequenceOptions& options)
    : runtime_(std::move(runtime)),
      tenant_(runtime_->store(), options.tenant),
      id_(options.id == 0 ? runtime_->NextId() : options.id),
      blocks_(*runtime_, *this, tenant_.slot(), layers_),
      half_(runtime_->backend().MakeSequence(*runtime_)) {
  const Options& o = runtime_->options();
  layers_.resize(o.num_layers);
  for (int l = 0; l < o.num_layers; ++l) {
    layers_[l].kv_heads.resize(runtime_->kv_heads(l));
    for (KvHead& kv_head : layers_[l].kv_heads) kv_head.states.resize(runtime_->group_heads(l));
  }
  CountTables();
}

Sequence::~Sequence() {
  if (Seat* const sits_in = seat.load()) sits_in->Forget(this);
  {
    // Whoever spills it now ends first, and nobody finds it afterwards.
    const std::lock_guard<std::mutex> lock(use_);
    runtime_->sequences().Remove(this);
  }
  ReadBackState().IgnoreError();  // blocks are free only when no step reads them
  ReleaseBlocks();
}

absl::StatusOr<std::unique_ptr<Sequence>> Sequence::Create(std::shared_ptr<Runtime> runtime,
                                                           const SequenceOptions& options) {
  std::unique_ptr<Sequence> sequence(new Sequence(std::move(runtime), options));
  VATTN_RETURN_IF_ERROR(sequence->Reserve(options.reserve_tokens));
  sequence->Enlist();
  return sequence;
}

void Sequence::Enlist() {
  Touch();
  runtime_->sequences().Add(this);
}

absl::Status Sequence::ReadBackState() {
  const Seat* const sits_in = seat.load();
  return half_->ReadBackState(*this, sits_in != nullptr && sits_in->open());
}

absl::Status Sequence::CheckWhole() const {
  const Seat* const sits_in = seat.load();
  return sits_in != nullptr ? sits_in->CheckWhole() : absl::OkStatus();
}

absl::Status Sequence::Reserve(int64_t tokens) { return blocks_.Reserve(tokens); }

absl::StatusOr<SharedLayers> Sequence::Share(int64_t tokens) {
  VATTN_RETURN_IF_ERROR(CheckWhole());
  VATTN_RETURN_IF_ERROR(ReadBackState());
  VATTN_RETURN_IF_ERROR(half_->ReadBackQueries(*this));
  // What was the sequence's own is to be copied before it is written again.
  VATTN_RETURN_IF_ERROR(blocks_.ReserveForSharing(tokens));
  const absl::Cleanup give_back = [this] { blocks_.GiveBackExcess(); };
  return SharedLayers(runtime_->store(), layers_, tokens);
}

void Sequence::Adopt(SharedLayers layers) {
  layers_ = std::move(layers).Take();
  for (int l = 0; l < static_cast<int>(layers_.size()); ++l) CountTokens(l, layers_[l].tokens);
  CountTables();
}

absl::StatusOr<std::unique_ptr<Sequence>> Sequence::Fork(uint64_t id) {
  std::unique_ptr<Sequence> copy(new Sequence(runtime_, {.id = id, .tenant = tenant_.number()}));
  copy->blocks_.codes_to_load() = blocks_.codes_to_load();
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
    for (KvHead& kv_head : layer.kv_heads)
      kv_head.states.assign(kv_head.states.size(), HeadState());
  }
}

void Sequence::AddTokens(int l, int64_t count) {
  layers_[l].tokens += count;
  CountTokens(l, count);
}

void Sequence::CountTokens(int l, int64_t count) {
  if (runtime_->kv_heads(l) > 0) runtime_->counters().tokens += static_cast<uint64_t>(count);
}

absl::Status Sequence::TakeBlocksFor(const std::vector<BlockNeed>& needs) {
  const bool copies =
      std::any_of(needs.begin(), needs.end(), [](const BlockNeed& need) { return need.copy; });
  if (copies) VATTN_RETURN_IF_ERROR(ReadBackState());
  return blocks_.Take(needs);
}

template <class F>
absl::Status Sequence::AppendAnd(const AppendRequest& r, F&& answer) {
  if (Seat* const sits_in = seat.load()) VATTN_RETURN_IF_ERROR(sits_in->EndStep());
  VATTN_RETURN_IF_ERROR(ReadBackState());
  half_->RowsChanged();
  Layer& layer = layers_[r.layer];
  std::vector<std::unique_ptr<QueryMoment>> moments(layer.kv_heads.size());
  if (r.num_queries > 0) VATTN_RETURN_IF_ERROR(AddQueries(r, moments));
  std::vector<BlockNeed> needs;
  blocks_.ListNeeds(r.layer, layer.tokens, layer.tokens + r.num_tokens, needs);
  std::vector<const int32_t*> blocks(layer.kv_heads.size());
  absl::Cleanup undo = [this] { ReleaseSpare(); };
  VATTN_RETURN_IF_ERROR(TakeBlocksFor(needs));
  blocks_.ClaimLastBlock(layer);
  for (size_t h = 0; h < blocks.size(); ++h) blocks[h] = layer.kv_heads[h].blocks.data();
  VATTN_RETURN_IF_ERROR(runtime_->backend().Write({.storage = runtime_->storage(),
                                                   .blocks = blocks.data(),
                                                   .kv_heads = static_cast<int32_t>(blocks.size()),
                                                   .first = layer.tokens,
                                                   .count = r.num_tokens,
                                                   .k = r.k,
                                                   .v = r.v,
                                                   .k_token_stride = r.k_token_stride,
                                                   .k_head_stride = r.k_head_stride,
                                                   .v_token_stride = r.v_token_stride,
                                                   .v_head_stride = r.v_head_stride},
                                                  runtime_->workers()));
  VATTN_RETURN_IF_ERROR(answer(blocks));
  std::move(undo).Cancel();
  AddTokens(r.layer, r.num_tokens);
  for (size_t h = 0; h < moments.size(); ++h) {
    if (moments[h]) layer.kv_heads[h].moment = std::move(moments[h]);
  }
  CountTables();
  return absl::OkStatus();
}

absl::Status Sequence::Append(const AppendRequest& r) {
  return AppendAnd(r, [](const auto&) { return absl::OkStatus(); });
}

absl::Status Sequence::Prefill(const PrefillRequest& r) {
  VATTN_RETURN_IF_ERROR(runtime_->backend().CheckPrefill());
  const int layer = r.rows.layer;
  return AppendAnd(r.rows, [&](const std::vector<const int32_t*>& blocks) {
    return runtime_->backend().Prefill({.storage = runtime_->storage(),
                                        .blocks = blocks.data(),
                                        .kv_heads = runtime_->kv_heads(layer),
                                        .group_heads = runtime_->group_heads(layer),
                                        .q_heads = runtime_->options().num_q_heads,
                                        .out_dtype = r.out_dtype,
                                        .first = layers_[layer].tokens,
                                        .count = r.rows.num_tokens,
                                        .q = r.rows.q,
                                        .q_token_stride = r.rows.q_token_stride,
                                        .q_head_stride = r.rows.q_head_stride,
                                        .out = r.out,
                                        .lse = r.lse},
                                       runtime_->workers());
  });
}

absl::Status Sequence::Truncate(int64_t tokens) {
  if (Seat* const sits_in = seat.load()) VATTN_RETURN_IF_ERROR(sits_in->EndStep());
  VATTN_RETURN_IF_ERROR(ReadBackState());
  VATTN_RETURN_IF_ERROR(blocks_.ReserveForCut(tokens));
  CutTo(tokens);
  return absl::OkStatus();
}

void Sequence::CutTo(int64_t tokens) {
  half_->RowsChanged();
  for (int l = 0; l < static_cast<int>(layers_.size()); ++l) {
    Layer& layer = layers_[l];
    if (layer.tokens <= tokens) continue;
    layer.coded = CodedOf(layer, tokens);
    layer.codes_made = std::min(layer.codes_made, layer.coded);
    TrimSegments(layer.coded, layer.segments);  // without an allocation that could fail
    UpdateSegments(layer);
    AddTokens(l, tokens - layer.tokens);
    layer.stale_last_block = true;
    for (KvHead& kv_head : layer.kv_heads) {
      kv_head.hot.Truncate(tokens);
      kv_head.blocks.MarkChanged(tokens / kBlockTokens);
    }
  }
  blocks_.ReleaseSpare();
  blocks_.GiveBackExcess();
  CountTables();
}

void Sequence::ReleaseBlocks() {
  for (int l = 0; l < static_cast<int>(layers_.size()); ++l) AddTokens(l, -layers_[l].tokens);
  blocks_.ReleaseAll();
}

void Sequence::CountTables() {
  int64_t bytes = static_cast<int64_t>(sizeof(Sequence)) + half_->table_bytes();
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
