#include "memory/memory_ops.h"

#include <sys/mman.h>

namespace vattn {

constinit const MemoryOps kSystemMemoryOps = {
    .mmap = ::mmap, .munmap = ::munmap, .madvise = ::madvise};

}  // namespace vattn
