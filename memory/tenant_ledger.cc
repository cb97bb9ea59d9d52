#include "memory/tenant_ledger.h"

#include <cassert>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "memory/status.h"

namespace vattn {

TenantLedger::TenantLedger(int64_t default_limit) : default_limit_(default_limit), entries_(1) {
  entries_[0].open = 1;  // stays
  slots_.emplace(0, TenantSlot::kNone);
}

TenantSlot TenantLedger::Enter(uint64_t tenant) {
  const auto [place, added] = slots_.try_emplace(tenant, TenantSlot::kNone);
  if (!added) return place->second;
  absl::Cleanup undo = [this, place = place] { slots_.erase(place); };  // when memory runs out
  if (spare_.empty()) {
    spare_.reserve(entries_.size() + 1);
    entries_.emplace_back();
    place->second = static_cast<TenantSlot>(entries_.size() - 1);
  } else {
    place->second = spare_.back();
    spare_.pop_back();
  }
  std::move(undo).Cancel();
  at(place->second) = {.use = {.tenant = tenant, .limit = default_limit_}};
  return place->second;
}

void TenantLedger::ForgetIfIdle(TenantSlot slot) {
  const Entry& entry = at(slot);
  if (entry.open > 0 || entry.own_limit || entry.use.used > 0 || entry.use.reserved > 0) return;
  slots_.erase(entry.use.tenant);
  spare_.push_back(slot);
}

TenantSlot TenantLedger::Open(uint64_t tenant) {
  const TenantSlot slot = Enter(tenant);
  ++at(slot).open;
  return slot;
}

void TenantLedger::Close(TenantSlot slot) {
  assert(at(slot).open > 0);
  --at(slot).open;
  ForgetIfIdle(slot);
}

void TenantLedger::SetLimit(uint64_t tenant, int64_t blocks) {
  assert(tenant != 0);
  Entry& entry = at(Enter(tenant));
  entry.own_limit = true;
  entry.use.limit = blocks;
}

void TenantLedger::ClearLimit(uint64_t tenant) {
  const auto place = slots_.find(tenant);
  if (place == slots_.end() || tenant == 0) return;
  Entry& entry = at(place->second);
  entry.own_limit = false;
  entry.use.limit = default_limit_;
  ForgetIfIdle(place->second);
}

void TenantLedger::Give(TenantSlot slot, int64_t blocks) {
  assert(at(slot).use.used >= blocks);
  at(slot).use.used -= blocks;
  ForgetIfIdle(slot);
}

void TenantLedger::Unreserve(TenantSlot slot, int64_t blocks) {
  assert(at(slot).use.reserved >= blocks);
  at(slot).use.reserved -= blocks;
}

void TenantLedger::Refuse(TenantSlot slot, bool for_quota) {
  ++at(slot).use.full_refusals;
  if (for_quota) ++at(slot).use.quota_refusals;
}

TenantUse TenantLedger::Find(uint64_t tenant) const {
  const auto place = slots_.find(tenant);
  if (place != slots_.end()) return use(place->second);
  return {.tenant = tenant, .limit = default_limit_};
}

std::vector<TenantUse> TenantLedger::All() const {
  std::vector<TenantUse> all;
  for (const auto& [tenant, slot] : slots_) all.push_back(use(slot));
  return all;
}

absl::Status TenantLedger::CheckInvariants(const std::vector<int64_t>& used,
                                           int64_t reserved) const {
  for (size_t i = 0; i < entries_.size(); ++i) {
    const TenantUse& counted = entries_[i].use;
    if (counted.used != used[i]) {
      return InternalError("tenant ", counted.tenant, " uses ", used[i], " blocks, counted as ",
                           counted.used);
    }
    if (counted.reserved < 0) {
      return InternalError("tenant ", counted.tenant, " has reserved ", counted.reserved);
    }
    reserved -= counted.reserved;
  }
  if (reserved != 0) {
    return InternalError("tenants have reserved ", -reserved, " blocks more than the pool knows");
  }
  if (slots_.size() + spare_.size() != entries_.size()) {
    return InternalError("tenants: ", slots_.size(), " known and ", spare_.size(), " spare of ",
                         entries_.size());
  }
  return absl::OkStatus();
}

}  // namespace vattn
