#include "memory/host_store.h"

#include <hwloc.h>
#include <tbb/blocked_range.h>
#include <tbb/global_control.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cerrno>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <tuple>
#include <utility>

#include "memory/status.h"

namespace vattn {
namespace {

constexpr uint64_t kBlockAlignment = 64;

struct DestroyTopology {
  void operator()(hwloc_topology* topology) const { hwloc_topology_destroy(topology); }
};

// Asks for the node's memory, other nodes' when it is full: a strict binding would bring the
// out-of-memory killer while the machine still has memory.
absl::Status PreferNode(const VirtualRange& range, int numa_node) {
  hwloc_topology_t raw = nullptr;
  if (hwloc_topology_init(&raw) != 0) return InternalError("hwloc_topology_init failed");
  const std::unique_ptr<hwloc_topology, DestroyTopology> topology(raw);
  if (hwloc_topology_load(raw) != 0) {
    return NotSupportedError("numa_node is ", numa_node, ", but hwloc cannot read this machine");
  }
  const hwloc_obj_t node =
      numa_node < 0 ? nullptr
                    : hwloc_get_numanode_obj_by_os_index(raw, static_cast<unsigned>(numa_node));
  if (node == nullptr) {
    return InvalidArgumentError("numa_node is ", numa_node,
                                ", must be -1 or one of this machine's ",
                                hwloc_get_nbobjs_by_type(raw, HWLOC_OBJ_NUMANODE), " nodes");
  }
  if (hwloc_set_area_membind(raw, range.data(), range.size(), node->nodeset, HWLOC_MEMBIND_BIND,
                             HWLOC_MEMBIND_BYNODESET) != 0) {
    const int error = errno;
    return NotSupportedError("the system refused to place memory on numa_node ", numa_node, ": ",
                             std::strerror(error), "; -1 leaves the choice to the system");
  }
  return absl::OkStatus();
}

absl::Status TouchAll(const VirtualRange& range, int num_threads) {
  const uint64_t page = PageBytes();
  const uint64_t physical = static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * page;
  if (range.size() > physical) {
    return OutOfMemoryError("prefault of ", range.size(), " bytes: the machine has ", physical,
                            " bytes of memory; lower host_bytes");
  }
  // Several huge pages to a task: no two threads fault the same one.
  constexpr uint64_t kGrainBytes = uint64_t{16} << 20;
  // oneTBB prints a warning when it is asked for more threads than it gives.
  const size_t most = tbb::global_control::active_value(tbb::global_control::max_allowed_parallelism);
  tbb::task_arena arena(num_threads == 0 ? tbb::task_arena::automatic
                                         : std::min(num_threads, static_cast<int>(most)));
  arena.execute([&] {
    tbb::parallel_for(tbb::blocked_range<uint64_t>(0, range.size() / page, kGrainBytes / page),
                      [&](const tbb::blocked_range<uint64_t>& pages) {
                        for (uint64_t i = pages.begin(); i < pages.end(); ++i) {
                          *static_cast<volatile std::byte*>(range.data() + i * page) = std::byte{0};
                        }
                      });
  });
  return absl::OkStatus();
}

absl::Status CheckCount(int64_t count, int64_t num_blocks) {
  if (count >= 0) return absl::OkStatus();
  return OutOfRangeError("count of blocks", count, 0, num_blocks);
}

}  // namespace

absl::StatusOr<std::unique_ptr<HostStore>> HostStore::Create(const HostStoreOptions& options) {
  const uint64_t max_bytes = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  if (options.block_bytes == 0 || options.block_bytes > max_bytes - kBlockAlignment) {
    return OutOfRangeError("block_bytes", options.block_bytes, 1, max_bytes - kBlockAlignment);
  }
  const uint64_t block_bytes =
      (options.block_bytes + kBlockAlignment - 1) / kBlockAlignment * kBlockAlignment;
  if (options.limit_bytes < block_bytes || options.limit_bytes > max_bytes) {
    return OutOfRangeError("host_bytes", options.limit_bytes,
                           absl::StrCat(block_bytes, " (one block)"), max_bytes);
  }
  const uint64_t num_blocks = options.limit_bytes / block_bytes;
  constexpr uint64_t kMaxBlocks = std::numeric_limits<int32_t>::max();
  if (num_blocks > kMaxBlocks) {
    return InvalidArgumentError("host_bytes is ", options.limit_bytes, ", must be at most ",
                                kMaxBlocks * block_bytes, ": ", kMaxBlocks, " blocks of ",
                                block_bytes, " bytes");
  }
  if (options.numa_node < -1) {
    return InvalidArgumentError("numa_node is ", options.numa_node, ", must be at least -1");
  }
  if (options.num_threads < 0 || options.num_threads > 4096) {
    return OutOfRangeError("num_threads", options.num_threads, 0, 4096);
  }

  absl::StatusOr<VirtualRange> range =
      VirtualRange::Reserve(num_blocks * block_bytes,
                            {.huge_pages = options.huge_pages, .ops = options.memory_ops});
  VATTN_RETURN_IF_ERROR(range.status());
  absl::StatusOr<VirtualRange> references =
      VirtualRange::Reserve(num_blocks * sizeof(int32_t), {.ops = options.memory_ops});
  VATTN_RETURN_IF_ERROR(references.status());
  if (options.numa_node >= 0) VATTN_RETURN_IF_ERROR(PreferNode(*range, options.numa_node));
  if (options.prefault) VATTN_RETURN_IF_ERROR(TouchAll(*range, options.num_threads));
  return std::unique_ptr<HostStore>(new HostStore(*std::move(range), *std::move(references),
                                                  block_bytes, static_cast<int64_t>(num_blocks),
                                                  options.zero_on_free));
}

HostStore::HostStore(VirtualRange range, VirtualRange references, uint64_t block_bytes,
                     int64_t num_blocks, bool zero_on_free)
    : range_(std::move(range)),
      references_(std::move(references)),
      block_bytes_(block_bytes),
      num_blocks_(num_blocks),
      zero_on_free_(zero_on_free),
      used_(num_blocks) {}

HostStore::~HostStore() = default;

int32_t& HostStore::References(BlockId block) const {
  const int32_t index = static_cast<int32_t>(block);
  assert(index >= 0 && index < num_blocks_);
  return reinterpret_cast<int32_t*>(references_.data())[index];
}

int64_t HostStore::FreeLocked() const { return num_blocks_ - used_.num_taken() - num_reserved_; }

absl::Status HostStore::FullLocked(int64_t count) const {
  return FullError("the host pool is full: need ", count, " blocks of ", block_bytes_, " bytes, ",
                   FreeLocked(), " of ", num_blocks_, " are free (", used_.num_taken(), " used, ",
                   num_reserved_, " reserved), limit ", range_.size(),
                   " bytes; raise host_bytes or free sequences");
}

void HostStore::TakeLocked(int64_t count, BlockId* out) {
  used_.Take(count, [&](int64_t first, int64_t length) {
    for (int64_t i = first; i < first + length; ++i) {
      const BlockId block = static_cast<BlockId>(i);
      std::atomic_ref<int32_t>(References(block)).store(1, std::memory_order_relaxed);
      *out++ = block;
    }
  });
}

absl::Status HostStore::Allocate(int64_t count, BlockId* out) {
  VATTN_RETURN_IF_ERROR(CheckCount(count, num_blocks_));
  const std::lock_guard lock(mutex_);
  if (count > FreeLocked()) return FullLocked(count);
  TakeLocked(count, out);
  return absl::OkStatus();
}

void HostStore::AddReference(BlockId block) {
  // Relaxed: the caller's own reference orders this against the block's release.
  [[maybe_unused]] const int32_t before =
      std::atomic_ref<int32_t>(References(block)).fetch_add(1, std::memory_order_relaxed);
  assert(before >= 1);
}

bool HostStore::Drop(BlockId block) {
  // Release: what this holder did is visible to whoever sees the lower count (IsUnique) or gets the
  // block next. Acquire: with the last reference, what all others did.
  const int32_t before =
      std::atomic_ref<int32_t>(References(block)).fetch_sub(1, std::memory_order_acq_rel);
  assert(before >= 1);
  if (before != 1) return false;
  if (zero_on_free_) std::memset(data(block), 0, block_bytes_);
  return true;
}

void HostStore::Release(BlockId block) {
  if (!Drop(block)) return;
  const std::lock_guard lock(mutex_);
  used_.Give(static_cast<int64_t>(block));
}

void HostStore::ReleaseToReserve(BlockId block) {
  [[maybe_unused]] const bool last = Drop(block);
  assert(last);
  const std::lock_guard lock(mutex_);
  used_.Give(static_cast<int64_t>(block));
  ++num_reserved_;
}

bool HostStore::IsUnique(BlockId block) const {
  return std::atomic_ref<int32_t>(References(block)).load(std::memory_order_acquire) == 1;
}

absl::Status HostStore::Reserve(int64_t count) {
  VATTN_RETURN_IF_ERROR(CheckCount(count, num_blocks_));
  const std::lock_guard lock(mutex_);
  if (count > FreeLocked()) return FullLocked(count);
  num_reserved_ += count;
  return absl::OkStatus();
}

void HostStore::Unreserve(int64_t count) {
  const std::lock_guard lock(mutex_);
  assert(count >= 0 && count <= num_reserved_);
  num_reserved_ -= count;
}

absl::Status HostStore::AllocateReserved(int64_t count, BlockId* out) {
  VATTN_RETURN_IF_ERROR(CheckCount(count, num_blocks_));
  const std::lock_guard lock(mutex_);
  if (count > num_reserved_) {
    return InternalError("allocation of ", count, " reserved blocks, but only ", num_reserved_,
                         " are reserved");
  }
  num_reserved_ -= count;
  TakeLocked(count, out);
  return absl::OkStatus();
}

absl::Status HostStore::Trim() {
  const std::lock_guard lock(mutex_);
  for (auto [first, end] = used_.FreeRun(0, num_blocks_); first < end;
       std::tie(first, end) = used_.FreeRun(end, num_blocks_)) {
    VATTN_RETURN_IF_ERROR(range_.Release(static_cast<uint64_t>(first) * block_bytes_,
                                         static_cast<uint64_t>(end - first) * block_bytes_));
  }
  return absl::OkStatus();
}

bool HostStore::AllFree(int64_t first, int64_t end) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return !used_.AnyTaken(first, end);
}

