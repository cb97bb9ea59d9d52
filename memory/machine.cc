#include "memory/machine.h"

#include <linux/io_uring.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "memory/cgroup.h"

namespace vattn {
namespace {

// The first line of `path` that starts with `key`, without it and what separates it.
std::string FindLine(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, key.size(), key) != 0) continue;
    const size_t at = line.find_first_not_of(" \t:", key.size());
    return at == std::string::npos ? "" : line.substr(at);
  }
  return "";
}

// Bytes of a line of /proc/meminfo; 0 if it is not there.
uint64_t MemoryLine(const char* key) {
  const std::string value = FindLine("/proc/meminfo", key);
  return value.empty() ? 0 : std::strtoull(value.c_str(), nullptr, 10) * 1024;
}

int32_t CountNodes() {
  std::error_code error;
  int32_t nodes = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/sys/devices/system/node", error)) {
    const std::string name = entry.path().filename();
    nodes += name.size() > 4 && name.compare(0, 4, "node") == 0 && name[4] >= '0' && name[4] <= '9';
  }
  return nodes > 0 ? nodes : 1;
}

// The choice in brackets: "always [madvise] never".
std::string Bracketed(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  const size_t open = line.find('['), close = line.find(']');
  return open == std::string::npos || close == std::string::npos
             ? ""
             : line.substr(open + 1, close - open - 1);
}

bool TryIoUring() {
  io_uring_params params;
  std::memset(&params, 0, sizeof(params));
  const long fd = syscall(__NR_io_uring_setup, 1, &params);
  if (fd < 0) return false;
  close(static_cast<int>(fd));
  return true;
}

}  // namespace

MemoryLimits ReadMemoryLimits() {
  const CgroupLimits groups = ReadCgroupLimits();
  const auto known = [](uint64_t bytes) { return bytes == 0 ? UINT64_MAX : bytes; };
  MemoryLimits m;
  m.machine_bytes = MemoryLine("MemTotal");
  m.limit_bytes = std::min(known(m.machine_bytes), groups.memory_bytes);
  m.available_bytes = std::min(known(MemoryLine("MemAvailable")), groups.available_bytes);
  return m;
}

CpuCount CountCpus() {
  cpu_set_t set;
  const int32_t cpus = sched_getaffinity(0, sizeof(set), &set) == 0
                           ? CPU_COUNT(&set)
                           : static_cast<int32_t>(sysconf(_SC_NPROCESSORS_ONLN));
  const double quota = ReadCgroupLimits().cpus;
  if (quota <= 0 || quota >= cpus) return {cpus, cpus};
  return {cpus, std::max(1, static_cast<int32_t>(std::ceil(quota)))};
}

MachineFacts ReadMachine() {
  MachineFacts m;
  m.cpu = FindLine("/proc/cpuinfo", "model name");
  m.cpus = CountCpus();
  m.numa_nodes = CountNodes();
  m.memory = ReadMemoryLimits();
  m.huge_pages = Bracketed("/sys/kernel/mm/transparent_hugepage/enabled");
  rlimit limit;
  m.memlock_bytes = getrlimit(RLIMIT_MEMLOCK, &limit) != 0 ? 0
                    : limit.rlim_cur == RLIM_INFINITY      ? UINT64_MAX
                                                           : limit.rlim_cur;
  m.io_uring = TryIoUring();
  return m;
}

}  // namespace vattn
