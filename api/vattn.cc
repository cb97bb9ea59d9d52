// The C API: checks pointers and structs, calls the runtime, translates errors. Nothing thrown leaves.
#include "api/vattn.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <new>
#include <string>

#include "api/options.h"
#include "api/structs.h"
#include "runtime/batch.h"
#include "runtime/doctor.h"
#include "runtime/prefixes.h"
#include "runtime/runtime.h"
#include "runtime/sequence.h"
#include "runtime/status.h"

struct vattn_runtime {
  std::shared_ptr<vattn::Runtime> impl;
  vattn_log_function log;
  void* log_user;
};
struct vattn_sequence {
  std::unique_ptr<vattn::Sequence> impl;
};
struct vattn_batch {
  std::unique_ptr<vattn::Batch> impl;
};

static_assert(static_cast<int>(vattn::Code::kNotFound) == VATTN_NOT_FOUND);
static_assert(static_cast<int>(vattn::DType::kBF16) == VATTN_BF16);
static_assert(static_cast<int>(vattn::Policy::kDense) == VATTN_POLICY_DENSE);
static_assert(static_cast<int>(vattn::IndexKind::kExternal) == VATTN_INDEX_EXTERNAL);
static_assert(static_cast<int>(vattn::Norm::kOutput) == VATTN_NORM_OUTPUT);
static_assert(static_cast<int>(vattn::OnUnverified::kBestEffort) == VATTN_ON_UNVERIFIED_BEST_EFFORT);
static_assert(static_cast<int>(vattn::Bound::kSafe) == VATTN_BOUND_SAFE);
static_assert(static_cast<int>(vattn::Target::kDenominator) == VATTN_TARGET_DENOMINATOR);
static_assert(static_cast<int>(vattn::Verdict::kBestEffort) == VATTN_VERDICT_BEST_EFFORT);
static_assert(static_cast<int>(vattn::LogLevel::kDebug) == VATTN_LOG_DEBUG);
static_assert(static_cast<int>(vattn::IoEngine::kPread) == VATTN_IO_PREAD);
static_assert(static_cast<int>(vattn::Admission::kReserved) == VATTN_ADMISSION_RESERVED);
static_assert(static_cast<int>(vattn::PrefixTier::kDisk) == VATTN_TIER_DISK);

namespace {

using vattn::InvalidArgumentError;
using vattn::OutOfRangeError;

thread_local std::string last_error_text;
thread_local const char* last_error = "";  // into last_error_text, or a text that needs no memory

vattn_code Fail(vattn_code code, const char* text) noexcept {
  try {
    last_error_text = text;
    last_error = last_error_text.c_str();
  } catch (const std::bad_alloc&) {
    last_error = "the system refused memory, also for the text of this error";
  }
  return code;
}

// Runs a body that returns absl::Status and translates whatever comes out of it.
template <class F>
vattn_code Guard(F&& body) noexcept {
  try {
    const absl::Status status = body();
    if (status.ok()) return VATTN_OK;
    return Fail(static_cast<vattn_code>(vattn::CodeOf(status)), std::string(status.message()).c_str());
  } catch (const std::bad_alloc&) {
    return Fail(VATTN_OUT_OF_MEMORY, "the system refused memory");
  } catch (const std::exception& error) {
    return Fail(VATTN_INTERNAL, error.what());
  } catch (...) {
    return Fail(VATTN_INTERNAL, "unknown exception");
  }
}

absl::Status NotNull(const char* name, const void* pointer) {
  return pointer != nullptr ? absl::OkStatus() : InvalidArgumentError(name, " is NULL, must be given");
}

absl::Status Usable(const vattn_runtime* runtime) {
  return NotNull("runtime", runtime);
}

// A sequence for the length of a call, during which it is not spilled.
class Use {
 public:
  explicit Use(const vattn_sequence* sequence) {
    status_ = NotNull("sequence", sequence);
    if (!status_.ok()) return;
    impl_ = sequence->impl.get();
    if (impl_->runtime().closed()) {
      status_ = InvalidArgumentError("sequence outlived its runtime, may only be destroyed");
      return;
    }
    lock_ = std::unique_lock<std::mutex>(impl_->use());
    impl_->Touch();
  }
  const absl::Status& status() const { return status_; }
  // OK if the sequence may be used and is awake now.
  absl::Status Awake() const { return status_.ok() ? impl_->Wake() : status_; }

