// Batches of the C API: steps, attention, selection.
#include <memory>

#include "api/calls.h"

namespace vattn::api {

absl::Status CheckStream(const Runtime& runtime, const CUstream_st* stream) {
  if (stream == nullptr || runtime.cuda() != nullptr) return absl::OkStatus();
  return InvalidArgumentError("stream is given, must be NULL on the CPU backend");
}

absl::Status ToAttend(const vattn_attend_params* params, bool needs_out, AttendRequest& out) {
  vattn_attend_params p;
  vattn_attend_params_init(&p, sizeof(p));
  VATTN_RETURN_IF_ERROR(Import("params", params, p));
  if (p.num_tokens < 1 || p.num_tokens > kMaxQueryTokens)
    return OutOfRangeError("num_tokens", p.num_tokens, 1, kMaxQueryTokens);
  if (p.out_dtype < 0 || p.out_dtype > 2) return OutOfRangeError("out_dtype", p.out_dtype, 0, 2);
  if (p.scores_dtype < 0 || p.scores_dtype > 2)
    return OutOfRangeError("scores_dtype", p.scores_dtype, 0, 2);
  if (p.policy != 0 && p.policy != VATTN_POLICY_DENSE) {
    return InvalidArgumentError("policy is ", p.policy,
                                ", must be 0, the runtime's, or VATTN_POLICY_DENSE (3)");
  }
  if (needs_out && (p.partial == nullptr || p.gathered != nullptr))
    VATTN_RETURN_IF_ERROR(NotNull("out", p.out));
  out = {.layer = p.layer,
         .num_tokens = p.num_tokens,
         .dense = p.policy == VATTN_POLICY_DENSE,
         .out_dtype = p.out_dtype,
         .q = p.q,
         .k_new = p.k_new,
         .v_new = p.v_new,
         .out = p.out,
         .lse = p.lse,
         .verdict = p.verdict,
         .error = p.error,
         .selected = p.selected,
         .fetched = p.fetched,
         .looks = p.looks,
         .middle = p.middle,
         .timeline = p.timeline,
         .scores = p.scores,
         .score_heads = p.score_heads,
         .scores_dtype = p.scores_dtype,
         .scores_stride = p.scores_stride,
         .partial = p.partial,
         .gathered = p.gathered,
         .again = p.again,
         .rank = p.rank,
         .ranks = p.ranks};
  return absl::OkStatus();
}

}  // namespace vattn::api

namespace {

using vattn::InvalidArgumentError;
using vattn::OutOfRangeError;
using vattn::api::CheckStream;
using vattn::api::Guard;
using vattn::api::InitStruct;
using vattn::api::NotNull;
using vattn::api::ToAttend;
using vattn::api::Usable;
using vattn::api::Use;

absl::Status ToSelection(const vattn_selection* selection, bool needs_weights,
                         vattn::Selection& out) {
  vattn_selection s;
  vattn_selection_init(&s, sizeof(s));
  VATTN_RETURN_IF_ERROR(vattn::api::Import("selection", selection, s));
  const int64_t most = int64_t{1} << 31;
  if (s.capacity < 1 || s.capacity > most) return OutOfRangeError("capacity", s.capacity, 1, most);
  VATTN_RETURN_IF_ERROR(NotNull("tokens", s.tokens));
  VATTN_RETURN_IF_ERROR(NotNull("counts", s.counts));
  if (needs_weights) VATTN_RETURN_IF_ERROR(NotNull("log_weights", s.log_weights));
  out = {
      .capacity = s.capacity, .tokens = s.tokens, .log_weights = s.log_weights, .counts = s.counts};
  return absl::OkStatus();
}

}  // namespace

extern "C" {

vattn_code vattn_batch_create(vattn_runtime* runtime, int32_t slots, vattn_batch** out) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(NotNull("out", out));
    *out = nullptr;
    VATTN_RETURN_IF_ERROR(Usable(runtime));
    if (slots < 1 || slots > 4096) return OutOfRangeError("slots", slots, 1, 4096);
    *out = new vattn_batch{std::make_unique<vattn::Batch>(runtime->impl, slots)};
    return absl::OkStatus();
  });
}

void vattn_batch_destroy(vattn_batch* batch) { vattn::api::Destroy(batch); }

vattn_code vattn_batch_set(vattn_batch* batch, int32_t slot, vattn_sequence* sequence) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(batch));
    const Use use(sequence);
    VATTN_RETURN_IF_ERROR(use.Awake());
    return batch->impl->Set(slot, sequence->impl.get());
  });
}

