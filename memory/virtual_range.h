// An owned stretch of anonymous memory: address space now, pages as they are touched.
#ifndef VATTN_MEMORY_VIRTUAL_RANGE_H_
#define VATTN_MEMORY_VIRTUAL_RANGE_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory/memory_ops.h"

namespace vattn {

struct VirtualRangeOptions {
  // Ask for transparent huge pages. Advice: a kernel without them gives small pages. A touch then
  // takes a whole huge page, and the range starts on a huge-page boundary.
  bool huge_pages = false;
  // Keep the bytes out of core dumps.
  bool dont_dump = true;
  // Keep the pages out of forked children. Advice.
  bool dont_fork = false;
  const MemoryOps* ops = &kSystemMemoryOps;  // outlives the range
};

// Move-only. The memory reads as zero until written. Nothing is charged up front (MAP_NORESERVE),
// so a range may be larger than physical memory; touching more pages than the machine has then
// brings the system's out-of-memory killer, not an error, unless the host limits address space
// (vm.overcommit_memory = 2, RLIMIT_AS), which Reserve reports.
//
// Threads: data() and size() may be called from any.
class VirtualRange {
 public:
  // bytes > 0 is rounded up to whole pages.
  static absl::StatusOr<VirtualRange> Reserve(uint64_t bytes, const VirtualRangeOptions& options);

  // Holds nothing.
  VirtualRange() = default;
  VirtualRange(VirtualRange&& other) noexcept;
  VirtualRange& operator=(VirtualRange&& other) noexcept;
  ~VirtualRange();

  std::byte* data() const { return data_; }
  uint64_t size() const { return size_; }

 private:
  void Unmap();

  std::byte* data_ = nullptr;
  uint64_t size_ = 0;
  // What is mapped: more than the range where the system did not take the ends back.
  std::byte* mapped_ = nullptr;
  uint64_t mapped_size_ = 0;
  const MemoryOps* ops_ = &kSystemMemoryOps;
};

// Bytes of a page of the system.
uint64_t PageBytes();

}  // namespace vattn

#endif  // VATTN_MEMORY_VIRTUAL_RANGE_H_