 private:
  absl::Status status_;
  vattn::Sequence* impl_ = nullptr;
  std::unique_lock<std::mutex> lock_;
};

absl::Status Usable(const vattn_batch* batch) {
  VATTN_RETURN_IF_ERROR(NotNull("batch", batch));
  if (batch->impl->runtime().closed()) return InvalidArgumentError("batch outlived its runtime, may only be destroyed");
  return absl::OkStatus();
}

// Hands a new sequence to the caller.
absl::Status Give(absl::StatusOr<std::unique_ptr<vattn::Sequence>> made, vattn_sequence** out) {
  if (!made.ok()) return made.status();
  *out = new vattn_sequence{*std::move(made)};
  return absl::OkStatus();
}

absl::Status GiveText(const std::string& text, char* buffer, size_t size, size_t* needed) {
  VATTN_RETURN_IF_ERROR(NotNull("needed", needed));
  if (buffer == nullptr && size > 0) return InvalidArgumentError("buffer is NULL with size ", size, ", must be given");
  *needed = text.size();
  if (size > 0) {
    const size_t count = std::min(size - 1, text.size());
    std::copy_n(text.data(), count, buffer);
    buffer[count] = '\0';
  }
  return absl::OkStatus();
}

absl::Status CheckStructSize(size_t size) {
  if (size >= sizeof(size_t) && size <= 4096) return absl::OkStatus();
  return OutOfRangeError("struct_size", size, sizeof(size_t), 4096);
}

absl::Status CheckReserve(int64_t reserve_tokens) {
  const int64_t most = vattn::Sequence::kAllTokens;
  if (reserve_tokens >= 0 && reserve_tokens <= most) return absl::OkStatus();
  return OutOfRangeError("reserve_tokens", reserve_tokens, 0, most);
}

absl::Status ToSequenceOptions(const vattn_sequence_options* options, vattn::SequenceOptions& out) {
  vattn_sequence_options o;
  vattn_sequence_options_init(&o, sizeof(o));
  if (options != nullptr) VATTN_RETURN_IF_ERROR(vattn::api::Import("options", options, o));
  out = {.id = o.id, .reserve_tokens = o.reserve_tokens, .tenant = o.tenant};
  return CheckReserve(o.reserve_tokens);
}

// What is found, where, and for whom.
struct PrefixRequest {
  vattn::Prefix prefix;
  vattn::PrefixTier tier;
  vattn::SequenceOptions sequence;
};

absl::Status ToPrefix(const vattn::Runtime& runtime, const vattn_prefix* prefix, PrefixRequest& out) {
  vattn_prefix p{};
  VATTN_RETURN_IF_ERROR(vattn::api::Import("prefix", prefix, p));
  VATTN_RETURN_IF_ERROR(NotNull("salt", p.salt));
  if (p.salt_bytes < 1 || p.salt_bytes > 4096) return OutOfRangeError("salt_bytes", p.salt_bytes, 1, 4096);
  VATTN_RETURN_IF_ERROR(NotNull("tokens", p.tokens));
  if (p.num_tokens < 1 || p.num_tokens > int64_t{1} << 31) {
    return OutOfRangeError("num_tokens", p.num_tokens, 1, int64_t{1} << 31);
  }
  VATTN_RETURN_IF_ERROR(CheckReserve(p.reserve_tokens));
  if (p.tier < 0 || p.tier > VATTN_TIER_DISK) return OutOfRangeError("tier", p.tier, 0, int{VATTN_TIER_DISK});
  if (p.reserved0 != 0) return OutOfRangeError("reserved0", p.reserved0, 0, 0);
  out.tier = static_cast<vattn::PrefixTier>(p.tier);
  out.sequence = {.id = 0, .reserve_tokens = p.reserve_tokens, .tenant = p.tenant};
  out.prefix.salt.assign(static_cast<const char*>(p.salt), p.salt_bytes);
  out.prefix.tokens.assign(p.tokens, p.tokens + p.num_tokens);
  return vattn::CheckTier(runtime, out.tier);
}

absl::Status CheckLayer(const vattn::Runtime& runtime, int32_t layer) {
  const int32_t layers = runtime.options().num_layers;
  if (layer < 0 || layer >= layers) return OutOfRangeError("layer", layer, 0, layers - 1);
  if (runtime.kv_heads(layer) == 0) {
    return InvalidArgumentError("layer is ", layer, ", which layer_kv_heads leaves out, must be one that it keeps");
  }
  return absl::OkStatus();
}

absl::Status CheckStride(const char* name, int64_t stride) {
  if (stride >= 0 && stride <= int64_t{1} << 40) return absl::OkStatus();
  return OutOfRangeError(name, stride, 0, int64_t{1} << 40);
}

absl::Status ToAppend(const vattn::Runtime& runtime, const vattn_append_params& p, int64_t tokens_before,
                      vattn::AppendRequest& out) {
  VATTN_RETURN_IF_ERROR(CheckLayer(runtime, p.layer));
  const vattn::Options& o = runtime.options();
  const int64_t most = (int64_t{1} << 31) - tokens_before;
  if (p.num_tokens < 1 || p.num_tokens > most) return OutOfRangeError("num_tokens", p.num_tokens, 1, most);
  if (p.num_queries < 0 || p.num_queries > p.num_tokens) {
    return OutOfRangeError("num_queries", p.num_queries, 0, p.num_tokens);
  }
  VATTN_RETURN_IF_ERROR(NotNull("k", p.k));
  if ((p.v == nullptr) != (o.shared_kv == 1)) {
    return InvalidArgumentError("v is ", p.v == nullptr ? "NULL" : "given", ", must be ",
                                o.shared_kv == 1 ? "NULL" : "given", " with shared_kv = ", o.shared_kv);
  }
  if (p.num_queries > 0) VATTN_RETURN_IF_ERROR(NotNull("q", p.q));
  VATTN_RETURN_IF_ERROR(CheckStride("k_token_stride", p.k_token_stride));
  VATTN_RETURN_IF_ERROR(CheckStride("k_head_stride", p.k_head_stride));
  VATTN_RETURN_IF_ERROR(CheckStride("v_token_stride", p.v_token_stride));
  VATTN_RETURN_IF_ERROR(CheckStride("v_head_stride", p.v_head_stride));
  VATTN_RETURN_IF_ERROR(CheckStride("q_token_stride", p.q_token_stride));
  VATTN_RETURN_IF_ERROR(CheckStride("q_head_stride", p.q_head_stride));
  const int64_t heads = runtime.kv_heads(p.layer);
  const auto stride = [](int64_t given, int64_t contiguous) { return given == 0 ? contiguous : given; };
  out.layer = p.layer;
  out.num_tokens = p.num_tokens;
  out.num_queries = p.num_queries;
  out.k = p.k;
  out.v = p.v;
  out.q = p.q;
  out.k_token_stride = stride(p.k_token_stride, heads * o.head_dim_k);
  out.k_head_stride = stride(p.k_head_stride, o.head_dim_k);
  out.v_token_stride = stride(p.v_token_stride, heads * o.head_dim_v);
  out.v_head_stride = stride(p.v_head_stride, o.head_dim_v);
  out.q_token_stride = stride(p.q_token_stride, int64_t{o.num_q_heads} * o.head_dim_k);
  out.q_head_stride = stride(p.q_head_stride, o.head_dim_k);
  return absl::OkStatus();
}

absl::Status CheckStream(const vattn_batch* batch, const CUstream_st* stream) {
  if (stream == nullptr || batch->impl->runtime().cuda() != nullptr) return absl::OkStatus();
  return InvalidArgumentError("stream is given, must be NULL on the CPU backend");
}

absl::Status ToAttend(const vattn_attend_params* params, bool needs_out, vattn::AttendRequest& out) {
  vattn_attend_params p;
  vattn_attend_params_init(&p, sizeof(p));
  VATTN_RETURN_IF_ERROR(vattn::api::Import("params", params, p));
  if (p.reserved0 != 0) return OutOfRangeError("reserved0", p.reserved0, 0, 0);
  if (p.reserved1 != 0) return OutOfRangeError("reserved1", p.reserved1, 0, 0);
  if (p.num_tokens != 1) return OutOfRangeError("num_tokens", p.num_tokens, 1, 1);
  if (p.out_dtype < 0 || p.out_dtype > 2) return OutOfRangeError("out_dtype", p.out_dtype, 0, 2);
  if (needs_out) VATTN_RETURN_IF_ERROR(NotNull("out", p.out));
  out = {.layer = p.layer,
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
         .scores_stride = p.scores_stride};
  return absl::OkStatus();
}

absl::Status ToSelection(const vattn_selection* selection, bool needs_weights, vattn::Selection& out) {
  vattn_selection s;
  vattn_selection_init(&s, sizeof(s));
  VATTN_RETURN_IF_ERROR(vattn::api::Import("selection", selection, s));
  const int64_t most = int64_t{1} << 31;
  if (s.capacity < 1 || s.capacity > most) return OutOfRangeError("capacity", s.capacity, 1, most);
  VATTN_RETURN_IF_ERROR(NotNull("tokens", s.tokens));
  VATTN_RETURN_IF_ERROR(NotNull("counts", s.counts));
  if (needs_weights) VATTN_RETURN_IF_ERROR(NotNull("log_weights", s.log_weights));
  out = {.capacity = s.capacity, .tokens = s.tokens, .log_weights = s.log_weights, .counts = s.counts};
  return absl::OkStatus();
}

vattn::Logger ToLogger(vattn_log_function function, void* user) {
  if (function == nullptr) return nullptr;
  return [function, user](vattn::LogLevel level, const std::string& message) {
    function(user, static_cast<int32_t>(level), message.c_str());
  };
}

template <class T>
void InitStruct(T* value, size_t size, const T& defaults) {
  if (value != nullptr) vattn::api::Export(defaults, value, size);
}

}  // namespace

