#include "memory/virtual_range.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/string_view.h"
#include "memory/status.h"

namespace vattn {
namespace {

// What x86-64 and most arm64 kernels use; elsewhere it is just an alignment.
constexpr uint64_t kHugePageBytes = uint64_t{2} << 20;

absl::Status MapError(absl::string_view call, uint64_t bytes) {
  const int error = errno;
  return OutOfMemoryError("the system refused to map ", bytes, " bytes: ", call, ": ",
                          std::strerror(error),
                          " (see RLIMIT_AS, vm.overcommit_memory and vm.max_map_count)");
}

}  // namespace

uint64_t PageBytes() {
  static const uint64_t bytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

absl::StatusOr<VirtualRange> VirtualRange::Reserve(uint64_t bytes,
                                                   const VirtualRangeOptions& options) {
  const uint64_t page = PageBytes();
  const uint64_t slack = options.huge_pages ? kHugePageBytes : 0;
  const uint64_t limit = std::numeric_limits<uint64_t>::max() / 2;
  if (bytes == 0 || bytes > limit) return OutOfRangeError("bytes to map", bytes, 1, limit);
  const uint64_t size = (bytes + page - 1) / page * page;

  const MemoryOps& ops = *options.ops;
  void* mapped = ops.mmap(nullptr, size + slack, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return MapError("mmap", size + slack);
  VirtualRange range;
  range.ops_ = &ops;
  range.data_ = range.mapped_ = static_cast<std::byte*>(mapped);
  range.size_ = size;
  range.mapped_size_ = size + slack;
  if (slack != 0) {
    // Cut the ends off, so that what stays starts on a huge page.
    const uint64_t misfit = reinterpret_cast<uintptr_t>(mapped) % kHugePageBytes;
    const uint64_t head = misfit == 0 ? 0 : kHugePageBytes - misfit;
    range.data_ += head;
    if (slack != head && ops.munmap(range.data_ + size, slack - head) == 0) {
      range.mapped_size_ -= slack - head;
    }
    if (head != 0 && ops.munmap(range.mapped_, head) == 0) {
      range.mapped_ += head;
      range.mapped_size_ -= head;
    }
  }

  if (options.dont_dump && ops.madvise(range.data_, size, MADV_DONTDUMP) != 0) {
    return MapError("madvise(MADV_DONTDUMP)", size);
  }
  // A kernel built without transparent huge pages refuses; small pages serve as well.
  if (options.huge_pages) (void)ops.madvise(range.data_, size, MADV_HUGEPAGE);
  if (options.dont_fork) (void)ops.madvise(range.data_, size, MADV_DONTFORK);
  return range;
}

VirtualRange::VirtualRange(VirtualRange&& other) noexcept { *this = std::move(other); }

VirtualRange& VirtualRange::operator=(VirtualRange&& other) noexcept {
  if (this != &other) {
    Unmap();
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
    mapped_ = std::exchange(other.mapped_, nullptr);
    mapped_size_ = std::exchange(other.mapped_size_, 0);
    ops_ = other.ops_;
  }
  return *this;
}

VirtualRange::~VirtualRange() { Unmap(); }

void VirtualRange::Unmap() {
  if (mapped_ != nullptr) ops_->munmap(mapped_, mapped_size_);
}

}  // namespace vattn
