// Sequences of the C API: appended to, forked, cut, saved.
#include <algorithm>
#include <memory>
#include <utility>

#include "api/calls.h"
#include "api/sequence_params.h"
#include "api/strides.h"

namespace {

using vattn::CheckLayer;
using vattn::InvalidArgumentError;
using vattn::OutOfRangeError;
using vattn::api::Give;
using vattn::api::Guard;
using vattn::api::InitStruct;
using vattn::api::kMostPrefill;
using vattn::api::NotNull;
using vattn::api::ToSequenceOptions;
using vattn::api::ToStrides;
using vattn::api::Usable;
using vattn::api::Use;

absl::Status ToAppend(const vattn::Runtime& runtime, const vattn_append_params& p,
                      int64_t tokens_before, vattn::AppendRequest& out) {
  VATTN_RETURN_IF_ERROR(CheckLayer(runtime, p.layer));
  const vattn::Options& o = runtime.options();
  const int64_t most = (int64_t{1} << 31) - tokens_before;
  if (p.num_tokens < 1 || p.num_tokens > most)
    return OutOfRangeError("num_tokens", p.num_tokens, 1, most);
  if (p.num_queries < 0 || p.num_queries > p.num_tokens) {
    return OutOfRangeError("num_queries", p.num_queries, 0, p.num_tokens);
  }
  VATTN_RETURN_IF_ERROR(NotNull("k", p.k));
  if ((p.v == nullptr) != o.shared_kv) {
    return InvalidArgumentError("v is ", p.v == nullptr ? "NULL" : "given", ", must be ",
                                o.shared_kv ? "NULL" : "given", " with shared_kv = ", o.shared_kv);
  }
  if (p.num_queries > 0) VATTN_RETURN_IF_ERROR(NotNull("q", p.q));
  const int64_t heads = runtime.kv_heads(p.layer);
  out.layer = p.layer;
  out.num_tokens = p.num_tokens;
  out.num_queries = p.num_queries;
  out.k = p.k;
  out.v = p.v;
  out.q = p.q;
  VATTN_RETURN_IF_ERROR(ToStrides("k", p.num_tokens, heads, o.head_dim_k, p.k_token_stride,
                                  p.k_head_stride, out.k_token_stride, out.k_head_stride));
  VATTN_RETURN_IF_ERROR(ToStrides("v", p.num_tokens, heads, o.head_dim_v, p.v_token_stride,
                                  p.v_head_stride, out.v_token_stride, out.v_head_stride));
  VATTN_RETURN_IF_ERROR(ToStrides("q", std::max(1, p.num_queries), o.num_q_heads, o.head_dim_k,
                                  p.q_token_stride, p.q_head_stride, out.q_token_stride,
                                  out.q_head_stride));
  return absl::OkStatus();
}

absl::Status ToPrefill(const vattn::Runtime& runtime, const vattn_prefill_params& p,
                       int64_t tokens_before, vattn::PrefillRequest& out) {
  VATTN_RETURN_IF_ERROR(CheckLayer(runtime, p.layer));
  if (p.num_tokens < 1 || p.num_tokens > kMostPrefill)
    return OutOfRangeError("num_tokens", p.num_tokens, 1, kMostPrefill);
  if (p.out_dtype < 0 || p.out_dtype > 2) return OutOfRangeError("out_dtype", p.out_dtype, 0, 2);
  VATTN_RETURN_IF_ERROR(NotNull("q", p.q));
  VATTN_RETURN_IF_ERROR(NotNull("out", p.out));
  vattn_append_params rows{};
  rows.layer = p.layer;
  rows.num_tokens = p.num_tokens;
  rows.num_queries = static_cast<int32_t>(p.num_tokens);
  rows.k = p.k, rows.k_token_stride = p.k_token_stride, rows.k_head_stride = p.k_head_stride;
  rows.v = p.v, rows.v_token_stride = p.v_token_stride, rows.v_head_stride = p.v_head_stride;
  rows.q = p.q, rows.q_token_stride = p.q_token_stride, rows.q_head_stride = p.q_head_stride;
  VATTN_RETURN_IF_ERROR(ToAppend(runtime, rows, tokens_before, out.rows));
  out.out_dtype = p.out_dtype;
  out.out = p.out;
  out.lse = p.lse;
  return absl::OkStatus();
}

// A call that adds tokens to a layer: `check` makes a request of its params, which `add` carries out.
template <class Params, class Request>
absl::Status AddTokens(vattn_sequence* sequence, const Params* params,
                       absl::Status (*check)(const vattn::Runtime&, const Params&,
                                             int64_t tokens_before, Request&),
                       absl::Status (vattn::Sequence::*add)(const Request&)) {
  const Use use(sequence);
  VATTN_RETURN_IF_ERROR(use.status());
  Params p{};
  VATTN_RETURN_IF_ERROR(vattn::api::Import("params", params, p));
  const vattn::Runtime& runtime = sequence->impl->runtime();
  const bool known = p.layer >= 0 && p.layer < runtime.options().num_layers;
  Request request;
  VATTN_RETURN_IF_ERROR(check(runtime, p, known ? sequence->impl->length(p.layer) : 0, request));
  VATTN_RETURN_IF_ERROR(use.Awake());
  return (sequence->impl.get()->*add)(request);
}

}  // namespace

