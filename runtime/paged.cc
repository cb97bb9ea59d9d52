#include "runtime/paged.h"

#include <algorithm>

#include "memory/status.h"

namespace vattn {
namespace {

constexpr int64_t kMostStride = int64_t{1} << 40;  // elements: products with block ids do not wrap

absl::Status InRange(const char* name, int64_t value, int64_t low, int64_t high) {
  return value < low || value > high ? OutOfRangeError(name, value, low, high) : absl::OkStatus();
}

absl::Status CheckNumbers(const PagedOptions& p, const Runtime& runtime) {
  VATTN_RETURN_IF_ERROR(InRange("block_tokens", p.block_tokens, kTileTokens, 1 << 20));
  if (p.block_tokens % kTileTokens != 0) {
    return InvalidArgumentError("block_tokens is ", p.block_tokens, ", must be a multiple of ",
                                kTileTokens);
  }
  VATTN_RETURN_IF_ERROR(InRange("num_blocks", p.num_blocks, 1, INT32_MAX));
  VATTN_RETURN_IF_ERROR(InRange("block_stride", p.block_stride, 0, kMostStride));
  VATTN_RETURN_IF_ERROR(InRange("token_stride", p.token_stride, 0, kMostStride));
  VATTN_RETURN_IF_ERROR(InRange("head_stride", p.head_stride, 0, kMostStride));
  VATTN_RETURN_IF_ERROR(InRange("max_tokens", p.max_tokens, 1, INT32_MAX));
  VATTN_RETURN_IF_ERROR(InRange("max_requests", p.max_requests, 1, 4096));
  VATTN_RETURN_IF_ERROR(InRange("max_query_tokens", p.max_query_tokens, 1, kMaxQueryTokens));
  VATTN_RETURN_IF_ERROR(
      InRange("max_step_tokens", p.max_step_tokens, 0, int64_t{p.max_requests} * p.max_tokens));
  const int most = runtime.backend().max_group_heads();
  for (int l = 0; l < runtime.options().num_layers; ++l) {
    if (runtime.kv_heads(l) == 0 || p.max_query_tokens * runtime.group_heads(l) <= most) continue;
    return NotSupportedError("max_query_tokens is ", p.max_query_tokens, ", must be at most ",
                             most / runtime.group_heads(l), ": layer ", l, " has ",
                             runtime.group_heads(l),
                             " query heads per KV head, and this backend works on ", most,
                             " of all query tokens together");
  }
  return absl::OkStatus();
}

absl::Status CheckAddresses(const PagedOptions& p, const Runtime& runtime) {
  const bool shared = runtime.options().shared_kv;
  if (shared != p.v.empty()) {
    return InvalidArgumentError("v is ", p.v.empty() ? "NULL" : "given", ", must be ",
                                shared ? "NULL" : "given", " with shared_kv = ", shared);
  }
  const auto check = [&](const char* name, const std::vector<void*>& list) {
    for (int l = 0; l < static_cast<int>(list.size()); ++l) {
      if (runtime.kv_heads(l) > 0 && list[l] == nullptr)
        return InvalidArgumentError(name, "[", l, "] is NULL, must be given");
    }
    return absl::OkStatus();
  };
  VATTN_RETURN_IF_ERROR(check("k", p.k));
  VATTN_RETURN_IF_ERROR(check("v", p.v));
  return check("codes", p.codes);
}

absl::Status CheckIndex(const PagedOptions& p, const Runtime& runtime) {
  const IndexKind index = runtime.promise().index;
  const bool dense = runtime.promise().policy == Policy::kDense;
  if (index != IndexKind::kBalanced && index != IndexKind::kExternal && !dense) {
    return NotSupportedError("index is ", static_cast<int32_t>(index),
                             ", vattn_paged has balanced (0) and external (7)");
  }
  if (runtime.options().value_bits != 0) {
    return NotSupportedError("value_bits is ", runtime.options().value_bits,
                             ", vattn_paged has no value codes: must be 0");
  }
  if (p.tables.empty() && index == IndexKind::kBalanced && !dense)
    return InvalidArgumentError("tables is NULL, must name a file of vattn_tables_save");
  return absl::OkStatus();
}

// Rows of a layer. An address of V less one of K is a number of bytes whatever arrays they lie in.
Storage StorageOf(const Runtime& runtime, const PagedOptions& p, int layer, bool coded) {
  Storage s = runtime.storage();
  const int64_t element = ElementBytes(s.row.dtype);
  s.base = static_cast<std::byte*>(p.k[layer]);
  if (!s.row.shared_kv) {
    s.row.v_offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p.v[layer]) -
                                          reinterpret_cast<uintptr_t>(p.k[layer]));
  }
  s.block = {.bytes = p.block_stride * element,
             .token_bytes = p.token_stride * element,
             .head_bytes = p.head_stride * element,
             .tokens = p.block_tokens};
  if (!coded) s.code = {.kind = IndexKind::kExternal};
  s.codes = p.codes.empty() ? nullptr : static_cast<std::byte*>(p.codes[layer]);
  s.code_block_bytes = p.code_block_stride;
  return s;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Paged>> Paged::Create(std::shared_ptr<Runtime> runtime,
                                                     const PagedOptions& options) {
  VATTN_RETURN_IF_ERROR(CheckNumbers(options, *runtime));
  VATTN_RETURN_IF_ERROR(CheckAddresses(options, *runtime));
  VATTN_RETURN_IF_ERROR(CheckIndex(options, *runtime));
  PagedPool pool;
  pool.options = options;
  PagedOptions& p = pool.options;
  if (p.max_step_tokens == 0) p.max_step_tokens = int64_t{p.max_requests} * p.max_tokens;
  const bool coded = runtime->promise().index == IndexKind::kBalanced &&
                     runtime->promise().policy != Policy::kDense;
  int most_heads = 0;
  for (int l = 0; l < runtime->options().num_layers; ++l)
    most_heads = std::max(most_heads, runtime->kv_heads(l));
  const int64_t used =
      int64_t{most_heads} * p.block_tokens * (coded ? runtime->storage().code.bytes() : 0);
  if (p.code_block_stride == 0) p.code_block_stride = used;
  if (p.code_block_stride < used || p.code_block_stride > kMostStride ||
      p.code_block_stride % 16 != 0) {
    return InvalidArgumentError("code_block_stride is ", p.code_block_stride,
                                ", must be a multiple of 16 and at least ", used);
  }
  for (int l = 0; l < runtime->options().num_layers; ++l)
    pool.layers.push_back(runtime->kv_heads(l) > 0 ? StorageOf(*runtime, p, l, coded) : Storage());
  if (coded) {
    absl::StatusOr<ModelTables> tables = ReadTables(*runtime, p.tables, p.model);
    if (!tables.ok()) return tables.status();
    pool.tables = *std::move(tables);
  }
  std::unique_ptr<Paged> paged(new Paged(std::move(runtime), std::move(pool)));
  absl::StatusOr<std::unique_ptr<PagedHalf>> half =
      paged->runtime_->backend().MakePaged(*paged->runtime_, paged->pool_);
  if (!half.ok()) return half.status();
  paged->half_ = *std::move(half);
  return paged;
}

Paged::Paged(std::shared_ptr<Runtime> runtime, PagedPool pool)
    : runtime_(std::move(runtime)), pool_(std::move(pool)) {
  runtime_->CountBatches(1);
}

Paged::~Paged() { runtime_->CountBatches(-1); }

absl::Status Paged::Write(const PagedRows& r, DeviceStream stream) {
  if (r.num_tokens == 0) return absl::OkStatus();
  if (r.slots == nullptr) return InvalidArgumentError("slots is NULL, must be given");
  const bool want_v = r.k != nullptr && !runtime_->options().shared_kv;
  if ((r.v != nullptr) != want_v) {
    return InvalidArgumentError("v is ", r.v == nullptr ? "NULL" : "given", ", must be ",
                                want_v ? "given" : "NULL", " with k ",
                                r.k == nullptr ? "NULL" : "given",
                                " and shared_kv = ", runtime_->options().shared_kv);
  }
  return half_->Write(r, stream);
}

absl::Status Paged::BeginStep(const PagedStep& s, DeviceStream stream) {
  const PagedOptions& p = pool_.options;
  VATTN_RETURN_IF_ERROR(InRange("num_requests", s.num_requests, 0, p.max_requests));
  VATTN_RETURN_IF_ERROR(InRange("max_query_tokens", s.max_query_tokens, 1, p.max_query_tokens));
  VATTN_RETURN_IF_ERROR(InRange("num_query_tokens", s.num_query_tokens, 0, INT32_MAX));
  if (s.num_requests > 0) {
    VATTN_RETURN_IF_ERROR(InRange("block_table_stride", s.block_table_stride,
                                  pool_.BlocksOf(p.max_tokens), int64_t{1} << 32));
    const std::pair<const char*, const void*> arrays[] = {{"block_table", s.block_table},
                                                          {"lengths", s.lengths},
                                                          {"query_starts", s.query_starts},
                                                          {"request_rows", s.request_rows}};
    for (const auto& [name, array] : arrays) {
      if (array == nullptr) return InvalidArgumentError(name, " is NULL, must be given");
    }
  }
  open_ = false;
  VATTN_RETURN_IF_ERROR(half_->BeginStep(s, stream));
  step_ = s;
  open_ = true;
  return absl::OkStatus();
}

absl::Status Paged::Attend(const AttendRequest& r, DeviceStream stream) {
  if (r.partial != nullptr || r.gathered != nullptr) {
    return NotSupportedError(
        r.partial != nullptr ? "partial" : "gathered",
        " is given, slices of a context are sequences: must be NULL over an engine's pool");
  }
  if (!open_)
    return InvalidArgumentError("no step is open, vattn_paged_begin_step must come first");
  VATTN_RETURN_IF_ERROR(CheckLayer(*runtime_, r.layer));
  if (r.num_tokens != step_.max_query_tokens) {
    return InvalidArgumentError("num_tokens is ", r.num_tokens,
                                ", must be max_query_tokens of the step: ", step_.max_query_tokens);
  }
  if (r.k_new != nullptr) {
    return InvalidArgumentError(
        "k_new is given, must be NULL: vattn_paged_write writes rows before");
  }
  if (r.v_new != nullptr) {
    return InvalidArgumentError(
        "v_new is given, must be NULL: vattn_paged_write writes rows before");
  }
  VATTN_RETURN_IF_ERROR(CheckScores(*runtime_, r));
  if (r.scores != nullptr)
    VATTN_RETURN_IF_ERROR(
        InRange("scores_stride", r.scores_stride, pool_.options.max_tokens, kMostScoresStride));
  if (step_.num_requests == 0) return absl::OkStatus();
  if (r.q == nullptr) return InvalidArgumentError("q is NULL, must be given");
  return half_->Attend(r, stream);
}

absl::Status Paged::Prefill(const PagedPrefill& r) {
  VATTN_RETURN_IF_ERROR(runtime_->backend().CheckPrefill());
  VATTN_RETURN_IF_ERROR(InRange("length", r.length, r.num_tokens, pool_.options.max_tokens));
  if (r.blocks == nullptr) return InvalidArgumentError("blocks is NULL, must be given");
  if (r.q == nullptr) return InvalidArgumentError("q is NULL, must be given");
  std::vector<std::byte> copy;
  std::vector<const std::byte*> ids(1);
  const int64_t blocks = pool_.BlocksOf(r.length);
  VATTN_RETURN_IF_ERROR(runtime_->backend().OnHost(
      r.blocks, {0}, blocks * static_cast<int64_t>(sizeof(int32_t)), ids, copy));
  const int32_t* const on_host = reinterpret_cast<const int32_t*>(ids[0]);
  for (int64_t b = 0; b < blocks; ++b) {
    if (on_host[b] < 0 || on_host[b] >= pool_.options.num_blocks) {
      return OutOfRangeError(absl::StrCat("blocks[", b, "]"), on_host[b], 0,
                             pool_.options.num_blocks - 1);
    }
  }
  // All KV heads have the same blocks.
  const std::vector<const int32_t*> by_head(static_cast<size_t>(runtime_->kv_heads(r.layer)),
                                            on_host);
  return half_->Prefill(r.layer, {.storage = pool_.layers[r.layer],
                                  .blocks = by_head.data(),
                                  .kv_heads = runtime_->kv_heads(r.layer),
                                  .group_heads = runtime_->group_heads(r.layer),
                                  .q_heads = runtime_->options().num_q_heads,
                                  .out_dtype = r.out_dtype,
                                  .first = r.length - r.num_tokens,
                                  .count = r.num_tokens,
                                  .q = r.q,
                                  .q_token_stride = r.q_token_stride,
                                  .q_head_stride = r.q_head_stride,
                                  .out = r.out,
                                  .lse = r.lse});
}

}  // namespace vattn
