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

int64_t BlocksFor(int64_t tokens) { return (tokens + kBlockTokens - 1) / kBlockTokens; }

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

Sequence::Sequence(std::shared_ptr<Runtime> runtime, uint64_t id) : runtime_(std::move(runtime)), id_(id) {
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

absl::StatusOr<std::unique_ptr<Sequence>> Sequence::Create(std::shared_ptr<Runtime> runtime, uint64_t id,
                                                           int64_t reserve_tokens) {
  Runtime& r = *runtime;
  int64_t blocks = 0;
  for (int l = 0; l < r.options().num_layers; ++l) blocks += BlocksFor(reserve_tokens) * r.kv_heads(l);
  std::unique_ptr<Sequence> sequence(new Sequence(std::move(runtime), id == 0 ? r.NextId() : id));
  if (blocks > 0) VATTN_RETURN_IF_ERROR(r.Reserve(blocks));
  sequence->reserved_ = blocks;
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

absl::StatusOr<std::unique_ptr<Sequence>> Sequence::Fork(uint64_t id) {
  VATTN_RETURN_IF_ERROR(Pull());
  std::unique_ptr<Sequence> copy(new Sequence(runtime_, id == 0 ? runtime_->NextId() : id));
  for (int l = 0; l < runtime_->options().num_layers; ++l) {
    const Layer& from = layers_[l];
    Layer& to = copy->layers_[l];
    to.coded = from.coded;
    to.coded_on_device = from.coded_on_device;
    copy->AddTokens(l, from.tokens);
    for (size_t g = 0; g < from.groups.size(); ++g) {
      to.groups[g].blocks = from.groups[g].blocks;
      for (const int32_t block : to.groups[g].blocks) runtime_->store().AddReference(BlockId{block});
      to.groups[g].index = from.groups[g].index;
      if (from.groups[g].moment) to.groups[g].moment = std::make_unique<QueryMoment>(*from.groups[g].moment);
      to.groups[g].states = from.groups[g].states;
      to.groups[g].device_index = from.groups[g].device_index;
    }
  }
  copy->codes_to_load_ = codes_to_load_;
  copy->step_ = step_;
  copy->CountTables();
  copy->Enlist();
  return copy;
}

void Sequence::AddTokens(int l, int64_t count) {
  layers_[l].tokens += count;
  if (runtime_->kv_heads(l) > 0) runtime_->counters().tokens += static_cast<uint64_t>(count);
}

void Sequence::ListNeeds(int l, int64_t begin, int64_t end, std::vector<Need>& needs) const {
  for (int g = 0; g < static_cast<int>(layers_[l].groups.size()); ++g) {
    const std::vector<int32_t>& blocks = layers_[l].groups[g].blocks;
    const int64_t have = static_cast<int64_t>(blocks.size());
    for (int64_t b = begin / kBlockTokens; b < BlocksFor(end); ++b) {
      const bool copy = b < have;
      if (copy && runtime_->store().IsUnique(BlockId{blocks[b]})) continue;
      needs.push_back({l, g, b, copy});
    }
  }
}

absl::Status Sequence::Meet(const std::vector<Need>& needs) {
  from_reserve_ = 0;
  if (needs.empty()) return absl::OkStatus();
  HostStore& store = runtime_->store();
  const int64_t count = static_cast<int64_t>(needs.size()), own = std::min(reserved_, count);
  // Whatever may fail comes before the first block is taken.
  std::vector<BlockId> taken(needs.size());
  bool copies = false;
  for (auto need = needs.rbegin(); need != needs.rend(); ++need) {  // the most blocks of a group first
    std::vector<int32_t>& blocks = layers_[need->layer].groups[need->group].blocks;
    const size_t room = static_cast<size_t>(need->block) + 1;
    if (blocks.capacity() < room) blocks.reserve(std::max(room, blocks.capacity() * 3 / 2));
    copies |= need->copy;
  }
  if (runtime_->cuda() != nullptr) codes_to_load_.reserve(codes_to_load_.size() + needs.size());
  if (copies) VATTN_RETURN_IF_ERROR(Pull());  // a step may still read the blocks that are let go
  VATTN_RETURN_IF_ERROR(TakeBlocks(own, count, taken.data()));
  from_reserve_ = own;
  for (size_t i = 0; i < needs.size(); ++i) {
    HeadGroup& group = layers_[needs[i].layer].groups[needs[i].group];
    std::vector<int32_t>& blocks = group.blocks;
    const int32_t id = static_cast<int32_t>(taken[i]);
    group.changed_from = std::min(group.changed_from, needs[i].block);
    group.unseen_from = std::min(group.unseen_from, needs[i].block);
    if (runtime_->cuda() != nullptr) runtime_->cuda()->Renew(id);
    if (!needs[i].copy) {
      blocks.push_back(id);
      continue;
    }
    const BlockId shared{blocks[needs[i].block]};
    std::memcpy(store.data(taken[i]), store.data(shared), store.block_bytes());
    if (runtime_->cuda() != nullptr) codes_to_load_.push_back(id);
    blocks[needs[i].block] = id;
    store.Release(shared);
    ++runtime_->counters().blocks_copied;
  }
  return absl::OkStatus();
}

absl::Status Sequence::TakeBlocks(int64_t own, int64_t count, BlockId* out) {
  HostStore& store = runtime_->store();
  int64_t from = own, to = own;  // of out: those that were taken
  absl::Cleanup undo = [&] {
    for (; from < own; ++from) store.ReleaseToReserve(out[from]);
    for (; from < to; ++from) store.Release(out[from]);
  };
  if (count > own) VATTN_RETURN_IF_ERROR(runtime_->Allocate(this, count - own, out + own));
  to = count;
  if (own > 0) VATTN_RETURN_IF_ERROR(store.AllocateReserved(own, out));
  from = 0;
  if (runtime_->cuda() != nullptr) VATTN_RETURN_IF_ERROR(runtime_->cuda()->HoldCodes(out, count));
  std::move(undo).Cancel();
  reserved_ -= own;
  return absl::OkStatus();
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

absl::Status Sequence::Truncate(int64_t tokens) {
  if (Batch* const sits_in = batch.load()) VATTN_RETURN_IF_ERROR(sits_in->EndStep());
  VATTN_RETURN_IF_ERROR(Pull());
  if (cuda_) cuda_->ForgetFixed();
  for (int l = 0; l < static_cast<int>(layers_.size()); ++l) {
    Layer& layer = layers_[l];
    if (layer.tokens <= tokens) continue;
    AddTokens(l, tokens - layer.tokens);
    layer.coded = std::min(layer.coded, tokens / kCodeTokens * kCodeTokens);
    layer.coded_on_device = std::min(layer.coded_on_device, layer.coded);
    for (HeadGroup& group : layer.groups) {
      group.hot.Truncate(tokens);
      group.changed_from = std::min(group.changed_from, tokens / kBlockTokens);
      group.unseen_from = std::min(group.unseen_from, tokens / kBlockTokens);
      // What follows in the last block will be other rows than those that a hot set may hold.
      if (runtime_->cuda() != nullptr && tokens % kBlockTokens > 0) {
        runtime_->cuda()->Renew(group.blocks[static_cast<size_t>(tokens / kBlockTokens)]);
      }
    }
  }
  from_reserve_ = 0;
  ReleaseSpare();
  CountTables();
  return absl::OkStatus();
}

void Sequence::ReleaseSpare() {
  int64_t released = 0;
  for (Layer& layer : layers_) {
    const size_t keep = static_cast<size_t>(BlocksFor(layer.tokens));
    for (HeadGroup& group : layer.groups) {
      for (size_t b = keep; b < group.blocks.size(); ++b) {
        ++released;
        if (from_reserve_ == 0) {
          runtime_->store().Release(BlockId{group.blocks[b]});
          continue;
        }
        runtime_->store().ReleaseToReserve(BlockId{group.blocks[b]});
        --from_reserve_;
        ++reserved_;
      }
      group.blocks.resize(std::min(keep, group.blocks.size()));
    }
  }
  if (runtime_->cuda() != nullptr) runtime_->cuda()->LetGo(released);
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
absl::Status Sequence::OpenStep(int new_tokens) { return MakeRoomAndCode(new_tokens); }

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
  for (const Layer& layer : layers_) {
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

void Sequence::ReleaseBlocks() {
  int64_t released = 0;
  for (int l = 0; l < static_cast<int>(layers_.size()); ++l) {
    AddTokens(l, -layers_[l].tokens);
    for (HeadGroup& group : layers_[l].groups) {
      for (const int32_t block : group.blocks) runtime_->store().Release(BlockId{block});
      released += static_cast<int64_t>(group.blocks.size());
      group.blocks.clear();
      group.unseen_from = 0;
    }
  }
  if (runtime_->cuda() != nullptr) runtime_->cuda()->LetGo(released);
  runtime_->store().Unreserve(reserved_);
  reserved_ = 0;
}

void Sequence::CountTables() {
  int64_t bytes = sizeof(Sequence);
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
