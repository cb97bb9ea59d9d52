#include "runtime/batch.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "kernels/merge.h"
#include "memory/status.h"
#include "runtime/sequence.h"

namespace vattn {

Batch::Batch(std::shared_ptr<Runtime> runtime, int slots)
    : runtime_(std::move(runtime)),
      slots_(slots, nullptr),
      attended_(runtime_->options().num_layers, 0) {
  runtime_->CountBatches(1);
}

Batch::~Batch() {
  for (Sequence* sequence : slots_) {
    if (sequence != nullptr) TakeOut(sequence, /*calls_follow=*/false);
  }
  runtime_->CountBatches(-1);
}

void Batch::Forget(Sequence* sequence) { TakeOut(sequence, /*calls_follow=*/true); }

void Batch::TakeOut(Sequence* sequence, bool calls_follow) {
  // What leaves in the middle of a step does not take half of a token along.
  if (LayerToAttend() >= 0) sequence->GiveUpStep();
  slots_[sequence->slot] = nullptr;
  if (open_ && calls_follow) half_->Leave(*sequence);
  sequence->slot = -1;
  sequence->Touch();
  sequence->seat = nullptr;  // last: from here on it may be spilled
}

absl::Status Batch::Set(int slot, Sequence* sequence) {
  if (slot < 0 || slot >= slots()) return OutOfRangeError("slot", slot, 0, slots() - 1);
  if (&sequence->runtime() != runtime_.get()) {
    return InvalidArgumentError("sequence is of another runtime than the batch");
  }
  const Seat* const seat = sequence->seat;
  if (seat != nullptr && (seat != this || sequence->slot != slot)) {
    return InvalidArgumentError("sequence already sits in slot ", sequence->slot, " of ",
                                seat == this ? "this" : "another",
                                " batch, must sit in one at most");
  }
  VATTN_RETURN_IF_ERROR(EndStep());
  if (slots_[slot] != nullptr) Forget(slots_[slot]);
  slots_[slot] = sequence;
  sequence->seat = this;
  sequence->slot = slot;
  return absl::OkStatus();
}

absl::Status Batch::Clear(int slot) {
  if (slot < 0 || slot >= slots()) return OutOfRangeError("slot", slot, 0, slots() - 1);
  if (slots_[slot] != nullptr) Forget(slots_[slot]);
  return absl::OkStatus();
}

int Batch::LayerToAttend() const {
  // Where the half does not see every call, the caller answers for it.
  if (!open_ || new_tokens_ == 0 || !half_->sees_every_call()) return -1;
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
  // The first one waits for what was enqueued, and a lost device leaves everything as it is.
  for (Sequence* sequence : slots_) {
    if (sequence != nullptr) VATTN_RETURN_IF_ERROR(sequence->ReadBackState());
  }
  VATTN_RETURN_IF_ERROR(half_->LeaveAll());
  open_ = false;
  for (Sequence* sequence : slots_) {
    if (sequence != nullptr) sequence->GiveUpStep();
  }
  return absl::OkStatus();
}

absl::Status Batch::CheckNewTokens(int new_tokens) const {
  if (new_tokens < 0 || new_tokens > kMaxQueryTokens)
    return OutOfRangeError("new_tokens", new_tokens, 0, kMaxQueryTokens);
  const int most = runtime_->backend().max_group_heads();
  for (int l = 0; l < runtime_->options().num_layers; ++l) {
    if (runtime_->kv_heads(l) == 0 || new_tokens * runtime_->group_heads(l) <= most) continue;
    return NotSupportedError("new_tokens is ", new_tokens, ", must be at most ",
                             most / runtime_->group_heads(l), ": layer ", l, " has ",
                             runtime_->group_heads(l),
                             " query heads per KV head, and this backend works on ", most,
                             " of all new tokens together");
  }
  return absl::OkStatus();
}

absl::Status Batch::CheckLengths(int new_tokens) const {
  for (const Sequence* sequence : slots_) {
    if (sequence == nullptr) continue;
    int64_t tokens = -1;
    for (int l = 0; l < runtime_->options().num_layers; ++l) {
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
    if (tokens + new_tokens > kAllTokens) {
      return InvalidArgumentError("sequence in slot ", sequence->slot, " has ", tokens,
                                  " tokens, must have fewer than 2^31");
    }
  }
  return absl::OkStatus();
}

absl::Status Batch::BeginStep(int new_tokens, DeviceStream stream) {
  VATTN_RETURN_IF_ERROR(CheckNewTokens(new_tokens));
  if (const int layer = LayerToAttend(); layer >= 0) {
    return InvalidArgumentError("layer ", layer,
                                " was not attended in the step before, must be, once every layer; "
                                "vattn_batch_abandon gives that step up");
  }
  VATTN_RETURN_IF_ERROR(CheckLengths(new_tokens));
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
  if (!half_) {
    absl::StatusOr<std::unique_ptr<BatchHalf>> made =
        runtime_->backend().MakeBatch(*runtime_, slots());
    VATTN_RETURN_IF_ERROR(made.status());
    half_ = *std::move(made);
  }
  VATTN_RETURN_IF_ERROR(half_->BeginStep(slots_, stream));
  std::move(undo).Cancel();
  std::fill(attended_.begin(), attended_.end(), 0);
  partial_layer_ = -1;
  open_ = true;
  for (Sequence* sequence : slots_) {
    if (sequence != nullptr) sequence->CountStep();
  }
  for (int l = 0; l < runtime_->options().num_layers && !half_->sees_every_call(); ++l) {
    if (runtime_->kv_heads(l) > 0) CountNewTokens(l);
  }
  return absl::OkStatus();
}

absl::Status Batch::CheckRequest(const AttendRequest& r) const {
  const Options& o = runtime_->options();
  if (!open_)
    return InvalidArgumentError("no step is open, vattn_batch_begin_step must come first");
  VATTN_RETURN_IF_ERROR(CheckLayer(*runtime_, r.layer));
  if (attended_[r.layer]) {
    return InvalidArgumentError("layer is ", r.layer,
                                ", which was attended in this step, must be attended once");
  }
  if (r.num_tokens != std::max(new_tokens_, 1)) {
    return InvalidArgumentError("num_tokens is ", r.num_tokens, ", must be ",
                                std::max(new_tokens_, 1),
                                " in a step with new_tokens = ", new_tokens_);
  }
  if (r.q == nullptr) return InvalidArgumentError("q is NULL, must be given");
  if ((r.k_new == nullptr) != (new_tokens_ == 0)) {
    return InvalidArgumentError("k_new is ", r.k_new == nullptr ? "NULL" : "given", ", must be ",
                                new_tokens_ == 0 ? "NULL" : "given",
                                " in a step with new_tokens = ", new_tokens_);
  }
  const bool want_v = new_tokens_ > 0 && !o.shared_kv;
  if ((r.v_new != nullptr) != want_v) {
    return InvalidArgumentError("v_new is ", r.v_new == nullptr ? "NULL" : "given", ", must be ",
                                want_v ? "given" : "NULL", " with new_tokens = ", new_tokens_,
                                " and shared_kv = ", o.shared_kv);
  }
  return absl::OkStatus();
}

absl::Status Batch::CheckScores(const AttendRequest& r) const {
  VATTN_RETURN_IF_ERROR(vattn::CheckScores(*runtime_, r));
  if (r.scores == nullptr) return absl::OkStatus();
  if (r.scores_stride > kMostScoresStride)
    return OutOfRangeError("scores_stride", r.scores_stride, 0, kMostScoresStride);
  for (const Sequence* sequence : slots_) {
    if (sequence == nullptr) continue;
    const int64_t end = sequence->middle_end_in_step();
    if (r.scores_stride < end) {
      return InvalidArgumentError("scores_stride is ", r.scores_stride, ", must be at least ", end,
                                  ", where the middle of the sequence in slot ", sequence->slot,
                                  " ends");
    }
  }
  return absl::OkStatus();
}

absl::Status Batch::CheckSelection(const AttendRequest& r, const Selection& selection) const {
  const int kv_heads = runtime_->kv_heads(r.layer);
  for (int slot = 0; slot < slots(); ++slot) {
    if (slots_[slot] == nullptr) continue;
    const int64_t tokens = slots_[slot]->tokens_in_step();
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

void Batch::CountNewTokens(int layer) {
  for (Sequence* sequence : slots_) {
    if (sequence != nullptr) sequence->AddTokens(layer, new_tokens_);
  }
}

absl::Status Batch::Call(Task task, const AttendRequest& r, const Selection& selection,
                         DeviceStream stream) {
  partial_layer_ = -1;
  VATTN_RETURN_IF_ERROR(half_->Call(task, r, selection, stream));
  if (task == Task::kForecast) {
    partial_layer_ = r.layer;
    partial_ranks_ = r.ranks;
    partial_rank_ = r.rank;
    partial_round_ = 0;
  }
  if (!half_->sees_every_call()) return absl::OkStatus();
  attended_[r.layer] = 1;
  CountNewTokens(r.layer);
  return absl::OkStatus();
}

absl::Status Batch::Attend(const AttendRequest& r, DeviceStream stream) {
  VATTN_RETURN_IF_ERROR(CheckRequest(r));
  VATTN_RETURN_IF_ERROR(CheckScores(r));
  if (r.partial == nullptr) return Call(Task::kDecode, r, {}, stream);
  VATTN_RETURN_IF_ERROR(CheckPartial(r));
  return Call(Task::kForecast, r, {}, stream);
}

absl::Status Batch::AttendMore(const AttendRequest& r, DeviceStream stream) {
  if (!open_ || partial_layer_ < 0 || r.layer != partial_layer_) {
    return InvalidArgumentError("layer is ", r.layer,
                                ", must be that of the call before, which is to be vattn_attend ",
                                "with partial in an open step", partial_layer_ < 0 ? "" : ": ",
                                partial_layer_ < 0 ? "" : std::to_string(partial_layer_));
  }
  VATTN_RETURN_IF_ERROR(CheckPartial(r));
  if (r.rank != partial_rank_ || r.ranks != partial_ranks_) {
    return InvalidArgumentError("rank is ", r.rank, " of ", r.ranks, ", must be as in the call ",
                                "before: ", partial_rank_, " of ", partial_ranks_);
  }
  if (r.gathered == nullptr) return InvalidArgumentError("gathered is NULL, must be given");
  if (!runtime_->backend().IsOnDevice(r.gathered)) VATTN_RETURN_IF_ERROR(CheckGathered(r));
  VATTN_RETURN_IF_ERROR(half_->Call(Task::kMore, r, {}, stream));
  ++partial_round_;
  return absl::OkStatus();
}

absl::Status Batch::CheckGathered(const AttendRequest& r) const {
  const int64_t floats = PartialFloats(runtime_->storage().row.dim_v);
  const int q_heads = runtime_->options().num_q_heads;
  const int64_t stride = int64_t{slots()} * q_heads * floats;
  for (int rank = 0; rank < r.ranks; ++rank) {
    for (int slot = 0; slot < slots(); ++slot) {
      for (int h = 0; slots_[slot] != nullptr && h < q_heads; ++h) {
        const float* at = r.gathered + rank * stride + (int64_t{slot} * q_heads + h) * floats;
        if (Fits(at, rank, static_cast<float>(partial_round_))) continue;
        return InvalidArgumentError(
            "gathered[", rank, "][", slot, "][", h, "] is of version ", at[kPartialIsVersion],
            ", rank ", at[kPartialRank], " and round ", at[kPartialRound], ", must be of version ",
            kPartialVersion, ", rank ", rank, " and round ", partial_round_);
      }
    }
  }
  return absl::OkStatus();
}

absl::Status Batch::CheckPartial(const AttendRequest& r) const {
  if (r.partial == nullptr) return InvalidArgumentError("partial is NULL, must be given");
  if (r.ranks < 1 || r.ranks > kMostRanks) return OutOfRangeError("ranks", r.ranks, 1, kMostRanks);
  if (r.rank < 0 || r.rank >= r.ranks) return OutOfRangeError("rank", r.rank, 0, r.ranks - 1);
  const Promise& promise = runtime_->promise();
  if (promise.policy != Policy::kVerified && promise.policy != Policy::kDense) {
    return NotSupportedError("partial is given with policy ", static_cast<int32_t>(promise.policy),
                             ", slices of a context need verified (0) or dense (3)");
  }
  if (r.dense) {
    return NotSupportedError("policy is ", static_cast<int32_t>(Policy::kDense),
                             " with partial, slices of a context need 0, the runtime's");
  }
  if (runtime_->options().value_bits != 0) {
    return NotSupportedError("partial is given with value_bits ", runtime_->options().value_bits,
                             ", slices of a context need 0");
  }
  if (r.num_tokens != 1) {
    return NotSupportedError("partial is given with num_tokens ", r.num_tokens,
                             ", slices of a context answer 1 query token a step");
  }
  return absl::OkStatus();
}

absl::Status Batch::AttendSelected(const AttendRequest& r, const Selection& selection,
                                   DeviceStream stream) {
  VATTN_RETURN_IF_ERROR(CheckRequest(r));
  if (!runtime_->backend().IsOnDevice(selection.counts))
    VATTN_RETURN_IF_ERROR(CheckSelection(r, selection));
  return Call(Task::kAttendSelected, r, selection, stream);
}

absl::Status Batch::Select(const AttendRequest& r, const Selection& selection,
                           DeviceStream stream) {
  VATTN_RETURN_IF_ERROR(CheckRequest(r));
  VATTN_RETURN_IF_ERROR(CheckScores(r));
  const Policy policy = r.dense ? Policy::kDense : runtime_->promise().policy;
  if (policy != Policy::kVerified) {
    return NotSupportedError("vattn_select needs policy verified, policy is ",
                             static_cast<int32_t>(policy));
  }
  return Call(Task::kSelect, r, selection, stream);
}

}  // namespace vattn
