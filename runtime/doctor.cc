#include "runtime/doctor.h"

#include <nlohmann/json.hpp>

#include "kernels/cpu/rows.h"
#include "memory/device.h"
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
  nlohmann::ordered_json devices = nlohmann::ordered_json::array();
  for (const DeviceFacts& d : ListDevices()) {
    devices.push_back({{"name", d.name},
                       {"compute", std::to_string(d.compute_major) + "." + std::to_string(d.compute_minor)},
                       {"multiprocessors", d.multiprocessors},
                       {"memory_bytes", d.memory_bytes},
                       {"l2_bytes", d.l2_bytes},
                       {"driver_cuda", d.driver},
                       {"runtime_cuda", d.runtime}});
    if (d.compute_major < 8) advice.push_back(d.name + " is older than the CUDA backend serves: 8.0 is the least");
  }
  if (!BuiltWithCuda()) advice.push_back("this build has no CUDA backend: nvcc was not found when it was made");
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
      {"cuda", {{"built", BuiltWithCuda()}, {"devices", devices}}},
      {"advice", advice}};
  return report.dump(2);
}

}  // namespace vattn