extern "C" {

const char* vattn_last_error(void) { return last_error; }
const char* vattn_code_name(int32_t code) { return vattn::CodeName(static_cast<vattn::Code>(code)); }
const char* vattn_version(void) { return VATTN_VERSION_TEXT; }
const char* vattn_build_info(void) { return VATTN_BUILD_TEXT; }

void vattn_options_init(vattn_options* options, size_t struct_size) {
  InitStruct(options, struct_size, vattn::api::DefaultOptions());
}

vattn_code vattn_options_from_json(const char* json, vattn_options* options) {
  static thread_local std::vector<int32_t> heads;
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(NotNull("json", json));
    vattn_options changed = vattn::api::DefaultOptions();
    VATTN_RETURN_IF_ERROR(vattn::api::Import("options", options, changed));
    VATTN_RETURN_IF_ERROR(vattn::api::ApplyJson(json, changed, heads));
    vattn::api::Export(changed, options, options->struct_size);
    return absl::OkStatus();
  });
}

vattn_code vattn_runtime_create(const vattn_options* options, vattn_runtime** out) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(NotNull("out", out));
    *out = nullptr;
    vattn_options given = vattn::api::DefaultOptions();
    VATTN_RETURN_IF_ERROR(vattn::api::Import("options", options, given));
    absl::StatusOr<std::shared_ptr<vattn::Runtime>> made =
        vattn::Runtime::Create(vattn::api::ToOptions(given), ToLogger(given.log, given.log_user));
    if (!made.ok()) return made.status();
    *out = new vattn_runtime{*std::move(made), given.log, given.log_user};
    return absl::OkStatus();
  });
}

