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
    advice.push_back(
        "transparent huge pages are off: large pools cost more page faults; set "
        "/sys/kernel/mm/transparent_hugepage/enabled to madvise");
  }
  if (!m.io_uring)
    advice.push_back("io_uring is not allowed here: file access falls back to pread and pwrite");
  if (m.memory.by_group()) {
    advice.push_back("control groups limit this process to " +
                     std::to_string(m.memory.limit_bytes) + " of the machine's " +
                     std::to_string(m.memory.machine_bytes) +
                     " bytes of memory: keep host_bytes well below");
  }
  if (m.cpus.by_quota < m.cpus.by_affinity) {
    advice.push_back("control groups give this process the time of " +
                     std::to_string(m.cpus.by_quota) + " of " + std::to_string(m.cpus.by_affinity) +
                     " CPUs: num_threads 0 takes as many");
  }
  nlohmann::ordered_json devices = nlohmann::ordered_json::array();
  for (const DeviceFacts& d : ListDevices()) {
    devices.push_back(
        {{"name", d.name},
         {"compute", std::to_string(d.compute_major) + "." + std::to_string(d.compute_minor)},
         {"multiprocessors", d.multiprocessors},
         {"memory_bytes", d.memory_bytes},
         {"l2_bytes", d.l2_bytes},
         {"driver_cuda", d.driver},
         {"runtime_cuda", d.runtime}});
    if (d.compute_major < 8)
      advice.push_back(d.name + " is older than the CUDA backend serves: 8.0 is the least");
  }
  if (!BuiltWithCuda())
    advice.push_back("this build has no CUDA backend: nvcc was not found when it was made");
  const auto known = [](uint64_t bytes) { return bytes == UINT64_MAX ? 0 : bytes; };
  const nlohmann::ordered_json report = {
      {"schema_version", 1},
      {"cpu",
       {{"model", m.cpu},
        {"cpus", m.cpus.by_quota},
        {"cpus_by_affinity", m.cpus.by_affinity},
        {"simd", cpu::SimdTarget()},
        {"numa_nodes", m.numa_nodes}}},
      {"memory",
       {{"total_bytes", known(m.memory.limit_bytes)},
        {"available_bytes", known(m.memory.available_bytes)},
        {"machine_bytes", m.memory.machine_bytes},
        {"huge_pages", m.huge_pages},
        {"memlock_bytes", m.memlock_bytes == UINT64_MAX
                              ? nlohmann::ordered_json("unlimited")
                              : nlohmann::ordered_json(m.memlock_bytes)}}},
      {"io_uring", m.io_uring},
      {"cuda", {{"built", BuiltWithCuda()}, {"devices", devices}}},
      {"advice", advice}};
  return report.dump(2);
}

}  // namespace vattn
