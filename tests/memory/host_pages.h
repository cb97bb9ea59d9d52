// Pages of this process in the place of a device's: addresses without a page fault when they are
// touched, and a page is full of kUnset bytes when it is mapped.
#ifndef VATTN_TESTS_MEMORY_HOST_PAGES_H_
#define VATTN_TESTS_MEMORY_HOST_PAGES_H_

#include <atomic>
#include <cstdint>

#include "memory/page_ops.h"

namespace vattn::test {

constexpr uint64_t kHostPageBytes = 64 << 10;
constexpr uint8_t kUnset = 0x5a;

extern const PageOps kHostPageOps;

// Of all ranges together.
struct HostPages {
  std::atomic<int64_t> limit{INT64_MAX};      // pages that may live at a time
  std::atomic<int64_t> maps_left{INT64_MAX};  // calls of map that still succeed
  std::atomic<int64_t> live{0}, made{0}, mapped{0};
};
extern HostPages host_pages;

}  // namespace vattn::test

#endif  // VATTN_TESTS_MEMORY_HOST_PAGES_H_
