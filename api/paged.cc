// Pools of an engine's own in the C API, and the tables that code their rows.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "api/calls.h"
#include "api/strides.h"
#include "runtime/files/tables_file.h"

namespace {

using vattn::CheckLayer;
using vattn::InvalidArgumentError;
using vattn::OutOfRangeError;
using vattn::api::CheckStream;
using vattn::api::Guard;
using vattn::api::Import;
using vattn::api::InitStruct;
using vattn::api::NotNull;
using vattn::api::ToAttend;
using vattn::api::ToStrides;
using vattn::api::Usable;
using vattn::api::Use;

absl::Status CheckModel(const char* model) {
  const std::string text = model == nullptr ? "" : model;
  if (text.size() <= vattn::kMostModelBytes) return absl::OkStatus();
  return InvalidArgumentError("model has ", text.size(), " bytes, must have at most ",
                              vattn::kMostModelBytes);
}

absl::Status ToPagedOptions(const vattn::Runtime& runtime, const vattn_paged_options* options,
                            vattn::PagedOptions& out) {
  vattn_paged_options o;
  vattn_paged_options_init(&o, sizeof(o));
  VATTN_RETURN_IF_ERROR(Import("options", options, o));
  VATTN_RETURN_IF_ERROR(CheckModel(o.model));
  VATTN_RETURN_IF_ERROR(NotNull("k", o.k));
  if (o.pinned != 0 && o.pinned != 1) return OutOfRangeError("pinned", o.pinned, 0, 1);
  const auto list = [&](void* const* from) {
    return from == nullptr ? std::vector<void*>()
                           : std::vector<void*>(from, from + runtime.options().num_layers);
  };
  out = {.tables = o.tables == nullptr ? "" : o.tables,
         .model = o.model == nullptr ? "" : o.model,
         .k = list(o.k),
         .v = list(o.v),
         .codes = list(o.codes),
         .num_blocks = o.num_blocks,
         .block_stride = o.block_stride,
         .token_stride = o.token_stride,
         .head_stride = o.head_stride,
         .code_block_stride = o.code_block_stride,
         .max_tokens = o.max_tokens,
         .max_step_tokens = o.max_step_tokens,
         .hot_bytes = o.hot_bytes,
         .block_tokens = o.block_tokens,
         .max_requests = o.max_requests,
         .max_query_tokens = o.max_query_tokens,
         .pinned = o.pinned != 0};
  return absl::OkStatus();
}

absl::Status ToRows(const vattn::Runtime& runtime, const vattn_paged_rows* rows,
                    vattn::PagedRows& out) {
  vattn_paged_rows r;
  vattn_paged_rows_init(&r, sizeof(r));
  VATTN_RETURN_IF_ERROR(Import("rows", rows, r));
  VATTN_RETURN_IF_ERROR(CheckLayer(runtime, r.layer));
  if (r.num_tokens < 0 || r.num_tokens > INT32_MAX)
    return OutOfRangeError("num_tokens", r.num_tokens, 0, INT32_MAX);
  out = {.layer = r.layer, .num_tokens = r.num_tokens, .slots = r.slots, .k = r.k, .v = r.v};
  const vattn::Options& o = runtime.options();
  const int64_t heads = runtime.kv_heads(r.layer), tokens = std::max<int64_t>(1, r.num_tokens);
  VATTN_RETURN_IF_ERROR(ToStrides("k", tokens, heads, o.head_dim_k, r.k_token_stride,
                                  r.k_head_stride, out.k_token_stride, out.k_head_stride));
  return ToStrides("v", tokens, heads, o.head_dim_v, r.v_token_stride, r.v_head_stride,
                   out.v_token_stride, out.v_head_stride);
}

absl::Status ToStep(const vattn_paged_step* step, vattn::PagedStep& out) {
  vattn_paged_step s;
  vattn_paged_step_init(&s, sizeof(s));
  VATTN_RETURN_IF_ERROR(Import("step", step, s));
  out = {.num_requests = s.num_requests,
         .max_query_tokens = s.max_query_tokens,
         .num_query_tokens = s.num_query_tokens,
         .block_table = s.block_table,
         .block_table_stride = s.block_table_stride,
         .lengths = s.lengths,
         .query_starts = s.query_starts,
         .request_rows = s.request_rows,
         .resets = s.resets};
  return absl::OkStatus();
}

absl::Status ToPagedPrefill(const vattn::Runtime& runtime, const vattn_paged_prefill_params* params,
                            vattn::PagedPrefill& out) {
  vattn_paged_prefill_params p;
  vattn_paged_prefill_params_init(&p, sizeof(p));
  VATTN_RETURN_IF_ERROR(Import("params", params, p));
  VATTN_RETURN_IF_ERROR(CheckLayer(runtime, p.layer));
  if (p.out_dtype < 0 || p.out_dtype > 2) return OutOfRangeError("out_dtype", p.out_dtype, 0, 2);
  if (p.num_tokens < 1 || p.num_tokens > vattn::api::kMostPrefill)
    return OutOfRangeError("num_tokens", p.num_tokens, 1, vattn::api::kMostPrefill);
  VATTN_RETURN_IF_ERROR(NotNull("out", p.out));
  out = {.layer = p.layer,
         .out_dtype = p.out_dtype,
         .num_tokens = p.num_tokens,
         .length = p.length,
         .blocks = p.blocks,
         .q = p.q,
         .out = p.out,
         .lse = p.lse};
  const vattn::Options& o = runtime.options();
  return ToStrides("q", p.num_tokens, o.num_q_heads, o.head_dim_k, p.q_token_stride,
                   p.q_head_stride, out.q_token_stride, out.q_head_stride);
}

}  // namespace

