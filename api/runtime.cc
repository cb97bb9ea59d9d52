// Options, runtimes, tenants and counters of the C API.
#include <cstring>
#include <string>
#include <vector>

#include "api/calls.h"
#include "api/options.h"
#include "runtime/doctor.h"

static_assert(static_cast<int>(vattn::Code::kNotFound) == VATTN_NOT_FOUND);
static_assert(static_cast<int>(vattn::DType::kBF16) == VATTN_BF16);
static_assert(static_cast<int>(vattn::Policy::kDense) == VATTN_POLICY_DENSE);
static_assert(static_cast<int>(vattn::IndexKind::kExternal) == VATTN_INDEX_EXTERNAL);
static_assert(static_cast<int>(vattn::Norm::kOutput) == VATTN_NORM_OUTPUT);
static_assert(static_cast<int>(vattn::OnUnverified::kBestEffort) ==
              VATTN_ON_UNVERIFIED_BEST_EFFORT);
static_assert(static_cast<int>(vattn::Bound::kSafe) == VATTN_BOUND_SAFE);
static_assert(static_cast<int>(vattn::Target::kDenominator) == VATTN_TARGET_DENOMINATOR);
static_assert(static_cast<int>(vattn::Verdict::kBestEffort) == VATTN_VERDICT_BEST_EFFORT);
static_assert(static_cast<int>(vattn::LogLevel::kDebug) == VATTN_LOG_DEBUG);
static_assert(static_cast<int>(vattn::IoEngine::kPread) == VATTN_IO_PREAD);
static_assert(static_cast<int>(vattn::Admission::kReserved) == VATTN_ADMISSION_RESERVED);

namespace {

using vattn::InvalidArgumentError;
using vattn::api::CheckStructSize;
using vattn::api::GiveText;
using vattn::api::Guard;
using vattn::api::InitStruct;
using vattn::api::NotNull;
using vattn::api::Usable;

vattn::Logger ToLogger(vattn_log_function function, void* user) {
  if (function == nullptr) return nullptr;
  return [function, user](vattn::LogLevel level, const std::string& message) {
    function(user, static_cast<int32_t>(level), message.c_str());
  };
}

}  // namespace

extern "C" {

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
    absl::StatusOr<vattn::Options> checked = vattn::api::ToOptions(given);
    if (!checked.ok()) return checked.status();
    absl::StatusOr<std::shared_ptr<vattn::Runtime>> made =
        vattn::Runtime::Create(*std::move(checked), ToLogger(given.log, given.log_user));
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
  if (runtime == nullptr || !vattn::api::UsableHere(*runtime->impl).ok()) return;
  const vattn::LogHold hold;
  runtime->impl->Close();
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

vattn_code vattn_tenant_limit(vattn_runtime* runtime, uint64_t tenant, uint64_t host_bytes) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(runtime));
    if (tenant == 0)
      return InvalidArgumentError("tenant is 0, which has no quota, must be 1 or more");
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

vattn_code vattn_runtime_stats(const vattn_runtime* runtime, vattn_stats* stats,
                               size_t struct_size) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(runtime));
    VATTN_RETURN_IF_ERROR(NotNull("stats", stats));
    VATTN_RETURN_IF_ERROR(CheckStructSize(struct_size));
    const vattn::StatsSnapshot s = runtime->impl->Stats();
    vattn_stats all;
    std::memset(&all, 0, sizeof(all));
    all.struct_size = sizeof(all);
#define VATTN_COPY(name, type, help) all.name = s.name;
    VATTN_MEASURES(VATTN_COPY)
    VATTN_COUNTERS(VATTN_COPY)
#undef VATTN_COPY
    vattn::api::Export(all, stats, struct_size);
    return absl::OkStatus();
  });
}

vattn_code vattn_stats_prometheus(const vattn_runtime* runtime, char* buffer, size_t size,
                                  size_t* needed) {
  return Guard([&]() -> absl::Status {
    VATTN_RETURN_IF_ERROR(Usable(runtime));
    const vattn::Runtime& impl = *runtime->impl;
    return GiveText(vattn::PrometheusText(impl.Stats(), impl.StatsOfTenants()), buffer, size,
                    needed);
  });
}

}  // extern "C"