vattn_code vattn_batch_clear(vattn_batch* batch, int32_t slot) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(batch));
    return batch->impl->Clear(slot);
  });
}

vattn_code vattn_batch_begin_step(vattn_batch* batch, int32_t new_tokens, CUstream_st* stream) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(batch));
    VATTN_RETURN_IF_ERROR(CheckStream(batch->runtime(), stream));
    return batch->impl->BeginStep(new_tokens, stream);
  });
}

vattn_code vattn_batch_abandon(vattn_batch* batch) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(batch));
    return batch->impl->Abandon();
  });
}

void vattn_attend_params_init(vattn_attend_params* params, size_t struct_size) {
  vattn_attend_params defaults{};
  defaults.num_tokens = 1;
  defaults.ranks = 1;
  InitStruct(params, struct_size, defaults);
}

void vattn_selection_init(vattn_selection* selection, size_t struct_size) {
  InitStruct(selection, struct_size, vattn_selection{});
}

vattn_code vattn_attend(vattn_batch* batch, const vattn_attend_params* params,
                        CUstream_st* stream) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(batch));
    vattn::AttendRequest request;
    VATTN_RETURN_IF_ERROR(CheckStream(batch->runtime(), stream));
    VATTN_RETURN_IF_ERROR(ToAttend(params, /*needs_out=*/true, request));
    return batch->impl->Attend(request, stream);
  });
}

vattn_code vattn_attend_more(vattn_batch* batch, const vattn_attend_params* params,
                             CUstream_st* stream) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(batch));
    vattn::AttendRequest request;
    VATTN_RETURN_IF_ERROR(CheckStream(batch->impl->runtime(), stream));
    VATTN_RETURN_IF_ERROR(ToAttend(params, /*needs_out=*/true, request));
    return batch->impl->AttendMore(request, stream);
  });
}

void vattn_merge_params_init(vattn_merge_params* params, size_t struct_size) {
  InitStruct(params, struct_size, vattn_merge_params{});
}

vattn_code vattn_merge(const vattn_runtime* runtime, const vattn_merge_params* params,
                       CUstream_st* stream) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(runtime));
    VATTN_RETURN_IF_ERROR(CheckStream(*runtime->impl, stream));
    vattn_merge_params p;
    vattn_merge_params_init(&p, sizeof(p));
    VATTN_RETURN_IF_ERROR(vattn::api::Import("params", params, p));
    if (p.ranks < 1 || p.ranks > vattn::kMostRanks)
      return OutOfRangeError("ranks", p.ranks, 1, vattn::kMostRanks);
    const int64_t most = int64_t{1} << 31;
    if (p.heads < 1 || p.heads > most) return OutOfRangeError("heads", p.heads, 1, most);
    if (p.out_dtype < 0 || p.out_dtype > 2) return OutOfRangeError("out_dtype", p.out_dtype, 0, 2);
    VATTN_RETURN_IF_ERROR(NotNull("records", p.records));
    VATTN_RETURN_IF_ERROR(NotNull("out", p.out));
    vattn::MergeParams merge;
    merge.ranks = p.ranks;
    merge.heads = p.heads;
    merge.records = p.records;
    merge.out_dtype = p.out_dtype;
    merge.out = p.out;
    merge.lse = p.lse;
    merge.verdict = p.verdict;
    merge.error = p.error;
    merge.again = p.again;
    return runtime->impl->Merge(merge, stream);
  });
}

vattn_code vattn_attend_selected(vattn_batch* batch, const vattn_attend_params* params,
                                 const vattn_selection* selection, CUstream_st* stream) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(batch));
    vattn::AttendRequest request;
    VATTN_RETURN_IF_ERROR(CheckStream(batch->runtime(), stream));
    VATTN_RETURN_IF_ERROR(ToAttend(params, /*needs_out=*/true, request));
    vattn::Selection list;
    VATTN_RETURN_IF_ERROR(ToSelection(selection, /*needs_weights=*/false, list));
    return batch->impl->AttendSelected(request, list, stream);
  });
}

vattn_code vattn_select(vattn_batch* batch, const vattn_attend_params* params,
                        vattn_selection* selection, CUstream_st* stream) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(batch));
    vattn::AttendRequest request;
    VATTN_RETURN_IF_ERROR(CheckStream(batch->runtime(), stream));
    VATTN_RETURN_IF_ERROR(ToAttend(params, /*needs_out=*/false, request));
    vattn::Selection list;
    VATTN_RETURN_IF_ERROR(ToSelection(selection, /*needs_weights=*/true, list));
    return batch->impl->Select(request, list, stream);
  });
}

}  // extern "C"
