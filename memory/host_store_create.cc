// The memory of a host pool: options checked, mapped, placed on a NUMA node, touched.
#include <hwloc.h>
#include <tbb/blocked_range.h>
#include <tbb/global_control.h>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#include "memory/host_store.h"
#include "memory/machine.h"
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
  // Past this the system ends a process instead of refusing.
  const MemoryLimits memory = ReadMemoryLimits();
  if (range.size() > std::min(memory.limit_bytes, memory.available_bytes)) {
    return OutOfMemoryError("prefault of ", range.size(), " bytes: ", memory.available_bytes,
                            " are available of the ", memory.limit_bytes, " bytes of memory that ",
                            memory.WhoLimits(), "; lower host_bytes");
  }
  // Several huge pages to a task: no two threads fault the same one.
  constexpr uint64_t kGrainBytes = uint64_t{16} << 20;
  // oneTBB prints a warning when it is asked for more threads than it gives.
  const size_t most =
      tbb::global_control::active_value(tbb::global_control::max_allowed_parallelism);
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

  absl::StatusOr<VirtualRange> range = VirtualRange::Reserve(
      num_blocks * block_bytes, {.huge_pages = options.huge_pages, .ops = options.memory_ops});
  VATTN_RETURN_IF_ERROR(range.status());
  absl::StatusOr<VirtualRange> states =
      VirtualRange::Reserve(num_blocks * sizeof(BlockState), {.ops = options.memory_ops});
  VATTN_RETURN_IF_ERROR(states.status());
  if (options.numa_node >= 0) VATTN_RETURN_IF_ERROR(PreferNode(*range, options.numa_node));
  if (options.prefault) VATTN_RETURN_IF_ERROR(TouchAll(*range, options.num_threads));
  const int64_t tenant_blocks = options.tenant_bytes == 0
                                    ? kNoTenantLimit
                                    : static_cast<int64_t>(options.tenant_bytes / block_bytes);
  return std::unique_ptr<HostStore>(new HostStore(*std::move(range), *std::move(states),
                                                  block_bytes, static_cast<int64_t>(num_blocks),
                                                  tenant_blocks, options.zero_on_free));
}

}  // namespace vattn
