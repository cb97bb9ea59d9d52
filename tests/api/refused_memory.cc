#include "tests/api/refused_memory.h"

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace vattn::test {

MemoryFaults memory_faults;

namespace {

bool Refused() {
  MemoryFaults& faults = memory_faults;
  if (!faults.armed) return false;
  const int64_t number = ++faults.calls;
  if (number < faults.fail_at || (number > faults.fail_at && !faults.for_ever)) return false;
  ++faults.failed;
  return true;
}

void* AllocateOrThrow(size_t bytes, size_t alignment) {
  void* memory = nullptr;
  if (Refused() || posix_memalign(&memory, std::max(alignment, sizeof(void*)), bytes) != 0) {
    throw std::bad_alloc();
  }
  return memory;
}

}  // namespace
}  // namespace vattn::test

void* operator new(size_t bytes) {
  return vattn::test::AllocateOrThrow(bytes, alignof(std::max_align_t));
}
void* operator new(size_t bytes, std::align_val_t alignment) {
  return vattn::test::AllocateOrThrow(bytes, static_cast<size_t>(alignment));
}
void* operator new[](size_t bytes) { return operator new(bytes); }
void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  try {
    return operator new(bytes);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
