// Small kernels that bring the device up to date before a step: block tables, sinks and ring,
// copies of codes, and what the hot set must forget.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/vocabulary.cuh"

namespace vattn::cuda {
namespace {

constexpr int kTableThreads = 256;

unsigned Grid(int64_t count) {
  const int64_t blocks = (count + kTableThreads - 1) / kTableThreads;
  return static_cast<unsigned>(blocks < 4096 ? blocks : 4096);
}

__global__ void LoadFixedKernel(DeviceStorage storage, const FixedItem* items) {
  const FixedItem& item = items[blockIdx.x];
  const int row_bytes = storage.host.row.row_bytes, parts = row_bytes / 16;
  const int64_t sinks = min(int64_t{storage.sinks}, item.tokens);
  const int64_t ring = max(sinks, item.tokens - storage.ring_tokens);
  const int64_t rows = sinks + item.tokens - ring;
  for (int64_t i = int64_t{blockIdx.y} * kTableThreads + threadIdx.x; i < rows * parts;
       i += int64_t{gridDim.y} * kTableThreads) {
    const int64_t row = i / parts, part = i - row * parts;
    const int64_t token = row < sinks ? row : ring + row - sinks;
    const int64_t to = token < sinks ? token : storage.sinks + token % storage.ring_tokens;
    reinterpret_cast<uint4*>(item.fixed + to * row_bytes)[part] =
        reinterpret_cast<const uint4*>(HostRow(storage.host, item.blocks, token))[part];
  }
}

__global__ void LoadCodesKernel(DeviceStorage storage, const int32_t* blocks, int64_t count) {
  const int64_t parts = storage.code_block_bytes / 16;
  for (int64_t i = int64_t{blockIdx.x} * kTableThreads + threadIdx.x; i < count * parts;
       i += int64_t{gridDim.x} * kTableThreads) {
    const int64_t block = blocks[i / parts], part = i % parts;
    reinterpret_cast<uint4*>(storage.codes + block * storage.code_block_bytes)[part] =
        reinterpret_cast<const uint4*>(storage.host.base + block * storage.host.block.bytes +
                                       storage.host.block.codes)[part];
  }
}

__global__ void ForgetBlocksKernel(HotSetRef hot, const int32_t* blocks, int64_t count) {
  for (int64_t i = int64_t{blockIdx.x} * kTableThreads + threadIdx.x; i < count * kBlockTokens;
       i += int64_t{gridDim.x} * kTableThreads) {
    hot.slot_of[int64_t{blocks[i / kBlockTokens]} * kBlockTokens + i % kBlockTokens] = -1;
  }
}

__global__ void ApplyPatchesKernel(const Patch* patches, int64_t count) {
  for (int64_t i = int64_t{blockIdx.x} * kTableThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kTableThreads) {
    *patches[i].address = static_cast<int32_t>(patches[i].value);
  }
}

// Rows of [count][kv_heads] tokens into their blocks, 16 bytes a thread.
__global__ void WriteKernel(WriteParams p) {
  const RowLayout& row = p.storage.row;
  const int element = row.dtype == DType::kF32 ? 4 : 2;
  const int k_parts = row.dim_k * element / 16,
            v_parts = row.shared_kv ? 0 : row.dim_v * element / 16;
  const int parts = k_parts + v_parts;
  const int64_t all = p.count * p.kv_heads * parts;
  for (int64_t i = int64_t{blockIdx.x} * kTableThreads + threadIdx.x; i < all;
       i += int64_t{gridDim.x} * kTableThreads) {
    const int64_t item = i / parts, part = i - item * parts, t = item / p.kv_heads,
                  h = item - t * p.kv_heads;
    const bool key = part < k_parts;
    const std::byte* from =
        key ? static_cast<const std::byte*>(p.k) +
                  (t * p.k_token_stride + h * p.k_head_stride) * element + part * 16
            : static_cast<const std::byte*>(p.v) +
                  (t * p.v_token_stride + h * p.v_head_stride) * element + (part - k_parts) * 16;
    std::byte* to =
        const_cast<std::byte*>(HostRow(p.storage, p.blocks[h], p.first + t)) + part * 16;
    CopyGiven(to, from);
  }
}

// By two bytes, the least that is sure to be aligned.
__global__ void __launch_bounds__(kTableThreads)
    GatherKernel(const std::byte* base, const int64_t* offsets, int64_t count, int64_t bytes,
                 std::byte* to) {
  const int64_t words = bytes / 2;
  for (int64_t i = int64_t{blockIdx.x} * kTableThreads + threadIdx.x; i < count * words;
       i += int64_t{gridDim.x} * kTableThreads) {
    const int64_t part = i / words, word = i - part * words;
    reinterpret_cast<uint16_t*>(to)[i] =
        *reinterpret_cast<const uint16_t*>(base + offsets[part] + 2 * word);
  }
}

}  // namespace

int LoadFixed(const DeviceStorage& storage, const FixedItem* items, int count, Stream stream) {
  if (count == 0) return cudaSuccess;
  LoadFixedKernel<<<dim3(count, 8), kTableThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(
      storage, items);
  return cudaGetLastError();
}

int LoadCodes(const DeviceStorage& storage, const int32_t* blocks, int64_t count, Stream stream) {
  if (count == 0 || storage.code_block_bytes == 0) return cudaSuccess;
  const unsigned grid = Grid(count * storage.code_block_bytes / 16);
  LoadCodesKernel<<<grid, kTableThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(
      storage, blocks, count);
  return cudaGetLastError();
}

int ForgetBlocks(const HotSetRef& hot, const int32_t* blocks, int64_t count, Stream stream) {
  if (count == 0 || hot.slots == 0) return cudaSuccess;
  ForgetBlocksKernel<<<Grid(count * kBlockTokens), kTableThreads, 0,
                       static_cast<cudaStream_t>(stream.handle)>>>(hot, blocks, count);
  return cudaGetLastError();
}

int ApplyPatches(const Patch* patches, int64_t count, Stream stream) {
  if (count == 0) return cudaSuccess;
  ApplyPatchesKernel<<<Grid(count), kTableThreads, 0, static_cast<cudaStream_t>(stream.handle)>>>(
      patches, count);
  return cudaGetLastError();
}

int Gather(const std::byte* base, const int64_t* offsets, int64_t count, int64_t bytes,
           std::byte* to, Stream stream) {
  if (count == 0) return cudaSuccess;
  GatherKernel<<<Grid(count * bytes / 2), kTableThreads, 0,
                 static_cast<cudaStream_t>(stream.handle)>>>(base, offsets, count, bytes, to);
  return cudaGetLastError();
}

int Write(const WriteParams& p, Stream stream) {
  const int parts =
      (p.storage.row.dim_k + p.storage.row.dim_v) * ElementBytes(p.storage.row.dtype) / 16;
  WriteKernel<<<Grid(p.count * p.kv_heads * parts), kTableThreads, 0,
                static_cast<cudaStream_t>(stream.handle)>>>(p);
  return cudaGetLastError();
}

}  // namespace vattn::cuda