vattn_code vattn_runtime_create_json(const char* json, vattn_runtime** out) {
  vattn_options options;
  vattn_options_init(&options, sizeof(options));
  if (out != nullptr) *out = nullptr;
  const vattn_code code = vattn_options_from_json(json, &options);
  return code == VATTN_OK ? vattn_runtime_create(&options, out) : code;
}

void vattn_runtime_destroy(vattn_runtime* runtime) {
  if (runtime == nullptr) return;
  Guard([&] {
    runtime->impl->Close();
    return absl::OkStatus();
  });
  delete runtime;
}

vattn_code vattn_runtime_options(const vattn_runtime* runtime, vattn_options* options) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(runtime));
    vattn_options ignored = vattn::api::DefaultOptions();
    VATTN_RETURN_IF_ERROR(vattn::api::Import("options", options, ignored));
    vattn_options in_force = vattn::api::FromOptions(runtime->impl->options());
    in_force.log = runtime->log;
    in_force.log_user = runtime->log_user;
    vattn::api::Export(in_force, options, options->struct_size);
    return absl::OkStatus();
  });
}

vattn_code vattn_doctor(char* buffer, size_t size, size_t* needed) {
  return Guard([&] { return GiveText(vattn::DoctorJson(), buffer, size, needed); });
}

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
    const int64_t most = vattn::Sequence::kAllTokens;
    if (tokens < 0 || tokens > most) return OutOfRangeError("tokens", tokens, 0, most);
    VATTN_RETURN_IF_ERROR(use.Awake());
    return sequence->impl->Reserve(tokens);
  });
}

