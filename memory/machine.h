// Facts of the machine that decide how fast vattn can be and what may refuse to work.
#ifndef VATTN_MEMORY_MACHINE_H_
#define VATTN_MEMORY_MACHINE_H_

#include <cstdint>
#include <string>

namespace vattn {

struct MachineFacts {
  std::string cpu;                 // model name, "" if the system does not say
  int32_t cpus = 0;                // that this process may use
  int32_t numa_nodes = 0;
  uint64_t memory_bytes = 0;       // physical
  uint64_t available_bytes = 0;    // without swapping, now
  std::string huge_pages;          // "always", "madvise", "never"; "" unknown
  uint64_t memlock_bytes = 0;      // RLIMIT_MEMLOCK; UINT64_MAX: no limit
  bool io_uring = false;           // the kernel lets this process set one up
};

MachineFacts ReadMachine();

}  // namespace vattn

#endif  // VATTN_MEMORY_MACHINE_H_
