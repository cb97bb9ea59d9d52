#include "runtime/stats.h"

#include "absl/strings/str_cat.h"

namespace vattn {
namespace {

void Append(std::string& out, const char* name, const char* type, const char* help,
            uint64_t value) {
  absl::StrAppend(&out, "# HELP vattn_", name, " ", help, "\n# TYPE vattn_", name, " ", type,
                  "\nvattn_", name, " ", value, "\n");
}

// One line for each tenant.
void AppendTenants(std::string& out, const char* name, const char* type, const char* help,
                   const std::vector<TenantSnapshot>& tenants, uint64_t TenantSnapshot::*value) {
  if (tenants.empty()) return;
  absl::StrAppend(&out, "# HELP vattn_tenant_", name, " ", help, "\n# TYPE vattn_tenant_", name,
                  " ", type, "\n");
  for (const TenantSnapshot& tenant : tenants) {
    absl::StrAppend(&out, "vattn_tenant_", name, "{tenant=\"", tenant.tenant, "\"} ", tenant.*value,
                    "\n");
  }
}

}  // namespace

StatsSnapshot Snapshot(const Counters& counters) {
  StatsSnapshot s;
#define VATTN_COPY(name, type, help) s.name = counters.name.load(std::memory_order_relaxed);
  VATTN_COUNTERS(VATTN_COPY)
#undef VATTN_COPY
  return s;
}

std::string PrometheusText(const StatsSnapshot& s, const std::vector<TenantSnapshot>& tenants) {
  std::string out;
#define VATTN_APPEND(name, type, help) Append(out, #name, type, help, s.name);
  VATTN_MEASURES(VATTN_APPEND)
  VATTN_COUNTERS(VATTN_APPEND)
#undef VATTN_APPEND
  AppendTenants(out, "host_bytes_limit", "gauge", "Quota of a tenant", tenants,
                &TenantSnapshot::host_bytes_limit);
  AppendTenants(out, "host_bytes_used", "gauge", "Bytes in blocks that it took or has reserved",
                tenants, &TenantSnapshot::host_bytes_used);
  AppendTenants(out, "host_bytes_reserved", "gauge",
                "Bytes of them that are reserved and not yet in use", tenants,
                &TenantSnapshot::host_bytes_reserved);
  AppendTenants(out, "sequences", "gauge", "Sequences of a tenant alive", tenants,
                &TenantSnapshot::sequences);
  AppendTenants(out, "full_refusals", "counter",
                "Its calls refused because the host pool or its quota was full", tenants,
                &TenantSnapshot::full_refusals);
  AppendTenants(out, "quota_refusals", "counter", "Its calls refused because of its quota", tenants,
                &TenantSnapshot::quota_refusals);
  return out;
}

}  // namespace vattn
