// The system calls behind memory, as a table that tests replace to inject failures.
#ifndef VATTN_MEMORY_MEMORY_OPS_H_
#define VATTN_MEMORY_MEMORY_OPS_H_

#include <sys/types.h>

#include <cstddef>

namespace vattn {

// Each entry behaves as the call of its name: MAP_FAILED or -1, and errno, on failure.
struct MemoryOps {
  void* (*mmap)(void* at, size_t bytes, int protection, int flags, int fd, off_t offset);
  int (*munmap)(void* at, size_t bytes);
  int (*madvise)(void* at, size_t bytes, int advice);
};

extern const MemoryOps kSystemMemoryOps;

}  // namespace vattn

#endif  // VATTN_MEMORY_MEMORY_OPS_H_
