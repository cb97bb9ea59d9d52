#include "runtime/runtime.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "memory/machine.h"
#include "memory/save_target.h"
#include "memory/status.h"
#include "runtime/cpu/backend.h"
#include "runtime/cuda/backend.h"
#include "runtime/files/disk.h"
#include "runtime/files/sequence_file.h"
#include "runtime/prefix/memory.h"
#include "runtime/quantiles.h"
#include "runtime/sequence.h"

namespace vattn {
namespace {

// VATTN_BACKEND, "cpu" or "cuda", decides in place of "auto", which is CUDA where it can serve. A
// word that it does not know is refused, also where the options decide: whoever set it meant
// something.
absl::StatusOr<BackendKind> ChooseBackend(const Options& options) {
  const char* const given = std::getenv("VATTN_BACKEND");
  const std::string chosen = given == nullptr || *given == '\0' ? "auto" : given;
  if (chosen != "auto" && chosen != "cpu" && chosen != "cuda") {
    return InvalidArgumentError("VATTN_BACKEND in the environment is \"", chosen.substr(0, 40),
                                "\", must be auto, cpu or cuda");
  }
  if (options.backend != BackendKind::kAuto) return options.backend;
  if (chosen != "auto") return chosen == "cpu" ? BackendKind::kCpu : BackendKind::kCuda;
  const bool can = CudaBackend::CheckOptions(options).ok() &&
                   options.device < static_cast<int32_t>(ListDevices().size());
  return can ? BackendKind::kCuda : BackendKind::kCpu;
}

absl::Status CheckRing(const FileOps& ops) {
  Ring* ring = nullptr;
  if (ops.ring_open(1, &ring) != 0) {
    return NotSupportedError("io_engine is uring, which is not to be had here: ",
                             std::strerror(errno));
  }
  ops.ring_close(ring);
  return absl::OkStatus();
}

// What follows from the machine: the backend, threads, absolute paths.
absl::Status SettleOnMachine(Options& options, const FileOps& ops) {
  if (options.io_engine == IoEngine::kUring) VATTN_RETURN_IF_ERROR(CheckRing(ops));
  const absl::StatusOr<BackendKind> backend = ChooseBackend(options);
  if (!backend.ok()) return backend.status();
  options.backend = *backend;
  // A quota of CPU time, which threads beyond it would only use up together, is less than affinity
  // says.
  const CpuCount cpus = CountCpus();
  if (options.num_threads == 0 && cpus.by_quota < cpus.by_affinity)
    options.num_threads = cpus.by_quota;
  if (options.disk_path.empty()) return absl::OkStatus();
  // Options in force mean the same after a change of directory.
  absl::StatusOr<std::string> absolute = AbsolutePath(options.disk_path);
  if (!absolute.ok()) return absolute.status();
  options.disk_path = *std::move(absolute);
  return absl::OkStatus();
}

// Reads a file that the options name, unless the name is empty.
template <class File>
absl::Status ReadNamed(const std::string& path, const Options& options, std::optional<File>& file) {
  if (path.empty()) return absl::OkStatus();
  absl::StatusOr<File> read = File::Read(path, options);
  if (!read.ok()) return read.status();
  file = *std::move(read);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<HostStore>> MakePool(const Options& options,
                                                    const MemoryOps& memory_ops) {
  HostStoreOptions pool;
  pool.limit_bytes = options.host_bytes;
  pool.block_bytes = static_cast<uint64_t>(MakeStorage(options).block.bytes);
  pool.tenant_bytes = options.tenant_bytes;
  pool.numa_node = options.numa_node;
  pool.huge_pages = options.huge_pages;
  pool.prefault = options.prefault;
  pool.zero_on_free = options.zero_on_free;
  pool.num_threads = options.num_threads;
  pool.memory_ops = &memory_ops;
  return HostStore::Create(pool);
}

}  // namespace

absl::StatusOr<std::shared_ptr<Runtime>> Runtime::Create(Options options, Logger logger,
                                                         const FileOps& ops,
                                                         const MemoryOps& memory_ops) {
  VATTN_RETURN_IF_ERROR(ResolveOptions(options));
  LogLevel most_logged;
  VATTN_RETURN_IF_ERROR(ReadLogLevel(&most_logged));
  VATTN_RETURN_IF_ERROR(SettleOnMachine(options, ops));
  std::optional<Profile> profile;
  std::optional<SignMaps> sign_maps;
  VATTN_RETURN_IF_ERROR(ReadNamed(options.profile, options, profile));
  VATTN_RETURN_IF_ERROR(ReadNamed(options.sign_maps, options, sign_maps));
  auto workers = std::make_unique<cpu::Workers>(options.num_threads);
  if (options.num_threads != 1 && !workers->Start()) {
    return OutOfMemoryError("num_threads is ", options.num_threads,
                            ", and the system would not start ", workers->num_threads(),
                            " threads (see RLIMIT_NPROC and the cgroup's pids.max)");
  }
  absl::StatusOr<std::unique_ptr<HostStore>> store = MakePool(options, memory_ops);
  if (!store.ok()) return store.status();
  std::shared_ptr<Runtime> runtime(
      new Runtime(std::move(options), std::move(logger), most_logged, std::move(profile),
                  std::move(sign_maps), std::move(workers), *std::move(store), ops, memory_ops));
  runtime->WarnOfLittleMemory();
  VATTN_RETURN_IF_ERROR(runtime->OpenDisk());
  VATTN_RETURN_IF_ERROR(runtime->MakeBackend());
  return runtime;
}

void Runtime::WarnOfLittleMemory() const {
  const MemoryLimits memory = ReadMemoryLimits();
  if (options_.host_bytes <= memory.limit_bytes) return;
  Log(LogLevel::kWarning, absl::StrCat("host_bytes is ", options_.host_bytes, ", over the ",
                                       memory.limit_bytes, " bytes that ", memory.WhoLimits(),
                                       ": a pool that fills up would end the process"));
}

absl::Status Runtime::OpenDisk() {
  if (options_.disk_path.empty()) return absl::OkStatus();
  absl::StatusOr<std::unique_ptr<Disk>> disk =
      Disk::Open(options_.disk_path, options_.disk_bytes, LayoutOf(options_, storage_), io_,
                 counters_, [this](LogLevel level, const std::string& text) { Log(level, text); });
  if (!disk.ok()) return disk.status();
  disk_ = *std::move(disk);
  return absl::OkStatus();
}

absl::Status Runtime::MakeBackend() {
  if (options_.backend != BackendKind::kCuda) {
    backend_ = std::make_unique<CpuBackend>();
    return absl::OkStatus();
  }
  absl::StatusOr<std::unique_ptr<CudaBackend>> cuda =
      CudaBackend::Create(options_, storage_, promise_, *store_);
  if (!cuda.ok()) return cuda.status();
  cuda_ = cuda->get();
  backend_ = *std::move(cuda);
  return absl::OkStatus();
}

Runtime::Runtime(Options options, Logger logger, LogLevel most_logged,
                 std::optional<Profile> profile, std::optional<SignMaps> sign_maps,
                 std::unique_ptr<cpu::Workers> workers, std::unique_ptr<HostStore> store,
                 const FileOps& ops, const MemoryOps& memory_ops)
    : options_(std::move(options)),
      logger_(std::make_shared<const Logger>(std::move(logger))),
      most_logged_(most_logged),
      profile_(std::move(profile)),
      sign_maps_(std::move(sign_maps)),
      storage_(MakeStorage(options_)),
      promise_(MakePromise(options_)),
      store_(std::move(store)),
      io_{.ops = &ops,
          .memory_ops = &memory_ops,
          .uring = options_.io_engine != IoEngine::kPread,
          .direct = !options_.io_buffered,
          .depth = static_cast<uint32_t>(options_.io_depth),
          .block_bytes = static_cast<uint32_t>(options_.io_block_bytes),
          .timeout_ms = options_.io_timeout_ms},
      workers_(std::move(workers)) {
  memory_prefixes_ = std::make_unique<MemoryPrefixes>(*store_, counters_);
  FillQuantiles(promise_.bound, promise_.delta, promise_.max_looks, promise_.pilot, quantile_);
  promise_.quantile = quantile_;
  promise_.normal_quantile = static_cast<float>(TwoSidedNormalQuantile(promise_.delta));
  storage_.base = store_->base();
  storage_.block.bytes = static_cast<int64_t>(store_->block_bytes());
}

Runtime::~Runtime() = default;

QueryMoment Runtime::ProfileMoment(int layer, int kv_head) const {
  return profile_ ? profile_->Moment(layer, kv_head) : QueryMoment(options_.head_dim_k);
}

SignMap Runtime::LearnedMap(int layer, int kv_head) const {
  return sign_maps_ ? sign_maps_->Map(layer, kv_head) : SignMap{};
}

absl::Status Runtime::Merge(MergeParams params, DeviceStream stream) const {
  params.promise = promise_;
  params.dim_v = storage_.row.dim_v;
  params.stride = params.heads * PartialFloats(params.dim_v);
  return backend_->Merge(params, stream);
}

StatsSnapshot Runtime::Stats() const {
  StatsSnapshot s = Snapshot(counters_);
  backend_->AddTo(s);
  s.host_bytes_limit = static_cast<uint64_t>(store_->num_blocks()) * store_->block_bytes();
  s.host_bytes_used = store_->bytes_used();
  s.host_bytes_reserved = static_cast<uint64_t>(store_->num_reserved()) * store_->block_bytes();
  s.memory_prefixes = static_cast<uint64_t>(memory_prefixes_->size());
  s.table_bytes = memory_prefixes_->table_bytes();
  s.disk_bytes_used = disk_ ? disk_->bytes() : 0;
  sequences_.ForEach([&](const Sequence& sequence) {
    s.table_bytes += static_cast<uint64_t>(sequence.table_bytes());
  });
  return s;
}

TenantSnapshot Runtime::StatsOf(const TenantUse& use) const {
  const uint64_t bytes = store_->block_bytes();
  TenantSnapshot s = {.tenant = use.tenant,
                      .host_bytes_limit = use.limit == kNoTenantLimit
                                              ? 0
                                              : static_cast<uint64_t>(use.limit) * bytes,
                      .host_bytes_used = static_cast<uint64_t>(use.used + use.reserved) * bytes,
                      .host_bytes_reserved = static_cast<uint64_t>(use.reserved) * bytes,
                      .full_refusals = use.full_refusals,
                      .quota_refusals = use.quota_refusals};
  sequences_.ForEach(
      [&](const Sequence& sequence) { s.sequences += sequence.tenant() == use.tenant; });
  return s;
}

TenantSnapshot Runtime::StatsOf(uint64_t tenant) const { return StatsOf(store_->UseOf(tenant)); }

std::vector<TenantSnapshot> Runtime::StatsOfTenants() const {
  std::vector<TenantSnapshot> all;
  for (const TenantUse& use : store_->UseOfAll()) {
    if (use.tenant != 0) all.push_back(StatsOf(use));
  }
  return all;
}

void Runtime::Log(LogLevel level, std::string message) const noexcept {
  if (level <= most_logged_) LogLine(logger_, level, std::move(message));
}

void Runtime::Close() {
  closed_ = true;
  const size_t left = sequences_.size();
  const int batches = batches_.load();
  if (left == 0 && batches == 0) return;
  Log(LogLevel::kError, absl::StrCat("runtime destroyed while ", left, " of its sequences and ",
                                     batches, " of its batches and paged pools are alive"));
}

}  // namespace vattn