extern "C" {

void vattn_sequence_options_init(vattn_sequence_options* options, size_t struct_size) {
  InitStruct(options, struct_size, vattn_sequence_options{});
}

vattn_code vattn_sequence_create(vattn_runtime* runtime, const vattn_sequence_options* options,
                                 vattn_sequence** out) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(NotNull("out", out));
    *out = nullptr;
    VATTN_RETURN_IF_ERROR(Usable(runtime));
    vattn::SequenceOptions chosen;
    VATTN_RETURN_IF_ERROR(ToSequenceOptions(options, chosen));
    return Give(vattn::Sequence::Create(runtime->impl, chosen), out);
  });
}

vattn_code vattn_sequence_reserve(vattn_sequence* sequence, int64_t tokens) {
  return Guard([&]() -> absl::Status {
    const Use use(sequence);
    VATTN_RETURN_IF_ERROR(use.status());
    const int64_t most = vattn::kAllTokens;
    if (tokens < 0 || tokens > most) return OutOfRangeError("tokens", tokens, 0, most);
    VATTN_RETURN_IF_ERROR(use.Awake());
    return sequence->impl->Reserve(tokens);
  });
}

void vattn_sequence_destroy(vattn_sequence* sequence) { vattn::api::Destroy(sequence); }

vattn_code vattn_sequence_fork(const vattn_sequence* sequence, uint64_t id, vattn_sequence** out) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(NotNull("out", out));
    *out = nullptr;
    const Use use(sequence);
    VATTN_RETURN_IF_ERROR(use.Awake());
    return Give(sequence->impl->Fork(id), out);
  });
}

vattn_code vattn_sequence_truncate(vattn_sequence* sequence, int64_t tokens) {
  return Guard([&]() -> absl::Status {
    const Use use(sequence);
    VATTN_RETURN_IF_ERROR(use.status());
    if (tokens < 0 || tokens > int64_t{1} << 31)
      return OutOfRangeError("tokens", tokens, 0, int64_t{1} << 31);
    VATTN_RETURN_IF_ERROR(use.Awake());
    return sequence->impl->Truncate(tokens);
  });
}

vattn_code vattn_sequence_length(const vattn_sequence* sequence, int32_t layer, int64_t* tokens) {
  return Guard([&]() -> absl::Status {
    const Use use(sequence);
    VATTN_RETURN_IF_ERROR(use.status());
    VATTN_RETURN_IF_ERROR(NotNull("tokens", tokens));
    VATTN_RETURN_IF_ERROR(CheckLayer(sequence->impl->runtime(), layer));
    *tokens = sequence->impl->length(layer);
    return absl::OkStatus();
  });
}

void vattn_append_params_init(vattn_append_params* params, size_t struct_size) {
  InitStruct(params, struct_size, vattn_append_params{});
}

vattn_code vattn_append(vattn_sequence* sequence, const vattn_append_params* params) {
  return Guard([&] { return AddTokens(sequence, params, ToAppend, &vattn::Sequence::Append); });
}

void vattn_prefill_params_init(vattn_prefill_params* params, size_t struct_size) {
  InitStruct(params, struct_size, vattn_prefill_params{});
}

vattn_code vattn_prefill(vattn_sequence* sequence, const vattn_prefill_params* params) {
  return Guard([&] { return AddTokens(sequence, params, ToPrefill, &vattn::Sequence::Prefill); });
}

vattn_code vattn_sequence_build_index(vattn_sequence* sequence) {
  return Guard([&]() -> absl::Status {
    const Use use(sequence);
    VATTN_RETURN_IF_ERROR(use.Awake());
    return sequence->impl->BuildIndex();
  });
}

vattn_code vattn_sequence_save(const vattn_sequence* sequence, const char* path) {
  return Guard([&]() -> absl::Status {
    const Use use(sequence);
    VATTN_RETURN_IF_ERROR(use.status());
    VATTN_RETURN_IF_ERROR(NotNull("path", path));
    VATTN_RETURN_IF_ERROR(use.Awake());
    return sequence->impl->Save(path);
  });
}

vattn_code vattn_sequence_restore(vattn_runtime* runtime, const char* path, vattn_sequence** out) {
  return vattn_sequence_restore_as(runtime, path, nullptr, out);
}

vattn_code vattn_sequence_restore_as(vattn_runtime* runtime, const char* path,
                                     const vattn_sequence_options* options, vattn_sequence** out) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(NotNull("out", out));
    *out = nullptr;
    VATTN_RETURN_IF_ERROR(Usable(runtime));
    VATTN_RETURN_IF_ERROR(NotNull("path", path));
    vattn::SequenceOptions chosen;
    VATTN_RETURN_IF_ERROR(ToSequenceOptions(options, chosen));
    return Give(vattn::Sequence::Restore(runtime->impl, path, chosen), out);
  });
}

vattn_code vattn_sequence_hibernate(vattn_sequence* sequence, const char* path) {
  return Guard([&]() -> absl::Status {
    const Use use(sequence);
    VATTN_RETURN_IF_ERROR(use.status());
    VATTN_RETURN_IF_ERROR(NotNull("path", path));
    VATTN_RETURN_IF_ERROR(use.Awake());
    return sequence->impl->Hibernate(path);
  });
}

vattn_code vattn_sequence_wake(vattn_sequence* sequence) {
  return Guard([&]() -> absl::Status { return Use(sequence).Awake(); });
}

}  // extern "C"
