// Room in the host pool for a sequence: what is free, or what is made free for it.
//
// When the pool lacks blocks, prefixes in memory are evicted first. Then, with option spill,
// sequences that nobody uses go to the disk: the tenant's own first, those unused for longest
// first; one with a reservation stays, since its room is promised. For a tenant at its quota
// nothing of another's is touched. A sequence that still finds no room is refused with FULL, which
// is counted.
#ifndef VATTN_RUNTIME_ROOM_H_
#define VATTN_RUNTIME_ROOM_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "memory/host_store.h"
#include "runtime/sequence_list.h"

namespace vattn {

class Runtime;

// Thread-safe.
class Room {
 public:
  explicit Room(Runtime& runtime) : runtime_(runtime) {}

  // `count` blocks, or that many set aside, all or none, for `user` and charged to its tenant.
  absl::Status Allocate(const Sequence& user, int64_t count, BlockId* out);
  absl::Status Reserve(const Sequence& user, int64_t count);

 private:
  template <class Take>
  absl::Status TakeOrMake(const Sequence& user, int64_t count, const Take& take);
  // True if it gave blocks back to the pool, or may have.
  absl::StatusOr<bool> SpillColdest(const Sequence& user, bool for_quota);
  void CountRefusal(const Sequence& user, bool for_quota);

  Runtime& runtime_;
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_ROOM_H_