void vattn_sequence_destroy(vattn_sequence* sequence) { delete sequence; }

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
    if (tokens < 0 || tokens > int64_t{1} << 31) return OutOfRangeError("tokens", tokens, 0, int64_t{1} << 31);
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
  return Guard([&]() -> absl::Status {
    const Use use(sequence);
    VATTN_RETURN_IF_ERROR(use.status());
    vattn_append_params p{};
    VATTN_RETURN_IF_ERROR(vattn::api::Import("params", params, p));
    const vattn::Runtime& runtime = sequence->impl->runtime();
    const bool known = p.layer >= 0 && p.layer < runtime.options().num_layers;
    vattn::AppendRequest request;
    VATTN_RETURN_IF_ERROR(ToAppend(runtime, p, known ? sequence->impl->length(p.layer) : 0, request));
    VATTN_RETURN_IF_ERROR(use.Awake());
    return sequence->impl->Append(request);
  });
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

vattn_code vattn_sequence_restore_as(vattn_runtime* runtime, const char* path, const vattn_sequence_options* options,
                                     vattn_sequence** out) {
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
  return Guard([&]() -> absl::Status {
    return Use(sequence).Awake();
  });
}

void vattn_prefix_init(vattn_prefix* prefix, size_t struct_size) {
  InitStruct(prefix, struct_size, vattn_prefix{});
}

vattn_code vattn_prefix_save(const vattn_sequence* sequence, const vattn_prefix* prefix) {
  return Guard([&]() -> absl::Status {
    const Use use(sequence);
    VATTN_RETURN_IF_ERROR(use.status());
    const vattn::Runtime& runtime = sequence->impl->runtime();
    PrefixRequest request;
    VATTN_RETURN_IF_ERROR(ToPrefix(runtime, prefix, request));
    const int64_t tokens = static_cast<int64_t>(request.prefix.tokens.size());
    for (int32_t l = 0; l < runtime.options().num_layers; ++l) {
      const int64_t most = sequence->impl->length(l);
      if (runtime.kv_heads(l) == 0 || tokens <= most) continue;
      return InvalidArgumentError("num_tokens is ", tokens, ", must be at most ", most, ", those of layer ", l);
    }
    VATTN_RETURN_IF_ERROR(use.Awake());
    return vattn::SavePrefix(*sequence->impl, std::move(request.prefix), request.tier);
  });
}

