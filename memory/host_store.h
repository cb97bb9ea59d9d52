// The host pool: equal blocks of bytes, reference counted, in one stretch of memory.
#ifndef VATTN_MEMORY_HOST_STORE_H_
#define VATTN_MEMORY_HOST_STORE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory/block_bitmap.h"
#include "memory/tenant_ledger.h"
#include "memory/virtual_range.h"

namespace vattn {

// Index of a block from base(), in units of block_bytes().
enum class BlockId : int32_t { kNone = -1 };

struct HostStoreOptions {
  // The pool is the whole blocks that fit. May exceed physical memory (see VirtualRange).
  uint64_t limit_bytes = 0;
  // 1 or more, rounded up to a multiple of 64. Blocks start on multiples of it from a page
  // boundary: a multiple of 4096 gives page-aligned blocks.
  uint64_t block_bytes = 0;
  // What a tenant may hold and have reserved unless SetTenantLimit gave it a limit; 0: no limit.
  uint64_t tenant_bytes = 0;
  // Preferred NUMA node by its system number; -1: the node of the thread that touches a page first.
  int numa_node = -1;
  bool huge_pages = true;
  // Touch all memory in Create, on num_threads threads (0: one per core), so that no later step
  // pays for page faults. Without it a page becomes real when a block in it is first written.
  bool prefault = false;
  // Fill a block with zeros before it is free.
  bool zero_on_free = false;
  int num_threads = 0;
  const MemoryOps* memory_ops = &kSystemMemoryOps;
};

class HostStore;

// A tenant of a store, as long as it lives; the store outlives it.
class OpenTenant {
 public:
  OpenTenant() = default;
  OpenTenant(HostStore& store, uint64_t tenant);
  OpenTenant(OpenTenant&& other) noexcept;
  OpenTenant& operator=(OpenTenant&& other) noexcept;
  ~OpenTenant();

  TenantSlot slot() const { return slot_; }
  uint64_t number() const { return number_; }

 private:
  HostStore* store_ = nullptr;  // null: tenant 0
  TenantSlot slot_ = TenantSlot::kNone;
  uint64_t number_ = 0;
};

// A block is free, reserved (promised to a holder, not yet a certain block) or used (one reference
// or more). A new block holds whatever its last user left, unless zero_on_free.
//
// A used block counts once, for the tenant that took it, until the last reference is dropped,
// whoever shares it.
//
// Thread-safe. Who may touch the bytes is up to the callers: a shared block is read only; the
// holder for whom IsUnique is true may write.
class HostStore {
 public:
  static absl::StatusOr<std::unique_ptr<HostStore>> Create(const HostStoreOptions& options);
  ~HostStore();

  HostStore(const HostStore&) = delete;
  HostStore& operator=(const HostStore&) = delete;

  // Hands out `count` free blocks, each with one reference, or none: FULL if there are fewer than
  // that beside the reserved ones, or the tenant would pass its limit. Ids ascend, by one wherever
  // a free run is long enough; the lowest that do.
  absl::Status Allocate(int64_t count, BlockId* out /* [count] */,
                        TenantSlot tenant = TenantSlot::kNone);

  // The caller holds a reference already.
  void AddReference(BlockId block);
  // Drops a reference of the caller's; with the last one the block is free. Its pages stay with the
  // process until Trim.
  void Release(BlockId block);
  // Drops the only reference to a block, which joins the reservation of the tenant that took it.
  void ReleaseToReserve(BlockId block);
  // True if the caller's reference is the only one. Then everything that former holders did to the
  // block happened before, and the caller may write.
  bool IsUnique(BlockId block) const;
  // False if every block that is used has one reference: then IsUnique is true for all of the caller's.
  bool AnyShared() const { return extra_references_.load(std::memory_order_acquire) > 0; }
  // Who took a block that the caller holds.
  TenantSlot TenantOf(BlockId block) const { return State(block).tenant; }
  // References to a block that the caller holds, of which others may go at any time.
  int64_t NumReferences(BlockId block) const;

  // True if no block of [first, end) is used.
  bool AllFree(int64_t first, int64_t end) const;

  // Sets `count` free blocks aside for AllocateReserved, all or none (FULL).
  absl::Status Reserve(int64_t count, TenantSlot tenant = TenantSlot::kNone);
  // Returns `count` blocks of the caller's reservation unused.
  void Unreserve(int64_t count, TenantSlot tenant = TenantSlot::kNone);
  // As Allocate, out of the caller's reservation: cannot be FULL. INTERNAL if more than everything
  // that the tenant has reserved is asked for.
  absl::Status AllocateReserved(int64_t count, BlockId* out /* [count] */,
                                TenantSlot tenant = TenantSlot::kNone);

  // True if `count` more blocks stay under the tenant's limit.
  bool QuotaAllows(int64_t count, TenantSlot tenant) const;
  // Blocks that a tenant may have in an empty pool.
  int64_t MostBlocks(TenantSlot tenant) const;
  // Counts a request of the tenant that found no room.
  void CountRefusal(bool for_quota, TenantSlot tenant);
  // Limits one tenant to `bytes`; 0: the tenant_bytes of the options hold for it again.
  void SetTenantLimit(uint64_t tenant, uint64_t bytes);
  TenantUse UseOf(uint64_t tenant) const;
  std::vector<TenantUse> UseOfAll() const;

  std::byte* data(BlockId block) { return base() + Offset(block); }
  const std::byte* data(BlockId block) const { return base() + Offset(block); }
  std::byte* base() const { return range_.data(); }

  uint64_t block_bytes() const { return block_bytes_; }
  int64_t num_blocks() const { return num_blocks_; }
  // num_free + num_reserved + num_used == num_blocks at any moment.
  int64_t num_free() const;
  int64_t num_reserved() const;
  int64_t num_used() const;
  // Of used and reserved blocks.
  uint64_t bytes_used() const;

  // INTERNAL with the first contradiction found. Call while no other thread is inside.
  absl::Status CheckInvariants() const;

 private:
  HostStore(VirtualRange range, VirtualRange states, uint64_t block_bytes, int64_t num_blocks,
            int64_t tenant_blocks, bool zero_on_free);
  friend class OpenTenant;

  struct BlockState {
    int32_t references;  // 0 for a block that is not used; only through std::atomic_ref
    TenantSlot tenant;   // that took it, while it is used
  };

  uint64_t Offset(BlockId block) const {
    return static_cast<uint64_t>(static_cast<int32_t>(block)) * block_bytes_;
  }
  BlockState& State(BlockId block) const;
  // Drops a reference; true if it was the last one, and then the block is ready to be free.
  bool Drop(BlockId block);
  // Callers of the Locked functions hold mutex_.
  int64_t FreeLocked() const;
  // FULL unless `count` blocks are free for the tenant.
  absl::Status CheckRoomLocked(int64_t count, TenantSlot tenant) const;
  void TakeLocked(int64_t count, BlockId* out, TenantSlot tenant);

  VirtualRange range_;
  // BlockState [num_blocks]. A range, so that states of blocks never used cost no memory.
  const VirtualRange states_;
  const uint64_t block_bytes_;
  const int64_t num_blocks_;
  const bool zero_on_free_;

  // Guards what follows. Not absl::Mutex: distributions build that without ThreadSanitizer, which
  // then takes everything under it for a race.
  std::atomic<int64_t> extra_references_ = 0;  // to used blocks, beyond one for each
  mutable std::mutex mutex_;
  BlockBitmap used_;
  TenantLedger tenants_;
  int64_t num_reserved_ = 0;
};

}  // namespace vattn

#endif  // VATTN_MEMORY_HOST_STORE_H_
