// Facts of the machine that decide how fast vattn can be and what may refuse to work.
#ifndef VATTN_MEMORY_MACHINE_H_
#define VATTN_MEMORY_MACHINE_H_

#include <cstdint>
#include <string>

namespace vattn {

// Memory that this process may take: of the machine, and of the control groups it is in.
struct MemoryLimits {
  uint64_t machine_bytes = 0;  // physical
  // That or the groups' limit, whichever is less; UINT64_MAX: not known
  uint64_t limit_bytes = 0;
  uint64_t available_bytes = 0;  // without swapping, now; UINT64_MAX: not known
  bool by_group() const { return limit_bytes < machine_bytes; }
  const char* WhoLimits() const {
    return by_group() ? "the control group allows" : "the machine has";
  }
};
MemoryLimits ReadMemoryLimits();

struct CpuCount {
  int32_t by_affinity;  // that this process may run on
  // The same, or as many as its control groups' CPU time keeps busy, rounded up
  int32_t by_quota;
};
CpuCount CountCpus();

struct MachineFacts {
  std::string cpu;  // model name, "" if the system does not say
  CpuCount cpus = {};
  int32_t numa_nodes = 0;
  MemoryLimits memory;
  std::string huge_pages;      // "always", "madvise", "never"; "" unknown
  uint64_t memlock_bytes = 0;  // RLIMIT_MEMLOCK; UINT64_MAX: no limit
  bool io_uring = false;       // the kernel lets this process set one up
};

MachineFacts ReadMachine();

}  // namespace vattn

#endif  // VATTN_MEMORY_MACHINE_H_
