// What all sequences of a CUDA runtime share on the device: the mapped host pool, the codes beside
// it, the pages that growing arrays take, counters.
#ifndef VATTN_RUNTIME_CUDA_BACKEND_H_
#define VATTN_RUNTIME_CUDA_BACKEND_H_

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>

#include "absl/status/statusor.h"
#include "kernels/cuda/params.h"
#include "memory/device.h"
#include "memory/device_range.h"
#include "memory/host_store.h"
#include "runtime/backend.h"
#include "runtime/options.h"

namespace vattn {

// Thread-safe. Made before, destroyed before the pool that it maps.
class CudaBackend final : public Backend {
 public:
  // NOT_SUPPORTED without a device or for options that the CUDA backend does not serve,
  // OUT_OF_MEMORY if the pool cannot be pinned.
  // quantile [max_looks][kQuantileBins + 1] on the host.
  static absl::StatusOr<std::unique_ptr<CudaBackend>> Create(const Options& options,
                                                             const Storage& storage,
                                                             const Promise& promise,
                                                             HostStore& store);
  // The first option, if any, that keeps a runtime from CUDA, as NOT_SUPPORTED.
  static absl::Status CheckOptions(const Options& options);
  ~CudaBackend() override;

  Device& device() { return *device_; }
  const cuda::DeviceStorage& storage() const { return storage_; }
  const Promise& promise() const { return promise_; }
  cuda::DeviceCounters* counters() const { return counters_.as<cuda::DeviceCounters>(); }
  // Waits for the copy alone, not for running steps.
  absl::StatusOr<cuda::DeviceCounters> ReadCounters();

  int max_group_heads() const override { return cuda::kMaxDeviceGroup; }
  std::unique_ptr<SequenceHalf> MakeSequence(const Runtime& runtime) override;
  absl::StatusOr<std::unique_ptr<BatchHalf>> MakeBatch(Runtime& runtime, int slots) override;

  absl::StatusOr<std::unique_ptr<PagedHalf>> MakePaged(Runtime& runtime,
                                                       const PagedPool& pool) override;

  // Enqueues copies of the rows of tokens [begin, begin + tokens) to the device, [kv_heads][tokens] as
  // they lie there, with `stride` bytes between KV heads.
  using FetchRows = std::function<absl::Status(int64_t begin, int64_t tokens, std::byte* to,
                                               int64_t stride, DeviceStream stream)>;
  // Prefill of rows that come by `fetch`.
  absl::Status PrefillBy(const PrefillParams& params, const FetchRows& fetch);
  absl::Status CheckPrefill() const override;
  absl::Status Prefill(const PrefillParams& params, cpu::Workers* workers) override;
  bool IsOnDevice(const void* pointer) const override {
    return pointer != nullptr && device_->CanFollow(pointer);
  }
  absl::Status Write(const WriteParams& params, cpu::Workers* workers) override;
  absl::Status OnHost(const void* base, const std::vector<int64_t>& offsets, int64_t bytes,
                      std::vector<const std::byte*>& parts, std::vector<std::byte>& copy) override;

  absl::Status Merge(const MergeParams& params, DeviceStream stream) override;

  bool copies_codes() const override { return true; }
  // Device memory for the codes of blocks that a sequence has come to hold, before the device is
  // told of them. Memory of blocks that nobody holds any more is taken first.
  absl::Status HoldCodes(const BlockId* blocks, int64_t count) override;
  // The same for what a batch has of blocks.
  absl::Status Hold(DeviceRange& range, const int32_t* blocks, int64_t count,
                    DeviceRange::Stretches* fresh);
  // Once in a while codes of blocks that are free lose their memory.
  void CountReleased(int64_t count) override;
  // Counts those times.
  uint64_t reclaims() const { return reclaims_.load(); }
  // True if nobody holds blocks [first, end): the device has then passed all steps that read them.
  bool AllFree(int64_t first, int64_t end) const { return store_.AllFree(first, end); }
  DevicePages& pages() { return *pages_; }

  // From 1 on.
  uint64_t NextBatch() { return next_batch_.fetch_add(1); }

  int64_t num_blocks() const { return num_blocks_; }
  // Counts how often a block got new content: its rows in a hot set of before are another's.
  uint32_t generation(int32_t block) const {
    return generations_[block].load(std::memory_order_relaxed);
  }
  void BumpGeneration(int32_t block) override {
    generations_[block].fetch_add(1, std::memory_order_relaxed);
  }
  // Steps are counted on the device; a lost one leaves these at 0.
  void AddTo(StatsSnapshot& stats) override;

 private:
  explicit CudaBackend(HostStore& store) : store_(store) {}
  // Rows that the device can follow.
  absl::Status WriteOnDevice(const WriteParams& params);
  // Makes lists_ so large at least.
  absl::Status GrowLists(uint64_t bytes);
  // `bytes` from memory that the device can follow to the host. Blocks until done.
  absl::Status Read(void* to, const void* from, uint64_t bytes);
  absl::Status HoldLocked(DeviceRange& range, const int32_t* blocks, int64_t count,
                          DeviceRange::Stretches* fresh);
  void ReclaimLocked(int64_t keep);
  // Enqueues the chunks of a prompt, of so many tokens, through buffers [2] of rows.
  absl::Status AttendChunks(const PrefillParams& params, cuda::PrefillChunk chunk,
                            int64_t chunk_tokens, std::byte* const* rows, const FetchRows& fetch);
  // Gives back what prefills keep, unless one is at work. False: there is nothing.
  bool DropPrefillMemory();

  HostStore& store_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<DevicePages> pages_;
  std::unique_ptr<DeviceRange> codes_;
  std::mutex codes_mutex_;  // pages of codes_ come, are filled and go one after the other
  std::atomic<uint64_t> next_batch_{1};
  std::atomic<uint64_t> reclaims_{0};
  std::atomic<int64_t> released_{0};  // since codes were last reclaimed
  cuda::DeviceStorage storage_;
  Promise promise_;
  int64_t num_blocks_ = 0;
  DeviceMemory counters_, quantile_;
  std::mutex prefill_mutex_;     // of one prefill at a time
  DeviceMemory prefill_memory_;  // of the largest one so far
  std::mutex lists_mutex_;       // of one user at a time
  DeviceMemory lists_;           // block ids of rows that are written, parts of queries
  std::unique_ptr<std::atomic<uint32_t>[]> generations_;
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_CUDA_BACKEND_H_
