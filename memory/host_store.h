// The host pool: equal blocks of bytes, reference counted, in one stretch of memory.
#ifndef VATTN_MEMORY_HOST_STORE_H_
#define VATTN_MEMORY_HOST_STORE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory/block_bitmap.h"
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

// A block is free, reserved (promised to a holder, not yet a certain block) or used (one reference
// or more). A new block holds whatever its last user left, unless zero_on_free.
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
  // that beside the reserved ones. Ids ascend, by one wherever a free run is long enough; the lowest
  // that do.
  absl::Status Allocate(int64_t count, BlockId* out /* [count] */);

  // The caller holds a reference already.
  void AddReference(BlockId block);
  // Drops a reference of the caller's; with the last one the block is free. Its pages stay with the
  // process until Trim.
  void Release(BlockId block);
  // Drops the only reference to a block, which joins the caller's reservation.
  void ReleaseToReserve(BlockId block);
  // True if the caller's reference is the only one. Then everything that former holders did to the
  // block happened before, and the caller may write.
  bool IsUnique(BlockId block) const;

  // True if no block of [first, end) is used.
  bool AllFree(int64_t first, int64_t end) const;

  // Sets `count` free blocks aside for AllocateReserved, all or none (FULL).
  absl::Status Reserve(int64_t count);
  // Returns `count` blocks of the caller's reservation unused.
  void Unreserve(int64_t count);
  // As Allocate, out of the caller's reservation: cannot be FULL. INTERNAL if more than everything
  // reserved is asked for.
  absl::Status AllocateReserved(int64_t count, BlockId* out /* [count] */);

  // Gives the whole pages of free blocks back to the system. Not while the memory is registered
  // with a device. Holds the lock meanwhile: milliseconds per GiB given back.
  absl::Status Trim();

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
  HostStore(VirtualRange range, VirtualRange references, uint64_t block_bytes, int64_t num_blocks,
            bool zero_on_free);

  uint64_t Offset(BlockId block) const {
    return static_cast<uint64_t>(static_cast<int32_t>(block)) * block_bytes_;
  }
  int32_t& References(BlockId block) const;
  // Drops a reference; true if it was the last one, and then the block is ready to be free.
  bool Drop(BlockId block);
  // Callers of the Locked functions hold mutex_.
  int64_t FreeLocked() const;
  absl::Status FullLocked(int64_t count) const;
  void TakeLocked(int64_t count, BlockId* out);

  VirtualRange range_;
  // int32_t [num_blocks], 0 for a block that is not used; only through std::atomic_ref. A range, so
  // that counts of blocks never used cost no memory.
  const VirtualRange references_;
  const uint64_t block_bytes_;
  const int64_t num_blocks_;
  const bool zero_on_free_;

  // Guards what follows. Not absl::Mutex: distributions build that without ThreadSanitizer, which
  // then takes everything under it for a race.
  mutable std::mutex mutex_;
  BlockBitmap used_;
  int64_t num_reserved_ = 0;
};

}  // namespace vattn

#endif  // VATTN_MEMORY_HOST_STORE_H_
