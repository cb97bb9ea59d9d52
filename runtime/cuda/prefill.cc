// Prompts on the device: their rows are copied from the host pool chunk by chunk, and a chunk is
// attended while the next one is on its way.
#include <algorithm>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "kernels/cuda/launch.h"
#include "memory/status.h"
#include "runtime/cuda/backend.h"

namespace vattn {
namespace {

constexpr int kBuffers = 2;  // of rows
// A chunk has about so many bytes of rows. Longer ones save the reading and writing of sums between
// them; a prompt is still cut into kLeastChunks, because nothing is attended before the first is there.
constexpr int64_t kChunkBytes = int64_t{32} << 20, kLeastChunkTokens = 1024, kLeastChunks = 4;
constexpr int64_t kMostPitch = (int64_t{1} << 31) - 1;  // of Device::CopyPieces
constexpr uintptr_t kOutAlignment = 8;                  // outputs are written in pairs of elements

int64_t RoundUp(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

int64_t ChunkTokens(int64_t all, int64_t token_bytes) {
  const int64_t most = std::max(kChunkBytes / token_bytes, kLeastChunkTokens),
                fair = std::max(all / kLeastChunks, kLeastChunkTokens);
  return RoundUp(std::min({most, fair, all}), kBlockTokens);
}

// Arrays of one prefill, one behind the other in device memory.
class Arrays {
 public:
  // Sets aside so many bytes, for `at` to point to; none for 0 bytes.
  template <class T>
  void Plan(int64_t bytes, T** at) {
    places_.push_back({reinterpret_cast<void**>(at), bytes == 0 ? -1 : bytes_});
    bytes_ += RoundUp(bytes, 256);
  }
  uint64_t bytes() const { return static_cast<uint64_t>(bytes_); }
  // Sets all pointers; memory of bytes() bytes.
  void Place(std::byte* memory) const {
    for (const Item& item : places_) *item.at = item.offset < 0 ? nullptr : memory + item.offset;
  }

 private:
  struct Item {
    void** at;
    int64_t offset;
  };
  std::vector<Item> places_;
  int64_t bytes_ = 0;
};

// Rows of blocks [begin, end) of a list of ids, to `to`: in one copy wherever ids are evenly spaced.
absl::Status CopyBlocks(Device& device, const Storage& s, const int32_t* ids, int64_t begin,
                        int64_t end, std::byte* to, DeviceStream stream) {
  const int64_t bytes = kBlockTokens * int64_t{s.row.row_bytes};
  for (int64_t b = begin; b < end;) {
    int64_t count = 1;
    const int64_t step = b + 1 < end ? int64_t{ids[b + 1]} - ids[b] : 0;
    if (step > 0 && step * s.block.bytes <= kMostPitch) {
      while (b + count < end && ids[b + count] == ids[b] + count * step) ++count;
    }
    VATTN_RETURN_IF_ERROR(
        device.CopyPieces(to + (b - begin) * bytes, s.base + ids[b] * s.block.bytes,
                          static_cast<uint64_t>(count > 1 ? step * s.block.bytes : 0),
                          static_cast<uint64_t>(bytes), count, stream));
    b += count;
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CudaBackend::CheckPrefill() const {
  const RowLayout& row = storage_.host.row;
  if (row.dtype == DType::kF32) {
    return NotSupportedError(
        "vattn_prefill on CUDA needs a dtype of f16 or bf16, the runtime's is f32");
  }
  const int most = std::max(row.dim_k, row.dim_v);
  if (most <= cuda::kMaxPrefillDim) return absl::OkStatus();
  return NotSupportedError("vattn_prefill on CUDA needs head dimensions of at most ",
                           cuda::kMaxPrefillDim, ", the runtime's are ", row.dim_k, " and ",
                           row.dim_v);
}

absl::Status CudaBackend::AttendChunks(const PrefillParams& p, cuda::PrefillChunk c,
                                       int64_t chunk_tokens, std::byte* const* rows,
                                       const FetchRows& fetch) {
  const int64_t all = p.first + p.count;
  const DeviceStream stream = device_->stream(), copies = device_->copy_stream();
  DeviceEvent filled[kBuffers], read[kBuffers];
  int turn = 0;
  for (c.begin = 0; c.begin < all; c.begin += chunk_tokens, turn = (turn + 1) % kBuffers) {
    c.tokens = std::min(chunk_tokens, all - c.begin);
    c.last = c.begin + c.tokens == all;
    c.rows = rows[turn];
    VATTN_RETURN_IF_ERROR(device_->Follow(copies, read[turn]));
    VATTN_RETURN_IF_ERROR(fetch(c.begin, c.tokens, rows[turn], c.rows_stride, copies));
    VATTN_RETURN_IF_ERROR(device_->Record(filled[turn], copies));
    VATTN_RETURN_IF_ERROR(device_->Follow(stream, filled[turn]));
    VATTN_RETURN_IF_ERROR(device_->Check(cuda::Prefill(c, {stream}), "attending a prompt"));
    VATTN_RETURN_IF_ERROR(device_->Record(read[turn], stream));
  }
  return absl::OkStatus();
}

absl::Status CudaBackend::Prefill(const PrefillParams& p, cpu::Workers*) {
  return PrefillBy(
      p,
      [&](int64_t begin, int64_t tokens, std::byte* to, int64_t stride,
          DeviceStream copies) -> absl::Status {
        for (int32_t h = 0; h < p.kv_heads; ++h) {
          VATTN_RETURN_IF_ERROR(CopyBlocks(*device_, p.storage, p.blocks[h], begin / kBlockTokens,
                                           BlocksFor(begin + tokens), to + h * stride, copies));
        }
        return absl::OkStatus();
      });
}

absl::Status CudaBackend::PrefillBy(const PrefillParams& p, const FetchRows& fetch) {
  VATTN_RETURN_IF_ERROR(device_->Activate());
  const RowLayout& row = p.storage.row;
  const int64_t all = p.first + p.count, heads = p.count * p.q_heads,
                element = ElementBytes(row.dtype),
                out_bytes = heads * row.dim_v * ElementBytes(static_cast<DType>(p.out_dtype)),
                q_bytes = ((p.count - 1) * p.q_token_stride + (p.q_heads - 1) * p.q_head_stride +
                           row.dim_k) *
                          element;
  const int64_t chunk = ChunkTokens(all, int64_t{p.kv_heads} * row.row_bytes);
  const int splits =
      cuda::PrefillSplits(p.count, p.group_heads, p.kv_heads, device_->facts().multiprocessors);
  cuda::PrefillChunk c{.row = row,
                       .scale = p.storage.scale,
                       .kv_heads = p.kv_heads,
                       .group_heads = p.group_heads,
                       .q_heads = p.q_heads,
                       .out_dtype = p.out_dtype,
                       .first = p.first,
                       .count = p.count,
                       .rows_stride = chunk * row.row_bytes,
                       .q = p.q,
                       .q_token_stride = p.q_token_stride,
                       .q_head_stride = p.q_head_stride,
                       .splits = splits,
                       .out = p.out,
                       .lse = p.lse};
  // Sums of all parts of the keys, between chunks and for the merge
  const int64_t states = all > chunk || splits > 1 ? splits * heads : 0;
  std::byte *rows[kBuffers] = {}, *q = nullptr, *out = nullptr, *lse = nullptr;
  const bool host_q = !IsOnDevice(p.q), host_lse = p.lse != nullptr && !IsOnDevice(p.lse),
             own_out =
                 !IsOnDevice(p.out) || reinterpret_cast<uintptr_t>(p.out) % kOutAlignment != 0;
  Arrays arrays;
  for (std::byte*& buffer : rows) arrays.Plan(p.kv_heads * c.rows_stride, &buffer);
  arrays.Plan(states * int64_t{sizeof(float)}, &c.most);
  arrays.Plan(states * int64_t{sizeof(float)}, &c.mass);
  arrays.Plan(states * row.dim_v * int64_t{sizeof(float)}, &c.sum);
  arrays.Plan(host_q ? q_bytes : 0, &q);
  arrays.Plan(own_out ? out_bytes : 0, &out);
  arrays.Plan(host_lse ? heads * int64_t{sizeof(float)} : 0, &lse);
  const std::lock_guard<std::mutex> lock(prefill_mutex_);
  if (arrays.bytes() > prefill_memory_.size()) {
    prefill_memory_ = DeviceMemory();
    absl::StatusOr<DeviceMemory> memory = device_->Allocate(arrays.bytes());
    if (!memory.ok()) return memory.status();
    prefill_memory_ = *std::move(memory);
  }
  arrays.Place(prefill_memory_.data());
  // Where something fails nothing may go on with the arrays of the caller.
  absl::Cleanup wait = [this] { device_->SynchronizeAll().IgnoreError(); };
  const DeviceStream stream = device_->stream();
  if (host_q) {
    VATTN_RETURN_IF_ERROR(device_->Copy(q, p.q, static_cast<uint64_t>(q_bytes), stream));
    c.q = q;
  }
  if (own_out) c.out = out;
  if (host_lse) c.lse = reinterpret_cast<float*>(lse);
  VATTN_RETURN_IF_ERROR(AttendChunks(p, c, chunk, rows, fetch));
  if (own_out)
    VATTN_RETURN_IF_ERROR(device_->Copy(p.out, out, static_cast<uint64_t>(out_bytes), stream));
  if (host_lse) {
    VATTN_RETURN_IF_ERROR(
        device_->Copy(p.lse, lse, static_cast<uint64_t>(heads) * sizeof(float), stream));
  }
  VATTN_RETURN_IF_ERROR(device_->Synchronize(stream));
  std::move(wait).Cancel();
  return absl::OkStatus();
}

bool CudaBackend::DropPrefillMemory() {
  const std::unique_lock<std::mutex> lock(prefill_mutex_, std::try_to_lock);
  if (!lock.owns_lock() || prefill_memory_.size() == 0) return false;
  prefill_memory_ = DeviceMemory();
  return true;
}

}  // namespace vattn