vattn_code vattn_prefix_restore(vattn_runtime* runtime, const vattn_prefix* prefix, uint64_t id, int64_t* tokens,
                                vattn_sequence** out) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(NotNull("out", out));
    *out = nullptr;
    VATTN_RETURN_IF_ERROR(NotNull("tokens", tokens));
    *tokens = 0;
    VATTN_RETURN_IF_ERROR(Usable(runtime));
    PrefixRequest request;
    VATTN_RETURN_IF_ERROR(ToPrefix(*runtime->impl, prefix, request));
    request.sequence.id = id;
    return Give(vattn::BeginFromPrefix(runtime->impl, request.prefix, request.tier, request.sequence, tokens), out);
  });
}

vattn_code vattn_prefix_forget(vattn_runtime* runtime, const void* salt, uint64_t salt_bytes, int64_t* prefixes) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(runtime));
    VATTN_RETURN_IF_ERROR(NotNull("salt", salt));
    if (salt_bytes < 1 || salt_bytes > 4096) return OutOfRangeError("salt_bytes", salt_bytes, 1, 4096);
    int64_t removed = 0;
    const absl::Status status =
        vattn::ForgetPrefixes(*runtime->impl, std::string(static_cast<const char*>(salt), salt_bytes), &removed);
    if (prefixes != nullptr) *prefixes = removed;
    return status;
  });
}

vattn_code vattn_tenant_limit(vattn_runtime* runtime, uint64_t tenant, uint64_t host_bytes) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(runtime));
    if (tenant == 0) return InvalidArgumentError("tenant is 0, which has no quota, must be 1 or more");
    runtime->impl->store().SetTenantLimit(tenant, host_bytes);
    return absl::OkStatus();
  });
}

vattn_code vattn_tenant_stats(const vattn_runtime* runtime, uint64_t tenant, vattn_tenant_use* use,
                              size_t struct_size) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(runtime));
    VATTN_RETURN_IF_ERROR(NotNull("use", use));
    VATTN_RETURN_IF_ERROR(CheckStructSize(struct_size));
    const vattn::TenantSnapshot s = runtime->impl->StatsOf(tenant);
    const vattn_tenant_use all = {.struct_size = sizeof(vattn_tenant_use),
                                  .host_bytes_limit = s.host_bytes_limit,
                                  .host_bytes_used = s.host_bytes_used,
                                  .host_bytes_reserved = s.host_bytes_reserved,
                                  .sequences = s.sequences,
                                  .full_refusals = s.full_refusals,
                                  .quota_refusals = s.quota_refusals};
    vattn::api::Export(all, use, struct_size);
    return absl::OkStatus();
  });
}

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

void vattn_batch_destroy(vattn_batch* batch) { delete batch; }

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
    VATTN_RETURN_IF_ERROR(CheckStream(batch, stream));
    return batch->impl->BeginStep(new_tokens, stream);
  });
}

void vattn_attend_params_init(vattn_attend_params* params, size_t struct_size) {
  vattn_attend_params defaults{};
  defaults.num_tokens = 1;
  InitStruct(params, struct_size, defaults);
}

void vattn_selection_init(vattn_selection* selection, size_t struct_size) {
  InitStruct(selection, struct_size, vattn_selection{});
}

vattn_code vattn_attend(vattn_batch* batch, const vattn_attend_params* params, CUstream_st* stream) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(batch));
    vattn::AttendRequest request;
    VATTN_RETURN_IF_ERROR(CheckStream(batch, stream));
    VATTN_RETURN_IF_ERROR(ToAttend(params, /*needs_out=*/true, request));
    return batch->impl->Attend(request, stream);
  });
}

