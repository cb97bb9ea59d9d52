// Which tenant holds how much of a pool, and how much it may: bookkeeping, without blocks.
#ifndef VATTN_MEMORY_TENANT_LEDGER_H_
#define VATTN_MEMORY_TENANT_LEDGER_H_

#include <cstdint>
#include <limits>
#include <map>
#include <vector>

#include "absl/status/status.h"

namespace vattn {

// Where the ledger has a tenant. kNone is tenant 0: whoever names none, without a limit.
enum class TenantSlot : int32_t { kNone = 0 };

inline constexpr int64_t kNoTenantLimit = std::numeric_limits<int64_t>::max();

// In blocks.
struct TenantUse {
  uint64_t tenant = 0;
  int64_t limit = kNoTenantLimit;
  int64_t used = 0, reserved = 0;
  uint64_t full_refusals = 0;   // its requests that found no room
  uint64_t quota_refusals = 0;  // of them those over its limit

  // May be below 0 when the limit came later.
  int64_t room() const { return limit == kNoTenantLimit ? limit : limit - used - reserved; }
};

// Not thread-safe. A tenant is known as long as it is open, holds or has reserved blocks, or was given
// a limit. After that it is forgotten, and its count of refusals too.
class TenantLedger {
 public:
  // default_limit: blocks for each tenant but 0 that was not given a limit.
  explicit TenantLedger(int64_t default_limit);

  TenantSlot Open(uint64_t tenant);
  // Once for each Open.
  void Close(TenantSlot slot);
  // tenant is not 0. A limit below what it holds refuses more until it holds less.
  void SetLimit(uint64_t tenant, int64_t blocks);
  void ClearLimit(uint64_t tenant);

  void Take(TenantSlot slot, int64_t blocks) { at(slot).use.used += blocks; }
  void Give(TenantSlot slot, int64_t blocks);
  void Reserve(TenantSlot slot, int64_t blocks) { at(slot).use.reserved += blocks; }
  void Unreserve(TenantSlot slot, int64_t blocks);
  void Refuse(TenantSlot slot, bool for_quota);

  const TenantUse& use(TenantSlot slot) const { return entries_[static_cast<size_t>(slot)].use; }
  // Zeros and the limit in force for one that is not known.
  TenantUse Find(uint64_t tenant) const;
  // All that are known, by number; tenant 0 first.
  std::vector<TenantUse> All() const;

  // used [slots]: blocks found in use by slot. INTERNAL with the first contradiction.
  absl::Status CheckInvariants(const std::vector<int64_t>& used, int64_t reserved) const;
  size_t num_slots() const { return entries_.size(); }

 private:
  struct Entry {
    TenantUse use;
    int64_t open = 0;
    bool own_limit = false;
  };

  Entry& at(TenantSlot slot) { return entries_[static_cast<size_t>(slot)]; }
  TenantSlot Enter(uint64_t tenant);
  void ForgetIfIdle(TenantSlot slot);

  const int64_t default_limit_;
  std::vector<Entry> entries_;
  std::map<uint64_t, TenantSlot> slots_;
  std::vector<TenantSlot> spare_;  // slots of no tenant; has room for all
};

}  // namespace vattn

#endif  // VATTN_MEMORY_TENANT_LEDGER_H_
