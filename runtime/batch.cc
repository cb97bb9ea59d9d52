#include "runtime/batch.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "kernels/cpu/rows.h"
#include "memory/status.h"
#include "runtime/sequence.h"

namespace vattn {
namespace {

absl::Status CheckNeed(int64_t need, int64_t capacity) {
  if (need <= capacity) return absl::OkStatus();
  return FullError("capacity is ", capacity, ", this selection needs ", need,
                   " entries; counts has them");
}

}  // namespace

Batch::Batch(std::shared_ptr<Runtime> runtime, int slots)
    : runtime_(std::move(runtime)),
      slots_(slots, nullptr),
      verdicts_(static_cast<size_t>(slots) * runtime_->options().num_q_heads),
      errors_(verdicts_.size()),
      attended_(runtime_->options().num_layers, 0) {
  runtime_->CountBatches(1);
}

Batch::~Batch() {
  if (cuda_) open_ = false;  // no call follows that would have to do without the sequences
  for (Sequence* sequence : slots_) {
    if (sequence != nullptr) Forget(sequence);
  }
  runtime_->CountBatches(-1);
}

void Batch::Forget(Sequence* sequence) {
  // What leaves in the middle of a step does not take half of a token along.
  if (LayerToAttend() >= 0) sequence->GiveUpStep();
  slots_[sequence->slot] = nullptr;
  if (open_ && cuda_) cuda_->Leave(*sequence);
  sequence->slot = -1;
  sequence->Touch();
  sequence->batch = nullptr;  // last: from here on it may be spilled
}

absl::Status Batch::Set(int slot, Sequence* sequence) {
  if (slot < 0 || slot >= slots()) return OutOfRangeError("slot", slot, 0, slots() - 1);
  if (&sequence->runtime() != runtime_.get()) {
    return InvalidArgumentError("sequence is of another runtime than the batch");
  }
  if (sequence->batch != nullptr && (sequence->batch != this || sequence->slot != slot)) {
    return InvalidArgumentError("sequence already sits in slot ", sequence->slot, " of ",
                                sequence->batch == this ? "this" : "another",
                                " batch, must sit in one at most");
  }
  VATTN_RETURN_IF_ERROR(EndStep());
  if (slots_[slot] != nullptr) Forget(slots_[slot]);
  slots_[slot] = sequence;
  sequence->batch = this;
  sequence->slot = slot;
  return absl::OkStatus();
}

absl::Status Batch::Clear(int slot) {
  if (slot < 0 || slot >= slots()) return OutOfRangeError("slot", slot, 0, slots() - 1);
  if (slots_[slot] != nullptr) Forget(slots_[slot]);
  return absl::OkStatus();
}

int Batch::LayerToAttend() const {
  // A replayed graph attends without a call: on CUDA the caller answers for it.
  if (!open_ || new_tokens_ == 0 || runtime_->cuda() != nullptr) return -1;
  if (std::all_of(slots_.begin(), slots_.end(), [](const Sequence* s) { return s == nullptr; }))
    return -1;
  for (int l = 0; l < runtime_->options().num_layers; ++l) {
    if (runtime_->kv_heads(l) > 0 && !attended_[l]) return l;
  }
  return -1;
}

absl::Status Batch::CheckWhole() const {
  const int layer = LayerToAttend();
  if (layer < 0) return absl::OkStatus();
  return InvalidArgumentError(
      "the batch has an open step that has yet to attend layer ", layer,
      ", must attend every layer first, or the step be given up (vattn_batch_abandon)");
}

absl::Status Batch::EndStep() {
  VATTN_RETURN_IF_ERROR(CheckWhole());
  open_ = false;
  return absl::OkStatus();
}

absl::Status Batch::Abandon() {
  if (!open_) return absl::OkStatus();
  // On CUDA the first one waits for what was enqueued, and a lost device leaves everything as it
  // is.
  for (Sequence* sequence : slots_) {
    if (sequence != nullptr) VATTN_RETURN_IF_ERROR(sequence->Pull());
  }
  if (cuda_) VATTN_RETURN_IF_ERROR(cuda_->LeaveAll());
  open_ = false;
  for (Sequence* sequence : slots_) {
    if (sequence != nullptr) sequence->GiveUpStep();
  }
  return absl::OkStatus();
}

absl::Status Batch::BeginStep(int new_tokens, DeviceStream stream) {
  if (new_tokens != 0 && new_tokens != 1) return OutOfRangeError("new_tokens", new_tokens, 0, 1);
  if (const int layer = LayerToAttend(); layer >= 0) {
    return InvalidArgumentError("layer ", layer,
                                " was not attended in the step before, must be, once every layer; "
                                "vattn_batch_abandon gives that step up");
  }
  const int layers = runtime_->options().num_layers;
  for (const Sequence* sequence : slots_) {
    if (sequence == nullptr) continue;
    int64_t tokens = -1;
    for (int l = 0; l < layers; ++l) {
      if (runtime_->kv_heads(l) == 0) continue;
      if (tokens >= 0 && sequence->layer(l).tokens != tokens) {
        return InvalidArgumentError("sequence in slot ", sequence->slot, " has ",
                                    sequence->layer(l).tokens, " tokens in layer ", l,
                                    ", must have as many as in the layers before: ", tokens);
      }
      tokens = sequence->layer(l).tokens;
    }
    if (tokens + new_tokens < 1) {
      return InvalidArgumentError("sequence in slot ", sequence->slot,
                                  " is empty, must have a token to attend to");
    }
    if (tokens + new_tokens > int64_t{1} << 31) {
      return InvalidArgumentError("sequence in slot ", sequence->slot, " has ", tokens,
                                  " tokens, must have fewer than 2^31");
    }
  }
  open_ = false;
  new_tokens_ = new_tokens;
  absl::Cleanup undo = [this] {
    for (Sequence* sequence : slots_) {
      if (sequence != nullptr) sequence->ReleaseSpare();
    }
  };
  for (Sequence* sequence : slots_) {
    if (sequence != nullptr) VATTN_RETURN_IF_ERROR(sequence->OpenStep(new_tokens));
  }
  if (runtime_->cuda() == nullptr) {
    VATTN_RETURN_IF_ERROR(TakeMemory());
  } else {
    if (!cuda_) {
      absl::StatusOr<std::unique_ptr<CudaBatch>> made = CudaBatch::Create(*runtime_, slots());
      VATTN_RETURN_IF_ERROR(made.status());
      cuda_ = *std::move(made);
    }
    VATTN_RETURN_IF_ERROR(cuda_->BeginStep(slots_, new_tokens, stream));
  }
  std::move(undo).Cancel();
  std::fill(attended_.begin(), attended_.end(), 0);
  open_ = true;
  for (Sequence* sequence : slots_) {
    if (sequence == nullptr) continue;
    sequence->CloseStep();
    if (runtime_->cuda() == nullptr) continue;
    // On CUDA a step's tokens count from here on: its calls may come from a replayed graph.
    for (int l = 0; l < layers; ++l) {
      if (runtime_->kv_heads(l) == 0) continue;
      sequence->AddTokens(l, new_tokens);
      ++runtime_->counters().steps;
    }
  }
  return absl::OkStatus();
}

absl::Status Batch::TakeMemory() {
  uint64_t most = 0;
  size_t most_groups = 0;
  for (int l = 0; l < runtime_->options().num_layers; ++l) {
    uint64_t bytes = 0;
    size_t groups = 0;
    for (Sequence* sequence : slots_) {
      if (sequence == nullptr || runtime_->kv_heads(l) == 0) continue;
      Layer& layer = sequence->layer(l);
      const int64_t tokens = layer.tokens + new_tokens_, end = sequence->MiddleEnd(tokens);
      bytes += static_cast<uint64_t>(runtime_->kv_heads(l)) *
               ScratchBytes(runtime_->storage(), runtime_->promise(), tokens, runtime_->group_heads(l));
      groups += layer.kv_heads.size();
      if (runtime_->options().hot_share == 0) continue;
      for (KvHead& kv_head : layer.kv_heads)
        kv_head.hot.Reserve(end, HotCapacity(end - runtime_->options().sinks));
    }
    most = std::max(most, bytes);
    most_groups = std::max(most_groups, groups);
  }
  blocks_.reserve(runtime_->options().num_q_heads);
  groups_.reserve(most_groups);
  group_slot_.reserve(most_groups);
  group_head_.reserve(most_groups);
  if (most <= scratch_.size()) return absl::OkStatus();
  absl::StatusOr<VirtualRange> range =
      VirtualRange::Reserve(most + most / 8, {.ops = runtime_->io().memory_ops});
  if (!range.ok()) return range.status();
  scratch_ = *std::move(range);
  return absl::OkStatus();
}

absl::Status Batch::CheckScores(const AttendRequest& r) const {
  const bool external = runtime_->promise().index == IndexKind::kExternal;
  const bool wanted = external && runtime_->promise().policy != Policy::kDense;
  if (r.scores == nullptr ? wanted : !external) {
    return InvalidArgumentError("scores is ", r.scores == nullptr ? "NULL" : "given", ", must be ",
                                external ? "given" : "NULL",
                                " with index = ", runtime_->options().index);
  }
  if (r.scores == nullptr) return absl::OkStatus();
  const int32_t q_heads = runtime_->options().num_q_heads, kv_heads = runtime_->kv_heads(r.layer);
  if (r.score_heads != 0 && r.score_heads != kv_heads && r.score_heads != q_heads) {
    return InvalidArgumentError("score_heads is ", r.score_heads, ", must be 0, the ", kv_heads,
                                " KV heads of the layer or the ", q_heads, " query heads");
  }
  // Tokens of a sequence, and to spare: places do not wrap
  constexpr int64_t kMostStride = int64_t{1} << 32;
  if (r.scores_stride > kMostStride)
    return OutOfRangeError("scores_stride", r.scores_stride, 0, kMostStride);
  for (const Sequence* sequence : slots_) {
    if (sequence == nullptr) continue;
    const int64_t end = sequence->MiddleEnd(sequence->layer(r.layer).tokens + new_tokens_);
    if (r.scores_stride < end) {
      return InvalidArgumentError("scores_stride is ", r.scores_stride, ", must be at least ", end,
                                  ", where the middle of the sequence in slot ", sequence->slot,
                                  " ends");
    }
  }
  return absl::OkStatus();
}

int64_t Batch::HotCapacity(int64_t middle) const {
  return static_cast<int64_t>(std::floor(runtime_->options().hot_share *
                                         static_cast<double>(std::max<int64_t>(middle, 0))));
}

absl::Status Batch::CheckRequest(const AttendRequest& r) const {
  const Options& o = runtime_->options();
  if (!open_)
    return InvalidArgumentError("no step is open, vattn_batch_begin_step must come first");
  if (r.layer < 0 || r.layer >= o.num_layers)
    return OutOfRangeError("layer", r.layer, 0, o.num_layers - 1);
  if (runtime_->kv_heads(r.layer) == 0) {
    return InvalidArgumentError("layer is ", r.layer,
                                ", which layer_kv_heads leaves out, must be one that it keeps");
  }
  if (attended_[r.layer] && runtime_->cuda() == nullptr) {
    return InvalidArgumentError("layer is ", r.layer,
                                ", which was attended in this step, must be attended once");
  }
  if (r.q == nullptr) return InvalidArgumentError("q is NULL, must be given");
  if ((r.k_new == nullptr) != (new_tokens_ == 0)) {
    return InvalidArgumentError("k_new is ", r.k_new == nullptr ? "NULL" : "given", ", must be ",
                                new_tokens_ == 0 ? "NULL" : "given",
                                " in a step with new_tokens = ", new_tokens_);
  }
  const bool want_v = new_tokens_ > 0 && o.shared_kv == 0;
  if ((r.v_new != nullptr) != want_v) {
    return InvalidArgumentError("v_new is ", r.v_new == nullptr ? "NULL" : "given", ", must be ",
                                want_v ? "given" : "NULL", " with new_tokens = ", new_tokens_,
                                " and shared_kv = ", o.shared_kv);
  }
  return absl::OkStatus();
}

void Batch::PrepareGroups(const AttendRequest& r) {
  const Options& o = runtime_->options();
  const Storage& s = runtime_->storage();
  const int kv_heads = runtime_->kv_heads(r.layer), group_size = runtime_->group_heads(r.layer);
  const int element = ElementBytes(s.row.dtype);
  groups_.clear();
  group_slot_.clear();
  group_head_.clear();
  std::byte* memory = scratch_.data();
  for (int slot = 0; slot < slots(); ++slot) {
    Sequence* sequence = slots_[slot];
    if (sequence == nullptr) continue;
    Layer& layer = sequence->layer(r.layer);
    if (new_tokens_ > 0) {
      blocks_.clear();
      for (const KvHead& kv_head : layer.kv_heads) blocks_.push_back(kv_head.blocks.data());
      const auto at = [&](const void* base, int dim) {
        return base == nullptr
                   ? nullptr
                   : static_cast<const std::byte*>(base) + int64_t{slot} * kv_heads * dim * element;
      };
      runtime_->ops().write({.storage = s,
                             .blocks = blocks_.data(),
                             .kv_heads = kv_heads,
                             .first = layer.tokens,
                             .count = new_tokens_,
                             .k = at(r.k_new, s.row.dim_k),
                             .v = at(r.v_new, s.row.dim_v),
                             .k_token_stride = int64_t{kv_heads} * s.row.dim_k,
                             .k_head_stride = s.row.dim_k,
                             .v_token_stride = int64_t{kv_heads} * s.row.dim_v,
                             .v_head_stride = s.row.dim_v},
                            Stream{});
    }
    const int64_t tokens = layer.tokens + new_tokens_;
    const int64_t begin = std::min<int64_t>(o.sinks, tokens), end = sequence->MiddleEnd(tokens);
    const int out_element = ElementBytes(static_cast<DType>(r.out_dtype));
    for (int h = 0; h < kv_heads; ++h) {
      KvHead& kv_head = layer.kv_heads[h];
      const int64_t head = int64_t{slot} * o.num_q_heads + int64_t{h} * group_size;
      Group group;
      group.blocks = kv_head.blocks.data();
      group.tokens = tokens;
      group.middle_begin = begin;
      group.middle_end = std::max(begin, end);
      group.q_heads = group_size;
      group.out_dtype = r.out_dtype;
      group.segments = kv_head.segments.data();
      group.num_segments = static_cast<int32_t>(kv_head.segments.size());
      if (group.num_segments > 0) group.index = kv_head.segments[0].tables;
      group.state = kv_head.states.data();
      group.key = MakeRandomKey(o.seed, sequence->id(), static_cast<uint32_t>(r.layer),
                                static_cast<uint32_t>(h));
      group.step = sequence->step();
      group.q = static_cast<const std::byte*>(r.q) + head * s.row.dim_k * element;
      if (r.out != nullptr)
        group.out = static_cast<std::byte*>(r.out) + head * s.row.dim_v * out_element;
      group.lse = r.lse == nullptr ? nullptr : r.lse + head;
      group.verdict = verdicts_.data() + head;
      group.error = errors_.data() + head;
      if (r.scores != nullptr) {
        const bool apart = r.score_heads == o.num_q_heads;
        const int64_t row = apart ? head : int64_t{slot} * kv_heads + h;
        group.external = r.scores + row * r.scores_stride;
        group.external_stride = apart ? r.scores_stride : 0;
      }
      group.scratch = CarveScratch(s, runtime_->promise(), tokens, group_size, memory);
      memory += ScratchBytes(s, runtime_->promise(), tokens, group_size);
      groups_.push_back(group);
      group_slot_.push_back(slot);
      group_head_.push_back(h);
    }
  }
}

void Batch::KeepQueries(const Group& group, KvHead& kv_head) {
  const Storage& s = runtime_->storage();
  if (s.code.kind != IndexKind::kBalanced) return;
  const int64_t count = int64_t{group.q_heads} * s.row.dim_k;
  std::vector<float> queries(static_cast<size_t>(count));
  const uint8_t* row = static_cast<const uint8_t*>(group.q);
  cpu::LoadRows(
      {.rows = &row, .count = 1, .offset = 0, .dim = static_cast<int>(count), .dtype = s.row.dtype},
      queries.data());
  for (float& x : queries) x *= s.scale;
  kv_head.recent.Add(queries.data(), count);
}

void Batch::Account(const AttendRequest& r) {
  const Options& o = runtime_->options();
  const int kv_heads = runtime_->kv_heads(r.layer);
  uint64_t verdicts[4] = {};
  uint64_t middle = 0, selected = 0, fetched = 0, looks = 0;
  for (size_t i = 0; i < groups_.size(); ++i) {
    const Group& group = groups_[i];
    HotSet& hot = slots_[group_slot_[i]]->layer(r.layer).kv_heads[group_head_[i]].hot;
    const int64_t n = group.middle_end - group.middle_begin;
    int64_t misses = 0;
    if (o.hot_share > 0) {
      hot.SetCapacity(HotCapacity(n));
      // A whole reading streams past the hot set.
      misses = group.all_read ? n - hot.size() : hot.Use(group.scratch.token, group.selected);
    } else {
      misses = group.selected;
    }
    const size_t at = static_cast<size_t>(group_slot_[i]) * kv_heads + group_head_[i];
    if (r.selected != nullptr) r.selected[at] = static_cast<int32_t>(group.selected);
    if (r.fetched != nullptr) r.fetched[at] = static_cast<int32_t>(misses);
    if (r.looks != nullptr) r.looks[at] = group.looks;
    if (r.middle != nullptr) r.middle[at] = n;
    if (group.noisy) runtime_->counters().heads_noisy += static_cast<uint64_t>(group.q_heads);
    if (RecentPlace(group.step) >= 0)
      KeepQueries(group, slots_[group_slot_[i]]->layer(r.layer).kv_heads[group_head_[i]]);
    for (int g = 0; g < group.q_heads; ++g) {
      const size_t head =
          static_cast<size_t>(group_slot_[i]) * o.num_q_heads + group_head_[i] * group.q_heads + g;
      if (r.verdict != nullptr) r.verdict[head] = static_cast<int32_t>(group.verdict[g]);
      if (r.error != nullptr) r.error[head] = group.error[g];
      ++verdicts[static_cast<int>(group.verdict[g])];
    }
    middle += n, selected += group.selected, fetched += misses, looks += group.looks;
  }
  Counters& c = runtime_->counters();
  c.steps += groups_.size() / static_cast<size_t>(kv_heads);
  c.heads_exact += verdicts[0], c.heads_verified += verdicts[1];
  c.heads_dense += verdicts[2], c.heads_best_effort += verdicts[3];
  c.rows_middle += middle, c.rows_selected += selected, c.rows_fetched += fetched;
  c.bytes_fetched += fetched * static_cast<uint64_t>(runtime_->storage().row.row_bytes);
  c.looks += looks;
}

void Batch::FinishLayer(int layer) {
  attended_[layer] = 1;
  for (Sequence* sequence : slots_) {
    if (sequence != nullptr) sequence->AddTokens(layer, new_tokens_);
  }
}

absl::Status Batch::Attend(const AttendRequest& r, DeviceStream stream) {
  VATTN_RETURN_IF_ERROR(CheckRequest(r));
  VATTN_RETURN_IF_ERROR(CheckScores(r));
  if (cuda_) return cuda_->Call(cuda::Task::kDecode, r, {}, stream);
  PrepareGroups(r);
  runtime_->ops().decode({.storage = runtime_->storage(),
                          .promise = runtime_->promise(),
                          .groups = groups_.data(),
                          .num_groups = static_cast<int32_t>(groups_.size())},
                         runtime_->stream());
  Account(r);
  FinishLayer(r.layer);
  return absl::OkStatus();
}

absl::Status Batch::CheckSelection(const AttendRequest& r, const Selection& selection) const {
  const int kv_heads = runtime_->kv_heads(r.layer);
  for (int slot = 0; slot < slots(); ++slot) {
    if (slots_[slot] == nullptr) continue;
    const int64_t tokens = slots_[slot]->layer(r.layer).tokens + (cuda_ ? 0 : new_tokens_);
    for (int h = 0; h < kv_heads; ++h) {
      const int64_t at = int64_t{slot} * kv_heads + h;
      const int32_t count = selection.counts[at];
      if (count < 1 || count > selection.capacity) {
        return OutOfRangeError(absl::StrCat("counts[", at, "]"), count, 1, selection.capacity);
      }
      const int32_t* list = selection.tokens + at * selection.capacity;
      for (int32_t i = 0; i < count; ++i) {
        if (list[i] < 0 || list[i] >= tokens) {
          return OutOfRangeError(absl::StrCat("tokens[", at, "][", i, "]"), list[i], 0, tokens - 1);
        }
        if (i > 0 && list[i] <= list[i - 1]) {
          return InvalidArgumentError("tokens[", at, "][", i, "] is ", list[i],
                                      ", must be over the one before: ", list[i - 1]);
        }
      }
    }
  }
  return absl::OkStatus();
}

absl::Status Batch::AttendSelected(const AttendRequest& r, const Selection& selection,
                                   DeviceStream stream) {
  VATTN_RETURN_IF_ERROR(CheckRequest(r));
  const bool readable = !cuda_ || !runtime_->cuda()->device().CanFollow(selection.counts);
  if (readable) VATTN_RETURN_IF_ERROR(CheckSelection(r, selection));
  if (cuda_) return cuda_->Call(cuda::Task::kAttendSelected, r, selection, stream);
  const int kv_heads = runtime_->kv_heads(r.layer);
  PrepareGroups(r);
  // One array row per group: empty slots have none, so rows are taken by slot and head.
  for (size_t i = 0; i < groups_.size(); ++i) {
    const int64_t at = int64_t{group_slot_[i]} * kv_heads + group_head_[i];
    Group& group = groups_[i];
    runtime_->ops().attend_selected(
        {.storage = runtime_->storage(),
         .groups = &group,
         .num_groups = 1,
         .tokens = selection.tokens + at * selection.capacity,
         .log_weights = selection.log_weights == nullptr
                            ? nullptr
                            : selection.log_weights + at * selection.capacity,
         .counts = selection.counts + at,
         .capacity = selection.capacity},
        runtime_->stream());
    group.selected = 0;
    for (int32_t k = 0; k < selection.counts[at]; ++k) {
      const int32_t token = selection.tokens[at * selection.capacity + k];
      if (token >= group.middle_begin && token < group.middle_end) {
        group.scratch.token[group.selected++] = static_cast<uint32_t>(token);
      }
    }
  }
  Account(r);
  FinishLayer(r.layer);
  return absl::OkStatus();
}

absl::Status Batch::Select(const AttendRequest& r, const Selection& selection,
                           DeviceStream stream) {
  VATTN_RETURN_IF_ERROR(CheckRequest(r));
  VATTN_RETURN_IF_ERROR(CheckScores(r));
  if (runtime_->promise().policy != Policy::kVerified) {
    return NotSupportedError("vattn_select needs policy verified, policy is ",
                             runtime_->options().policy);
  }
  const int kv_heads = runtime_->kv_heads(r.layer);
  if (cuda_) {
    VATTN_RETURN_IF_ERROR(cuda_->Call(cuda::Task::kSelect, r, selection, stream));
    if (runtime_->cuda()->device().CanFollow(r.q)) return absl::OkStatus();  // counts hold the need
    int64_t need = 0;
    for (int slot = 0; slot < slots(); ++slot) {
      for (int h = 0; slots_[slot] != nullptr && h < kv_heads; ++h) {
        need = std::max<int64_t>(need, selection.counts[int64_t{slot} * kv_heads + h]);
      }
    }
    return CheckNeed(need, selection.capacity);
  }
  PrepareGroups(r);
  // Of the groups' heads: a call that lacks room is made again, and draws the same
  std::vector<HeadState> before;
  for (const Group& group : groups_)
    before.insert(before.end(), group.state, group.state + group.q_heads);
  runtime_->ops().select({.storage = runtime_->storage(),
                          .promise = runtime_->promise(),
                          .groups = groups_.data(),
                          .num_groups = static_cast<int32_t>(groups_.size())},
                         runtime_->stream());
  int64_t need = 0;
  for (size_t i = 0; i < groups_.size(); ++i) {
    const Group& group = groups_[i];
    const int64_t at = int64_t{group_slot_[i]} * kv_heads + group_head_[i];
    const int64_t n = group.middle_end - group.middle_begin,
                  count = group.tokens - n + group.selected;
    selection.counts[at] = static_cast<int32_t>(count);
    need = std::max(need, count);
    if (r.selected != nullptr) r.selected[at] = static_cast<int32_t>(group.selected);
    if (r.middle != nullptr) r.middle[at] = n;
    if (count > selection.capacity) continue;
    int32_t* tokens = selection.tokens + at * selection.capacity;
    float* weights = selection.log_weights + at * selection.capacity;
    int64_t k = 0;
    for (int64_t t = 0; t < group.middle_begin; ++t, ++k)
      tokens[k] = static_cast<int32_t>(t), weights[k] = 0;
    for (int64_t t = 0; t < group.selected; ++t, ++k) {
      tokens[k] = static_cast<int32_t>(group.scratch.token[t]);
      weights[k] = -std::log(group.scratch.weight[t]);
    }
    for (int64_t t = group.middle_end; t < group.tokens; ++t, ++k)
      tokens[k] = static_cast<int32_t>(t), weights[k] = 0;
  }
  if (need > selection.capacity) {
    auto from = before.cbegin();
    for (const Group& group : groups_) {
      std::copy_n(from, group.q_heads, group.state);
      from += group.q_heads;
    }
  }
  VATTN_RETURN_IF_ERROR(CheckNeed(need, selection.capacity));
  FinishLayer(r.layer);
  return absl::OkStatus();
}

}  // namespace vattn
