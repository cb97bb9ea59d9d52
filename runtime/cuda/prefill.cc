// Prompts on the device: their rows are brought from the host pool chunk by chunk, and each chunk is
// attended before the next one takes its place.
#include <algorithm>
#include <vector>

#include "kernels/cuda/launch.h"
#include "memory/status.h"
#include "runtime/cuda/backend.h"

namespace vattn {
namespace {

constexpr int64_t kChunkTokens =
    4096;  // whole blocks: 16 MiB of rows of 8 KV heads of 128 elements

// Arrays of one prefill, one behind the other in device memory.
class Arrays {
 public:
  explicit Arrays(Device& device) : device_(device) {}

  // Sets aside so many bytes, for `at` to point to; none for 0 bytes.
  template <class T>
  void Plan(int64_t bytes, T** at) {
    places_.push_back({reinterpret_cast<void**>(at), bytes == 0 ? -1 : bytes_});
    bytes_ += (bytes + 255) / 256 * 256;
  }
  // Sets all pointers. OUT_OF_MEMORY.
  absl::Status Allocate() {
    absl::StatusOr<DeviceMemory> memory = device_.Allocate(static_cast<uint64_t>(bytes_));
    if (!memory.ok()) return memory.status();
    memory_ = *std::move(memory);
    for (const Place& place : places_)
      *place.at = place.offset < 0 ? nullptr : memory_.data() + place.offset;
    return absl::OkStatus();
  }

 private:
  struct Place {
    void** at;
    int64_t offset;
  };
  Device& device_;
  std::vector<Place> places_;
  int64_t bytes_ = 0;
  DeviceMemory memory_;
};

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

absl::Status CudaBackend::Prefill(const PrefillParams& p, cpu::Workers*) {
  VATTN_RETURN_IF_ERROR(device_->Activate());
  const RowLayout& row = p.storage.row;
  const int64_t all = p.first + p.count, blocks = BlocksFor(all), heads = p.count * p.q_heads,
                element = ElementBytes(row.dtype),
                out_bytes = heads * row.dim_v * ElementBytes(static_cast<DType>(p.out_dtype)),
                q_bytes = ((p.count - 1) * p.q_token_stride + (p.q_heads - 1) * p.q_head_stride +
                           row.dim_k) *
                          element;
  const int64_t chunk = std::min(kChunkTokens, blocks * kBlockTokens);
  const bool several = all > chunk;
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
                       .out = p.out,
                       .lse = p.lse};
  Arrays arrays(*device_);
  int32_t* ids = nullptr;
  std::byte *rows = nullptr, *q = nullptr, *out = nullptr, *lse = nullptr;
  const bool host_q = !IsOnDevice(p.q), host_out = !IsOnDevice(p.out),
             host_lse = p.lse != nullptr && !IsOnDevice(p.lse);
  arrays.Plan(p.kv_heads * blocks * int64_t{sizeof(int32_t)}, &ids);
  arrays.Plan(p.kv_heads * c.rows_stride, &rows);
  arrays.Plan(several ? heads * int64_t{sizeof(float)} : 0, &c.most);
  arrays.Plan(several ? heads * int64_t{sizeof(float)} : 0, &c.mass);
  arrays.Plan(several ? heads * row.dim_v * int64_t{sizeof(float)} : 0, &c.sum);
  arrays.Plan(host_q ? q_bytes : 0, &q);
  arrays.Plan(host_out ? out_bytes : 0, &out);
  arrays.Plan(host_lse ? heads * int64_t{sizeof(float)} : 0, &lse);
  VATTN_RETURN_IF_ERROR(arrays.Allocate());
  const DeviceStream stream = device_->stream();
  for (int32_t h = 0; h < p.kv_heads; ++h) {
    VATTN_RETURN_IF_ERROR(device_->Copy(ids + h * blocks, p.blocks[h],
                                        static_cast<uint64_t>(blocks) * sizeof(int32_t), stream));
  }
  if (host_q) {
    VATTN_RETURN_IF_ERROR(device_->Copy(q, p.q, static_cast<uint64_t>(q_bytes), stream));
    c.q = q;
  }
  if (host_out) c.out = out;
  if (host_lse) c.lse = reinterpret_cast<float*>(lse);
  c.rows = rows;
  for (c.begin = 0; c.begin < all; c.begin += chunk) {
    c.tokens = std::min(chunk, all - c.begin);
    c.last = c.begin + c.tokens == all;
    VATTN_RETURN_IF_ERROR(
        device_->Check(cuda::FetchRows(storage_.host, ids, blocks, p.kv_heads, c.begin, c.tokens,
                                       rows, c.rows_stride, {stream}),
                       "fetching a prompt's rows"));
    VATTN_RETURN_IF_ERROR(device_->Check(cuda::Prefill(c, {stream}), "attending a prompt"));
  }
  if (host_out)
    VATTN_RETURN_IF_ERROR(device_->Copy(p.out, out, static_cast<uint64_t>(out_bytes), stream));
  if (host_lse) {
    VATTN_RETURN_IF_ERROR(
        device_->Copy(p.lse, lse, static_cast<uint64_t>(heads) * sizeof(float), stream));
  }
  return device_->Synchronize(stream);
}

}  // namespace vattn