int64_t HostStore::num_free() const {
  const std::lock_guard lock(mutex_);
  return FreeLocked();
}

int64_t HostStore::num_reserved() const {
  const std::lock_guard lock(mutex_);
  return num_reserved_;
}

int64_t HostStore::num_used() const {
  const std::lock_guard lock(mutex_);
  return used_.num_taken();
}

uint64_t HostStore::bytes_used() const {
  const std::lock_guard lock(mutex_);
  return static_cast<uint64_t>(used_.num_taken() + num_reserved_) * block_bytes_;
}

absl::Status HostStore::CheckInvariants() const {
  const std::lock_guard lock(mutex_);
  if (used_.CountTaken() != used_.num_taken()) {
    return InternalError("host store: ", used_.CountTaken(), " bits are set, counted as ",
                         used_.num_taken());
  }
  if (num_reserved_ < 0 || FreeLocked() < 0) {
    return InternalError("host store: ", num_reserved_, " reserved and ", used_.num_taken(),
                         " used of ", num_blocks_, " blocks");
  }
  for (int64_t i = 0; i < num_blocks_; ++i) {
    const int32_t references = std::atomic_ref<int32_t>(References(static_cast<BlockId>(i))).load();
    if (used_.IsTaken(i) ? references < 1 : references != 0) {
      return InternalError("host store: block ", i, " is ", used_.IsTaken(i) ? "used" : "free",
                           " with ", references, " references");
    }
  }
  return absl::OkStatus();
}

}  // namespace vattn