vattn_code vattn_attend_selected(vattn_batch* batch, const vattn_attend_params* params,
                                 const vattn_selection* selection, CUstream_st* stream) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(batch));
    vattn::AttendRequest request;
    VATTN_RETURN_IF_ERROR(CheckStream(batch, stream));
    VATTN_RETURN_IF_ERROR(ToAttend(params, /*needs_out=*/true, request));
    vattn::Selection list;
    VATTN_RETURN_IF_ERROR(ToSelection(selection, /*needs_weights=*/false, list));
    return batch->impl->AttendSelected(request, list, stream);
  });
}

vattn_code vattn_select(vattn_batch* batch, const vattn_attend_params* params, vattn_selection* selection,
                        CUstream_st* stream) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(batch));
    vattn::AttendRequest request;
    VATTN_RETURN_IF_ERROR(CheckStream(batch, stream));
    VATTN_RETURN_IF_ERROR(ToAttend(params, /*needs_out=*/false, request));
    vattn::Selection list;
    VATTN_RETURN_IF_ERROR(ToSelection(selection, /*needs_weights=*/true, list));
    return batch->impl->Select(request, list, stream);
  });
}

vattn_code vattn_runtime_stats(const vattn_runtime* runtime, vattn_stats* stats, size_t struct_size) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(runtime));
    VATTN_RETURN_IF_ERROR(NotNull("stats", stats));
    VATTN_RETURN_IF_ERROR(CheckStructSize(struct_size));
    const vattn::StatsSnapshot s = runtime->impl->Stats();
    const vattn_stats all = {.struct_size = sizeof(vattn_stats),
                             .host_bytes_limit = s.host_bytes_limit,
                             .host_bytes_used = s.host_bytes_used,
                             .table_bytes = s.table_bytes,
                             .sequences = s.sequences,
                             .tokens = s.tokens,
                             .steps = s.steps,
                             .heads_exact = s.heads_exact,
                             .heads_verified = s.heads_verified,
                             .heads_dense = s.heads_dense,
                             .heads_best_effort = s.heads_best_effort,
                             .rows_middle = s.rows_middle,
                             .rows_selected = s.rows_selected,
                             .rows_fetched = s.rows_fetched,
                             .bytes_fetched = s.bytes_fetched,
                             .looks = s.looks,
                             .full_refusals = s.full_refusals,
                             .blocks_copied = s.blocks_copied,
                             .disk_bytes_used = s.disk_bytes_used,
                             .saves = s.saves,
                             .bytes_saved = s.bytes_saved,
                             .restores = s.restores,
                             .bytes_restored = s.bytes_restored,
                             .spills = s.spills,
                             .spill_failures = s.spill_failures,
                             .files_refused = s.files_refused,
                             .io_errors = s.io_errors,
                             .prefixes_stored = s.prefixes_stored,
                             .prefix_evictions = s.prefix_evictions,
                             .prefix_hits = s.prefix_hits,
                             .prefix_tokens = s.prefix_tokens,
                             .prefix_misses = s.prefix_misses,
                             .prefix_damaged = s.prefix_damaged,
                             .prefix_unread = s.prefix_unread,
                             .prefix_unlike = s.prefix_unlike,
                             .device_bytes_reserved = s.device_bytes_reserved,
                             .device_bytes_mapped = s.device_bytes_mapped,
                             .device_growths = s.device_growths,
                             .device_growth_ns = s.device_growth_ns,
                             .host_bytes_reserved = s.host_bytes_reserved,
                             .quota_refusals = s.quota_refusals,
                             .kept_prefixes = s.kept_prefixes,
                             .prefixes_kept = s.prefixes_kept,
                             .kept_evictions = s.kept_evictions,
                             .kept_hits = s.kept_hits};
    vattn::api::Export(all, stats, struct_size);
    return absl::OkStatus();
  });
}

vattn_code vattn_stats_prometheus(const vattn_runtime* runtime, char* buffer, size_t size, size_t* needed) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(runtime));
    const vattn::Runtime& impl = *runtime->impl;
    return GiveText(vattn::PrometheusText(impl.Stats(), impl.StatsOfTenants()), buffer, size, needed);
  });
}

}  // extern "C"