extern "C" {

vattn_code vattn_tables_save(const vattn_sequence* sequence, const char* path, const char* model) {
  return Guard([&]() -> absl::Status {
    const Use use(sequence);
    VATTN_RETURN_IF_ERROR(use.status());
    VATTN_RETURN_IF_ERROR(NotNull("path", path));
    VATTN_RETURN_IF_ERROR(CheckModel(model));
    VATTN_RETURN_IF_ERROR(use.Awake());
    absl::StatusOr<vattn::ModelTables> tables = sequence->impl->LearnTables();
    if (!tables.ok()) return tables.status();
    return vattn::WriteTables(sequence->impl->runtime(), path, model == nullptr ? "" : model,
                              *tables);
  });
}

void vattn_paged_options_init(vattn_paged_options* options, size_t struct_size) {
  vattn_paged_options defaults{};
  defaults.block_tokens = 16;
  defaults.max_requests = 1;
  defaults.max_query_tokens = 1;
  InitStruct(options, struct_size, defaults);
}

vattn_code vattn_paged_create(vattn_runtime* runtime, const vattn_paged_options* options,
                              vattn_paged** out) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(NotNull("out", out));
    *out = nullptr;
    VATTN_RETURN_IF_ERROR(Usable(runtime));
    vattn::PagedOptions given;
    VATTN_RETURN_IF_ERROR(ToPagedOptions(*runtime->impl, options, given));
    absl::StatusOr<std::unique_ptr<vattn::Paged>> made = vattn::Paged::Create(runtime->impl, given);
    if (!made.ok()) return made.status();
    *out = new vattn_paged{*std::move(made)};
    return absl::OkStatus();
  });
}

void vattn_paged_destroy(vattn_paged* paged) { vattn::api::Destroy(paged); }

void vattn_paged_rows_init(vattn_paged_rows* rows, size_t struct_size) {
  InitStruct(rows, struct_size, vattn_paged_rows{});
}

vattn_code vattn_paged_write(vattn_paged* paged, const vattn_paged_rows* rows,
                             CUstream_st* stream) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(paged));
    VATTN_RETURN_IF_ERROR(CheckStream(paged->runtime(), stream));
    vattn::PagedRows given;
    VATTN_RETURN_IF_ERROR(ToRows(paged->runtime(), rows, given));
    return paged->impl->Write(given, stream);
  });
}

void vattn_paged_step_init(vattn_paged_step* step, size_t struct_size) {
  vattn_paged_step defaults{};
  defaults.max_query_tokens = 1;
  InitStruct(step, struct_size, defaults);
}

vattn_code vattn_paged_begin_step(vattn_paged* paged, const vattn_paged_step* step,
                                  CUstream_st* stream) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(paged));
    VATTN_RETURN_IF_ERROR(CheckStream(paged->runtime(), stream));
    vattn::PagedStep given;
    VATTN_RETURN_IF_ERROR(ToStep(step, given));
    return paged->impl->BeginStep(given, stream);
  });
}

vattn_code vattn_paged_attend(vattn_paged* paged, const vattn_attend_params* params,
                              CUstream_st* stream) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(paged));
    VATTN_RETURN_IF_ERROR(CheckStream(paged->runtime(), stream));
    vattn::AttendRequest request;
    VATTN_RETURN_IF_ERROR(ToAttend(params, /*needs_out=*/true, request));
    return paged->impl->Attend(request, stream);
  });
}

void vattn_paged_prefill_params_init(vattn_paged_prefill_params* params, size_t struct_size) {
  InitStruct(params, struct_size, vattn_paged_prefill_params{});
}

vattn_code vattn_paged_prefill(vattn_paged* paged, const vattn_paged_prefill_params* params) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(paged));
    vattn::PagedPrefill request;
    VATTN_RETURN_IF_ERROR(ToPagedPrefill(paged->runtime(), params, request));
    return paged->impl->Prefill(request);
  });
}

}  // extern "C"
