#include "runtime/room.h"

#include <mutex>

#include "memory/status.h"
#include "runtime/prefix/memory.h"
#include "runtime/runtime.h"
#include "runtime/sequence.h"

namespace vattn {

template <class Take>
absl::Status Room::TakeOrMake(const Sequence& user, int64_t count, const Take& take) {
  const HostStore& store = runtime_.store();
  const TenantSlot tenant = user.tenant_slot();
  absl::Status spilled;
  for (;;) {
    const absl::Status status = take();
    if (CodeOf(status) != Code::kFull) return status;
    const bool for_quota = !store.QuotaAllows(count, tenant);
    if (count <= store.MostBlocks(tenant)) {
      if (runtime_.memory_prefixes().Evict(tenant, for_quota)) continue;
      if (runtime_.options().spill) {
        const absl::StatusOr<bool> more = SpillColdest(user, for_quota);
        if (more.ok() && *more) continue;
        spilled = more.status();
      }
    }
    CountRefusal(user, for_quota);
    if (spilled.ok()) return status;
    return FullError(status.message(), "; nothing could be spilled: ", spilled.message());
  }
}

void Room::CountRefusal(const Sequence& user, bool for_quota) {
  Counters& counters = runtime_.counters();
  ++counters.full_refusals;
  if (for_quota) ++counters.quota_refusals;
  runtime_.store().CountRefusal(for_quota, user.tenant_slot());
}

absl::Status Room::Allocate(const Sequence& user, int64_t count, BlockId* out) {
  HostStore& store = runtime_.store();
  if (runtime_.options().admission == Admission::kReserved) {
    CountRefusal(user, false);
    return FullError(
        "the reservation is used up: need ", count, " blocks of ", store.block_bytes(),
        " bytes, 0 of those for ", user.reserve_tokens(), " tokens are left, limit ",
        user.reserve_tokens(),
        " tokens; reserve more (vattn_sequence_reserve) or create with admission overcommit");
  }
  return TakeOrMake(user, count, [&] { return store.Allocate(count, out, user.tenant_slot()); });
}

absl::Status Room::Reserve(const Sequence& user, int64_t count) {
  return TakeOrMake(user, count,
                    [&] { return runtime_.store().Reserve(count, user.tenant_slot()); });
}

absl::StatusOr<bool> Room::SpillColdest(const Sequence& user, bool for_quota) {
  const LogHold hold;  // until the coldest sequence may be used again
  Sequence* coldest = nullptr;
  std::unique_lock<std::mutex> use;
  const auto colder = [&](const Sequence& a, const Sequence& b) {  // a goes before b
    const bool a_own = a.tenant() == user.tenant(), b_own = b.tenant() == user.tenant();
    return a_own != b_own ? a_own : a.last_use() < b.last_use();
  };
  runtime_.sequences().ForEach([&](Sequence& sequence) {
    if (&sequence == &user || (for_quota && sequence.tenant() != user.tenant())) return;
    if (coldest != nullptr && colder(*coldest, sequence)) return;
    std::unique_lock<std::mutex> its_use(sequence.use(), std::try_to_lock);
    if (!its_use || sequence.seat.load() != nullptr || !sequence.HoldsBlocks()) return;
    if (sequence.reserve_tokens() > 0) return;
    coldest = &sequence;
    use = std::move(its_use);
  });
  if (coldest == nullptr) return false;
  const absl::Status status = coldest->Spill();
  if (!status.ok()) {
    ++runtime_.counters().spill_failures;
    runtime_.Log(LogLevel::kWarning, absl::StrCat("sequence ", coldest->id(),
                                                  " could not be spilled: ", status.message()));
    return status;
  }
  runtime_.Log(LogLevel::kInfo, absl::StrCat("sequence ", coldest->id(), " was spilled"));
  return true;
}

}  // namespace vattn
