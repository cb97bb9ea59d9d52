// Physical pages of a device and the addresses at which they are mapped: the driver's calls, as a
// table that tests replace. The CUDA driver's are in page_ops_cuda.cc; a build without CUDA has
// page_ops_none.cc.
#ifndef VATTN_MEMORY_PAGE_OPS_H_
#define VATTN_MEMORY_PAGE_OPS_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace vattn {

struct PageOps {
  // Bytes of a page, a power of two. NOT_SUPPORTED where pages cannot be mapped one by one.
  absl::StatusOr<uint64_t> (*page_bytes)(int device);
  // Addresses without memory, whole pages.
  absl::StatusOr<std::byte*> (*reserve)(uint64_t bytes);
  void (*release)(std::byte* base, uint64_t bytes);
  // A page that is mapped nowhere and holds anything. OUT_OF_MEMORY.
  absl::StatusOr<uint64_t> (*create)(int device, uint64_t bytes);
  void (*destroy)(uint64_t page);
  absl::Status (*map)(int device, std::byte* at, uint64_t bytes, uint64_t page);
  // The device must have passed whatever uses the addresses.
  absl::Status (*unmap)(std::byte* at, uint64_t bytes);
};

extern const PageOps kDevicePageOps;

}  // namespace vattn

#endif  // VATTN_MEMORY_PAGE_OPS_H_
