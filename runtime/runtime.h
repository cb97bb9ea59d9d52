// What all sequences of a runtime share: options, host pool, workers, operations, counters.
#ifndef VATTN_RUNTIME_RUNTIME_H_
#define VATTN_RUNTIME_RUNTIME_H_

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cpu/workers.h"
#include "kernels/params.h"
#include "memory/host_store.h"
#include "memory/process.h"
#include "memory/transfer_queue.h"
#include "runtime/backend.h"
#include "runtime/index/profile.h"
#include "runtime/index/sign_maps.h"
#include "runtime/log.h"
#include "runtime/options.h"
#include "runtime/room.h"
#include "runtime/sequence_list.h"
#include "runtime/stats.h"

namespace vattn {

class CudaBackend;
class Disk;
class MemoryPrefixes;

// Thread-safe. Sequences and batches keep it alive.
class Runtime {
 public:
  // options need not be resolved. The system calls behind files and memory outlive the runtime.
  static absl::StatusOr<std::shared_ptr<Runtime>> Create(
      Options options, Logger logger, const FileOps& ops = kSystemFileOps,
      const MemoryOps& memory_ops = kSystemMemoryOps);

  ~Runtime();

  const Options& options() const { return options_; }
  const Storage& storage() const { return storage_; }
  const Promise& promise() const { return promise_; }
  // One thread is the calling one: there are no workers that calls of several threads would wait
  // for.
  cpu::Workers* workers() { return options_.num_threads == 1 ? nullptr : workers_.get(); }
  HostStore& store() { return *store_; }
  // How files are read and written.
  const IoOptions& io() const { return io_; }
  // Null without disk_path.
  Disk* disk() const { return disk_.get(); }
  MemoryPrefixes& memory_prefixes() { return *memory_prefixes_; }
  Backend& backend() const { return *backend_; }
  // The backend, if it is that of a CUDA device; else null.
  CudaBackend* cuda() const { return cuda_; }
  // Room in the host pool, also what has to be made.
  Room& room() { return room_; }
  // Sequences alive, for table_bytes and to be spilled.
  SequenceList& sequences() { return sequences_; }
  Counters& counters() { return counters_; }
  // Merges records of several ranks. Of params heads, records, ranks, out_dtype and the arrays of
  // answers are the caller's.
  absl::Status Merge(MergeParams params, DeviceStream stream) const;
  StatsSnapshot Stats() const;
  TenantSnapshot StatsOf(uint64_t tenant) const;
  // Of all tenants that are known, but 0.
  std::vector<TenantSnapshot> StatsOfTenants() const;
  // Through LogLine.
  void Log(LogLevel level, std::string message) const noexcept;
  // The process that made it. A child that is forked has a copy of the host pool, which it may use;
  // CUDA, and what is in disk_path, stay with the parent.
  const HomeProcess& home() const { return home_; }

  int kv_heads(int layer) const { return options_.layer_kv_heads[layer]; }  // 0: left out
  int group_heads(int layer) const { return options_.num_q_heads / kv_heads(layer); }

  // What the index of a sequence without queries is calibrated on: the profile, or nothing (empty).
  QueryMoment ProfileMoment(int layer, int kv_head) const;
  // Learned maps of the index, or none.
  SignMap LearnedMap(int layer, int kv_head) const;

  // A number for a sequence that came without one.
  uint64_t NextId() { return next_id_.fetch_add(1); }
  // Numbers that grow from one use of a sequence to the next.
  uint64_t NextUse() { return next_use_.fetch_add(1); }
  void CountBatches(int change) { batches_ += change; }

  // After Close only destruction is left to the handles.
  void Close();
  bool closed() const { return closed_.load(); }

 private:
  Runtime(Options options, Logger logger, LogLevel most_logged, std::optional<Profile> profile,
          std::optional<SignMaps> sign_maps, std::unique_ptr<cpu::Workers> workers,
          std::unique_ptr<HostStore> store, const FileOps& ops, const MemoryOps& memory_ops);

  // Steps of Create, in this order.
  void WarnOfLittleMemory() const;
  absl::Status OpenDisk();
  absl::Status MakeBackend();
  TenantSnapshot StatsOf(const TenantUse& use) const;

  const Options options_;
  const std::shared_ptr<const Logger> logger_;
  const LogLevel most_logged_;
  const HomeProcess home_;
  const std::optional<Profile> profile_;
  const std::optional<SignMaps> sign_maps_;
  Storage storage_;
  Promise promise_;
  float quantile_[kMaxLooks][kQuantileBins + 1];
  std::unique_ptr<HostStore> store_;
  std::unique_ptr<Backend> backend_;  // may have the pool mapped: goes before it
  CudaBackend* cuda_ = nullptr;       // the same, or null
  std::unique_ptr<MemoryPrefixes> memory_prefixes_;
  const IoOptions io_;
  std::unique_ptr<Disk> disk_;
  const std::unique_ptr<cpu::Workers> workers_;
  Counters counters_;
  std::atomic<uint64_t> next_id_{1};
  std::atomic<uint64_t> next_use_{1};
  std::atomic<int> batches_{0};
  std::atomic<bool> closed_{false};
  SequenceList sequences_{counters_.sequences};
  Room room_{*this};
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_RUNTIME_H_
