#include "tests/memory/host_pages.h"

#include <sys/mman.h>

#include <cstring>

#include "memory/status.h"

namespace vattn::test {
namespace {

std::byte* Map(std::byte* at, uint64_t bytes, int protection) {
  const int fixed = at == nullptr ? 0 : MAP_FIXED;
  void* const mapped = mmap(at, bytes, protection,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed, /*fd=*/-1, 0);
  return mapped == MAP_FAILED ? nullptr : static_cast<std::byte*>(mapped);
}

absl::StatusOr<std::byte*> Reserve(uint64_t bytes) {
  std::byte* const base = Map(nullptr, bytes, PROT_NONE);
  if (base == nullptr) return OutOfMemoryError("no ", bytes, " bytes of addresses are left");
  return base;
}

absl::StatusOr<uint64_t> Create(int, uint64_t bytes) {
  if (++host_pages.live > host_pages.limit) {
    --host_pages.live;
    return OutOfMemoryError("no ", bytes, " bytes are left");
  }
  return static_cast<uint64_t>(++host_pages.made);
}

absl::Status MapPage(int, std::byte* at, uint64_t bytes, uint64_t) {
  if (--host_pages.maps_left < 0) return DeviceError("no page is mapped any more");
  if (Map(at, bytes, PROT_READ | PROT_WRITE) == nullptr) return DeviceError("mmap failed");
  std::memset(at, kUnset, bytes);
  ++host_pages.mapped;
  return absl::OkStatus();
}

absl::Status Unmap(std::byte* at, uint64_t bytes) {
  if (Map(at, bytes, PROT_NONE) == nullptr) return DeviceError("mmap failed");
  --host_pages.mapped;
  return absl::OkStatus();
}

}  // namespace

HostPages host_pages;

constinit const PageOps kHostPageOps = {
    .page_bytes = [](int) -> absl::StatusOr<uint64_t> { return kHostPageBytes; },
    .reserve = Reserve,
    .release = [](std::byte* base, uint64_t bytes) { munmap(base, bytes); },
    .create = Create,
    .destroy = [](uint64_t) { --host_pages.live; },
    .map = MapPage,
    .unmap = Unmap,
};

}  // namespace vattn::test
