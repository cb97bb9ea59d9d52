#include "runtime/cuda/backend.h"

#include <cstring>

#include "kernels/cpu/merge.h"
#include "kernels/cpu/write.h"
#include "kernels/cuda/launch.h"
#include "memory/status.h"
#include "runtime/cuda/batch.h"
#include "runtime/cuda/paged.h"
#include "runtime/cuda/sequence_half.h"

namespace vattn {
namespace {

// So many pages of freed codes stay mapped, and so many bytes of unmapped pages stay ours: using
// them again needs no call of the driver.
constexpr int64_t kIdlePages = 16;
constexpr uint64_t kSpareBytes = uint64_t{64} << 20;

}  // namespace

absl::Status CudaBackend::CheckOptions(const Options& o) {
  const IndexKind index = o.index;
  if (index == IndexKind::kPage || index == IndexKind::kPooled || index == IndexKind::kClusters) {
    return NotSupportedError("index is ", static_cast<int32_t>(index),
                             ", the CUDA backend has balanced (0), exact (1), sign (2), hadamard2 "
                             "(3) and external (7)");
  }
  for (const int32_t heads : o.layer_kv_heads) {
    if (heads > 0 && o.num_q_heads / heads > cuda::kMaxDeviceGroup) {
      return NotSupportedError("num_q_heads is ", o.num_q_heads, " over ", heads,
                               " KV heads, the CUDA backend has ", cuda::kMaxDeviceGroup,
                               " query heads per KV head at most");
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<CudaBackend>> CudaBackend::Create(const Options& options,
                                                                 const Storage& storage,
                                                                 const Promise& promise,
                                                                 HostStore& store) {
  VATTN_RETURN_IF_ERROR(CheckOptions(options));
  absl::StatusOr<std::unique_ptr<Device>> device = Device::Open(options.device);
  if (!device.ok()) return device.status();
  std::unique_ptr<CudaBackend> backend(new CudaBackend(store));
  backend->device_ = *std::move(device);
  Device& d = *backend->device_;
  backend->num_blocks_ = store.num_blocks();
  backend->generations_ =
      std::make_unique<std::atomic<uint32_t>[]>(static_cast<size_t>(store.num_blocks()));

  cuda::DeviceStorage& s = backend->storage_;
  s.host = storage;
  s.code_block_bytes = int64_t{kBlockTokens} * (storage.code.bytes() + storage.value_code_bytes);
  s.sinks = options.sinks;
  s.ring_tokens = (options.window + kCodeTokens + kCodeTokens - 1) / kCodeTokens * kCodeTokens;
  s.tiles_in_flight = cuda::TilesInFlight(storage);
  absl::StatusOr<std::byte*> base =
      d.Register(store.base(), static_cast<uint64_t>(store.num_blocks()) * store.block_bytes(),
                 store.block_bytes());
  if (!base.ok()) return base.status();
  s.host.base = *base;
  absl::StatusOr<std::unique_ptr<DevicePages>> pages =
      DevicePages::Create(d.ordinal(), kSpareBytes);
  if (!pages.ok()) return pages.status();
  backend->pages_ = *std::move(pages);
  absl::StatusOr<std::unique_ptr<DeviceRange>> codes = DeviceRange::Reserve(
      *backend->pages_, store.num_blocks(), static_cast<uint64_t>(s.code_block_bytes));
  if (!codes.ok()) return codes.status();
  backend->codes_ = *std::move(codes);
  s.codes = backend->codes_->data();

  constexpr uint64_t kRow = (kQuantileBins + 1) * sizeof(float);
  absl::StatusOr<DeviceMemory> quantile =
      d.Allocate(kRow * static_cast<uint64_t>(promise.max_looks));
  if (!quantile.ok()) return quantile.status();
  backend->quantile_ = *std::move(quantile);
  VATTN_RETURN_IF_ERROR(d.Copy(backend->quantile_.data(), promise.quantile,
                               kRow * static_cast<uint64_t>(promise.max_looks), d.stream()));
  backend->promise_ = promise;
  backend->promise_.quantile = backend->quantile_.as<const float[kQuantileBins + 1]>();

  absl::StatusOr<DeviceMemory> counters = d.Allocate(sizeof(cuda::DeviceCounters));
  if (!counters.ok()) return counters.status();
  backend->counters_ = *std::move(counters);
  VATTN_RETURN_IF_ERROR(
      d.Fill(backend->counters_.data(), 0, sizeof(cuda::DeviceCounters), d.stream()));
  VATTN_RETURN_IF_ERROR(d.Synchronize(d.stream()));
  return backend;
}

CudaBackend::~CudaBackend() {
  // No page goes while a kernel may still write codes.
  if (device_ != nullptr && device_->Activate().ok()) device_->SynchronizeAll().IgnoreError();
}

absl::Status CudaBackend::Hold(DeviceRange& range, const int32_t* blocks, int64_t count,
                               DeviceRange::Stretches* fresh) {
  const std::lock_guard<std::mutex> lock(codes_mutex_);
  return HoldLocked(range, blocks, count, fresh);
}

absl::Status CudaBackend::HoldLocked(DeviceRange& range, const int32_t* blocks, int64_t count,
                                     DeviceRange::Stretches* fresh) {
  absl::Status status = range.Commit(blocks, count, fresh);
  if (CodeOf(status) != Code::kOutOfMemory) return status;
  ReclaimLocked(0);
  status = range.Commit(blocks, count, fresh);
  if (CodeOf(status) == Code::kOutOfMemory && DropPrefillMemory())
    status = range.Commit(blocks, count, fresh);
  if (CodeOf(status) != Code::kOutOfMemory) return status;
  return OutOfMemoryError(
      status.message(), ", which ", count, " blocks of ", kBlockTokens,
      " tokens of a KV head need; fewer tokens, or smaller index_bytes, value_bits or hot_share "
      "need less");
}

absl::Status CudaBackend::HoldCodes(const BlockId* blocks, int64_t count) {
  static_assert(sizeof(BlockId) == sizeof(int32_t));
  // Locked to its end: a page ahead of these blocks may be taken by others, or taken away, as soon
  // as it is there.
  const std::lock_guard<std::mutex> lock(codes_mutex_);
  DeviceRange::Stretches fresh;
  VATTN_RETURN_IF_ERROR(
      HoldLocked(*codes_, reinterpret_cast<const int32_t*>(blocks), count, &fresh));
  if (fresh.empty()) return absl::OkStatus();
  // The scan reads whole tiles, those of sinks and window too, which have no codes, before it drops
  // their scores.
  VATTN_RETURN_IF_ERROR(device_->Activate());
  for (const auto& [begin, end] : fresh) {
    VATTN_RETURN_IF_ERROR(device_->Fill(codes_->data() + begin, 0, end - begin, device_->stream()));
  }
  return device_->Synchronize(device_->stream());
}

void CudaBackend::ReclaimLocked(int64_t keep) {
  codes_->Reclaim(keep, [this](int64_t first, int64_t end) { return AllFree(first, end); });
}

void CudaBackend::CountReleased(int64_t count) {
  const int64_t bytes = (released_ += count) * storage_.code_block_bytes;
  if (bytes <= kIdlePages * static_cast<int64_t>(pages_->page_bytes())) return;
  released_ = 0;
  const std::lock_guard<std::mutex> lock(codes_mutex_);
  ReclaimLocked(kIdlePages);
  ++reclaims_;
}

std::unique_ptr<SequenceHalf> CudaBackend::MakeSequence(const Runtime&) {
  return std::make_unique<CudaSequenceHalf>(*this);
}

absl::StatusOr<std::unique_ptr<BatchHalf>> CudaBackend::MakeBatch(Runtime& runtime, int slots) {
  return CudaBatch::Create(runtime, slots);
}

absl::StatusOr<std::unique_ptr<PagedHalf>> CudaBackend::MakePaged(Runtime& runtime,
                                                                  const PagedPool& pool) {
  return CudaPaged::Create(runtime, pool);
}

absl::Status CudaBackend::Write(const WriteParams& params, cpu::Workers* workers) {
  if (IsOnDevice(params.k)) return WriteOnDevice(params);
  cpu::Write(params, workers);
  return absl::OkStatus();
}

absl::Status CudaBackend::GrowLists(uint64_t bytes) {
  if (bytes <= lists_.size()) return absl::OkStatus();
  absl::StatusOr<DeviceMemory> memory = device_->Allocate(2 * bytes);
  if (!memory.ok()) return memory.status();
  lists_ = *std::move(memory);
  return absl::OkStatus();
}

absl::Status CudaBackend::WriteOnDevice(const WriteParams& params) {
  VATTN_RETURN_IF_ERROR(device_->Activate());
  // The blocks that rows go to, behind pointers to those of each KV head.
  const int64_t begin = params.first / kBlockTokens,
                blocks = BlocksFor(params.first + params.count) - begin;
  const int64_t pointers = params.kv_heads * int64_t{sizeof(int32_t*)},
                list = blocks * int64_t{sizeof(int32_t)};
  const std::lock_guard<std::mutex> lock(lists_mutex_);
  std::vector<std::byte> lists(static_cast<size_t>(pointers + params.kv_heads * list));
  VATTN_RETURN_IF_ERROR(GrowLists(lists.size()));
  for (int32_t h = 0; h < params.kv_heads; ++h) {
    const int64_t at = pointers + h * list;
    const std::byte* const there = lists_.data() + at;
    std::memcpy(lists.data() + h * sizeof(there), &there, sizeof(there));
    std::memcpy(lists.data() + at, params.blocks[h] + begin, static_cast<size_t>(list));
  }
  VATTN_RETURN_IF_ERROR(
      device_->Copy(lists_.data(), lists.data(), lists.size(), device_->stream()));
  WriteParams there = params;
  there.storage = storage_.host;
  there.first -= begin * kBlockTokens;
  there.blocks = lists_.as<const int32_t* const>();
  VATTN_RETURN_IF_ERROR(device_->Check(cuda::Write(there, {device_->stream()}), "writing rows"));
  return device_->Synchronize(device_->stream());
}

absl::Status CudaBackend::Merge(const MergeParams& params, DeviceStream stream) {
  if (!IsOnDevice(params.records)) {
    cpu::Merge(params);
    return absl::OkStatus();
  }
  VATTN_RETURN_IF_ERROR(device_->Activate());
  MergeParams there = params;
  there.promise = promise_;
  const DeviceStream used = stream != nullptr ? stream : device_->stream();
  VATTN_RETURN_IF_ERROR(device_->Check(cuda::Merge(there, {used}), "merging records"));
  return stream != nullptr ? absl::OkStatus() : device_->Synchronize(used);
}

absl::Status CudaBackend::Read(void* to, const void* from, uint64_t bytes) {
  VATTN_RETURN_IF_ERROR(device_->Activate());
  VATTN_RETURN_IF_ERROR(device_->Copy(to, from, bytes, device_->stream()));
  return device_->Synchronize(device_->stream());
}

absl::Status CudaBackend::OnHost(const void* base, const std::vector<int64_t>& offsets,
                                 int64_t bytes, std::vector<const std::byte*>& parts,
                                 std::vector<std::byte>& copy) {
  const std::byte* from = static_cast<const std::byte*>(base);
  const int64_t count = static_cast<int64_t>(offsets.size());
  const bool gathered = IsOnDevice(base);
  if (gathered) {
    VATTN_RETURN_IF_ERROR(device_->Activate());
    const uint64_t all = static_cast<uint64_t>(count * bytes),
                   list = offsets.size() * sizeof(int64_t);
    copy.resize(static_cast<size_t>(all));
    const std::lock_guard<std::mutex> lock(lists_mutex_);
    VATTN_RETURN_IF_ERROR(GrowLists(list + all));
    const DeviceStream stream = device_->stream();
    VATTN_RETURN_IF_ERROR(device_->Copy(lists_.data(), offsets.data(), list, stream));
    VATTN_RETURN_IF_ERROR(device_->Check(cuda::Gather(from, lists_.as<const int64_t>(), count,
                                                      bytes, lists_.data() + list, {stream}),
                                         "gathering queries"));
    VATTN_RETURN_IF_ERROR(Read(copy.data(), lists_.data() + list, all));
    from = copy.data();
  }
  parts.clear();
  for (int64_t i = 0; i < count; ++i) parts.push_back(from + (gathered ? i * bytes : offsets[i]));
  return absl::OkStatus();
}

void CudaBackend::AddTo(StatsSnapshot& s) {
  const absl::StatusOr<cuda::DeviceCounters> read = ReadCounters();
  const cuda::DeviceCounters c = read.ok() ? *read : cuda::DeviceCounters{};
  s.heads_exact = c.verdicts[0], s.heads_verified = c.verdicts[1];
  s.heads_dense = c.verdicts[2], s.heads_best_effort = c.verdicts[3];
  s.rows_middle = c.middle, s.rows_selected = c.selected, s.rows_fetched = c.fetched;
  s.bytes_fetched = c.fetched * static_cast<uint64_t>(storage_.host.row.row_bytes);
  s.looks = c.looks;
  s.outliers = c.outliers, s.heads_noisy = c.noisy;
  s.requests_refused = c.refused;
  const PageCounts pages = pages_->counts();
  s.device_bytes_reserved = pages.reserved_bytes,
  s.device_bytes_mapped = pages.mapped_bytes + pages.spare_bytes;
  s.device_growths = pages.growths, s.device_growth_ns = pages.growth_ns;
}

absl::StatusOr<cuda::DeviceCounters> CudaBackend::ReadCounters() {
  cuda::DeviceCounters counters{};
  VATTN_RETURN_IF_ERROR(Read(&counters, counters_.data(), sizeof(counters)));
  return counters;
}

}  // namespace vattn
