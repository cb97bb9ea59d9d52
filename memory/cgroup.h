// Limits that a container or a service sets by control groups, of version 1 and 2.
#ifndef VATTN_MEMORY_CGROUP_H_
#define VATTN_MEMORY_CGROUP_H_

#include <cstdint>
#include <string>

namespace vattn {

struct CgroupLimits {
  // The least limit of the group and those above it; UINT64_MAX: none
  uint64_t memory_bytes = UINT64_MAX;
  uint64_t available_bytes = UINT64_MAX;  // the least of limit - use + page cache over them, now
  double cpus = 0;                        // CPU time a second, the least quota over them; 0: none
};

// Of this process. proc: its directory in /proc; root: what paths in its mountinfo lie under. Both
// are for tests. What cannot be read counts as no limit.
CgroupLimits ReadCgroupLimits(const std::string& proc = "/proc/self", const std::string& root = "");

}  // namespace vattn

#endif  // VATTN_MEMORY_CGROUP_H_
