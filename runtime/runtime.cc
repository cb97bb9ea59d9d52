#include "runtime/runtime.h"

#include "memory/status.h"
#include "runtime/quantiles.h"
#include "runtime/sequence.h"

namespace vattn {

absl::StatusOr<std::shared_ptr<Runtime>> Runtime::Create(Options options, Logger logger) {
  VATTN_RETURN_IF_ERROR(ResolveOptions(options));
  if (options.backend == 2) return NotSupportedError("backend is cuda, and this build has no CUDA backend");
  const Storage storage = MakeStorage(options);
  HostStoreOptions pool;
  pool.limit_bytes = options.host_bytes;
  pool.block_bytes = static_cast<uint64_t>(storage.block.bytes);
  pool.numa_node = options.numa_node;
  pool.huge_pages = options.huge_pages == 1;
  pool.prefault = options.prefault == 1;
  pool.num_threads = options.num_threads;
  absl::StatusOr<std::unique_ptr<HostStore>> store = HostStore::Create(pool);
  if (!store.ok()) return store.status();
  return std::shared_ptr<Runtime>(new Runtime(std::move(options), std::move(logger), *std::move(store)));
}

Runtime::Runtime(Options options, Logger logger, std::unique_ptr<HostStore> store)
    : options_(std::move(options)),
      logger_(std::move(logger)),
      storage_(MakeStorage(options_)),
      promise_(MakePromise(options_)),
      store_(std::move(store)),
      workers_(options_.num_threads) {
  FillQuantiles(promise_.bound, promise_.delta, promise_.max_looks, quantile_);
  promise_.quantile = quantile_;
  promise_.normal_quantile = static_cast<float>(TwoSidedNormalQuantile(promise_.delta));
  storage_.base = store_->base();
  storage_.block.bytes = static_cast<int64_t>(store_->block_bytes());
}

StatsSnapshot Runtime::Stats() const {
  StatsSnapshot s = Snapshot(counters_);
  s.host_bytes_limit = static_cast<uint64_t>(store_->num_blocks()) * store_->block_bytes();
  s.host_bytes_used = store_->bytes_used();
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const Sequence* sequence : sequences_) s.table_bytes += static_cast<uint64_t>(sequence->table_bytes());
  return s;
}

void Runtime::Log(LogLevel level, const std::string& message) const {
  if (logger_) logger_(level, message);
}

void Runtime::Enlist(const Sequence* sequence) {
  const std::lock_guard<std::mutex> lock(mutex_);
  sequences_.insert(sequence);
  counters_.sequences = sequences_.size();
}

void Runtime::Delist(const Sequence* sequence) {
  const std::lock_guard<std::mutex> lock(mutex_);
  sequences_.erase(sequence);
  counters_.sequences = sequences_.size();
}

absl::Status Runtime::Refused(absl::Status status) {
  if (CodeOf(status) == Code::kFull) ++counters_.full_refusals;
  return status;
}

void Runtime::Close() {
  closed_ = true;
  size_t left;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    left = sequences_.size();
  }
  const int batches = batches_.load();
  if (left == 0 && batches == 0) return;
  Log(LogLevel::kError, absl::StrCat("runtime destroyed while ", left, " of its sequences and ", batches,
                                     " of its batches are alive"));
}

}  // namespace vattn
