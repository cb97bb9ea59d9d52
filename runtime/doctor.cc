#include "runtime/doctor.h"

#include <nlohmann/json.hpp>

#include "kernels/cpu/rows.h"
#include "memory/machine.h"

namespace vattn {

std::string DoctorJson() {
  const MachineFacts m = ReadMachine();
  nlohmann::ordered_json advice = nlohmann::ordered_json::array();
  if (m.huge_pages == "never") {
    advice.push_back("transparent huge pages are off: large pools cost more page faults; set "
                     "/sys/kernel/mm/transparent_hugepage/enabled to madvise");
  }
  if (!m.io_uring) advice.push_back("io_uring is not allowed here: file access falls back to pread and pwrite");
  const nlohmann::ordered_json report = {
      {"schema_version", 1},
      {"cpu",
       {{"model", m.cpu}, {"cpus", m.cpus}, {"simd", cpu::SimdTarget()}, {"numa_nodes", m.numa_nodes}}},
      {"memory",
       {{"total_bytes", m.memory_bytes},
        {"available_bytes", m.available_bytes},
        {"huge_pages", m.huge_pages},
        {"memlock_bytes", m.memlock_bytes == UINT64_MAX ? nlohmann::ordered_json("unlimited")
                                                        : nlohmann::ordered_json(m.memlock_bytes)}}},
      {"io_uring", m.io_uring},
      {"cuda", {{"built", false}}},
      {"advice", advice}};
  return report.dump(2);
}

}  // namespace vattn
