// Op encode: index codes of tiles of 16 tokens (METHOD.md, "Index"). x_j is the chain of fused
// multiply-adds of kernels/cpu/encode.cc, so codes are the same bits.
#include <cmath>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/stages.h"
#include "kernels/cuda/values.h"
#include "kernels/cuda/vocabulary.cuh"

namespace vattn::cuda {
namespace {

constexpr int kEncodeThreads = 128;

__device__ uint32_t Level(float x, int bits) {
  const int half = 1 << (bits - 1);
  const float level = floorf(x) + static_cast<float>(half);
  // NaN becomes level 0.
  return static_cast<uint32_t>(fminf(fmaxf(0.f, level), static_cast<float>(2 * half - 1)));
}

// Tokens [begin, end) of an item in the library's own pool; their codes go to the device and to the
// host copy.
struct ItemTokens {
  using Argument = const EncodeItem*;
  const DeviceStorage& storage;
  const EncodeItem& item;
  int64_t begin, end;

  __device__ ItemTokens(const DeviceStorage& s, const EncodeItem* items)
      : storage(s), item(items[blockIdx.y]), begin(item.begin), end(item.end) {}
  __device__ const IndexTables& index() const { return item.index; }
  __device__ unsigned long long* outliers() const { return item.outliers; }
  __device__ bool Has(int64_t) const { return true; }
  __device__ const std::byte* Key(int64_t token) const {
    return HostRow(storage.host, item.blocks, token);
  }
  __device__ const std::byte* Value(int64_t token) const {
    return Key(token) + storage.host.row.v_offset;
  }
  __device__ void Store(int64_t token, int words, int word, uint32_t bits) const {
    const Storage& s = storage.host;
    const int64_t block = item.blocks[token / kBlockTokens], in_block = token % kBlockTokens,
                  at = (in_block / kTileTokens * words + word) * 64 + in_block % kTileTokens * 4;
    *reinterpret_cast<uint32_t*>(storage.codes + block * storage.code_block_bytes + at) = bits;
    *reinterpret_cast<uint32_t*>(s.base + block * s.block.bytes + s.block.codes + at) = bits;
  }
};

// Rows at slots of an engine's pool for one KV head; their codes go to the engine's or the library's
// memory on the device.
struct SlotTokens {
  using Argument = WriteSlotsParams;
  const DeviceStorage& storage;
  const WriteSlotsParams& p;
  int64_t begin = 0, end;
  int head;

  __device__ SlotTokens(const DeviceStorage& s, const WriteSlotsParams& params)
      : storage(s), p(params), end(p.count), head(static_cast<int>(blockIdx.y)) {}
  __device__ const IndexTables& index() const { return p.index[head]; }
  __device__ unsigned long long* outliers() const {
    return reinterpret_cast<unsigned long long*>(p.outliers);
  }
  __device__ bool Has(int64_t i) const {
    return i < p.count && p.slots[i] >= 0 && p.slots[i] < p.num_slots;
  }
  __device__ const std::byte* Key(int64_t i) const {
    const Storage& s = storage.host;
    const int64_t slot = p.slots[i];
    return RowInBlock(s, slot / s.block.tokens, slot % s.block.tokens, head);
  }
  __device__ const std::byte* Value(int64_t i) const { return Key(i) + storage.pool_v_offset; }
  __device__ void Store(int64_t i, int words, int word, uint32_t bits) const {
    const int64_t tokens = storage.host.block.tokens, slot = p.slots[i], in_block = slot % tokens;
    *reinterpret_cast<uint32_t*>(storage.codes + slot / tokens * storage.code_block_bytes +
                                 (head * tokens + in_block / kTileTokens * kTileTokens) *
                                     (4 * words) +
                                 word * 64 + in_block % kTileTokens * 4) = bits;
  }
};

// Codes tiles of 16 tokens: grid x goes round the tiles, grid y is the item or the KV head. Load,
// transform, errors and packing hand over in shared memory that is laid out at the top, so they stand
// in one function.
template <DType kType, class Tokens>
__global__ void __launch_bounds__(kEncodeThreads)
    EncodeKernel(const __grid_constant__ DeviceStorage storage,
                 const __grid_constant__ typename Tokens::Argument argument) {
  using E = Element<kType>;
  extern __shared__ __align__(16) float memory[];
  const Storage& s = storage.host;
  const Tokens item(storage, argument);
  const IndexTables& index = item.index();
  const int dim = s.row.dim_k, many = s.code.dims8 + s.code.dims4 + s.code.dims2;
  const int dims = many + s.code.dims1, padded = (dims + 15) / 16 * 16,
            padded_rest = (dim - dims + 15) / 16 * 16;
  const int words = s.code.dims8 / 4 + s.code.dims4 / 8 + s.code.dims2 / 16 + s.code.dims1 / 32;
  const bool has_outliers = s.code.kind == IndexKind::kBalanced;
  float* keys = memory;                       // [dim][16]
  float* squares = keys + dim * kTileTokens;  // with has_outliers: [dim][16] of residuals
  // [dims][16]
  uint8_t* levels =
      reinterpret_cast<uint8_t*>(has_outliers ? squares + dim * kTileTokens : squares);
  __shared__ bool outlier[kTileTokens];
  for (int64_t token = item.begin + int64_t{blockIdx.x} * kTileTokens; token < item.end;
       token += int64_t{gridDim.x} * kTileTokens) {
    __syncthreads();
    for (int i = threadIdx.x; i < dim * kTileTokens; i += kEncodeThreads) {
      const int t = i / dim, c = i - t * dim;
      const float k = item.Has(token + t) ? E::One(item.Key(token + t) + c * E::kBytes) : 0;
      keys[c * kTileTokens + t] = __fsub_rn(k, index.center[c]);
    }
    __syncthreads();
    for (int j = threadIdx.x; j < (has_outliers ? dim : dims); j += kEncodeThreads) {
      const float* column = j < dims ? index.encode + j : index.rest + j - dims;
      const int64_t pitch = j < dims ? padded : padded_rest;
      float x[kTileTokens] = {};
      for (int c = 0; c < dim; ++c) {
        const float e = column[c * pitch];
        const float4* k = reinterpret_cast<const float4*>(keys + c * kTileTokens);
#pragma unroll
        for (int t = 0; t < kTileTokens / 4; ++t) {
          const float4 v = k[t];
          x[4 * t] = fmaf(v.x, e, x[4 * t]);
          x[4 * t + 1] = fmaf(v.y, e, x[4 * t + 1]);
          x[4 * t + 2] = fmaf(v.z, e, x[4 * t + 2]);
          x[4 * t + 3] = fmaf(v.w, e, x[4 * t + 3]);
        }
      }
      const int bits = j < s.code.dims8                  ? 7
                       : j < s.code.dims8 + s.code.dims4 ? 4
                       : j < many                        ? 2
                                                         : 1;
      const float half = static_cast<float>(1 << (bits - 1)),
                  step = has_outliers && j < dims ? index.step[j] : 1;
#pragma unroll
      for (int t = 0; t < kTileTokens; ++t) {
        float r = x[t];
        if (j < dims) {
          levels[j * kTileTokens + t] = static_cast<uint8_t>(Level(x[t], bits));
          const float level = fminf(fmaxf(-half, floorf(x[t])), half - 1) + .5f;
          r = __fmul_rn(__fsub_rn(x[t], level), step);
        }
        if (has_outliers) squares[j * kTileTokens + t] = __fmul_rn(r, r);
      }
    }
    __syncthreads();
    if (has_outliers && threadIdx.x < kTileTokens) {
      const int t = threadIdx.x;
      const bool there = item.Has(token + t);
      const std::byte* value = there ? item.Value(token + t) : nullptr;
      float residual2 = 0, noise2 = 0, norm2 = 0;
      for (int j = 0; j < dim; ++j) {
        const float r2 = squares[j * kTileTokens + t];
        residual2 = __fadd_rn(residual2, r2);
        noise2 = __fadd_rn(noise2, __fmul_rn(index.weight[j], r2));
      }
      for (int j = 0; there && j < s.row.dim_v; ++j) {
        const float v = E::One(value + j * E::kBytes);
        norm2 = __fadd_rn(norm2, __fmul_rn(v, v));
      }
      outlier[t] = there && !(residual2 <= index.residual_limit && noise2 <= index.noise_limit &&
                              norm2 <= index.value_limit);
      const unsigned outliers = __ballot_sync((1u << kTileTokens) - 1, outlier[t]);
      if (t == 0 && outliers != 0 && item.outliers() != nullptr) {
        atomicAdd(item.outliers(), static_cast<unsigned long long>(__popc(outliers)));
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < words * kTileTokens; i += kEncodeThreads) {
      int w = i / kTileTokens, first, bits;
      const int t = i % kTileTokens, number = w;
      if (!item.Has(token + t)) continue;
      if (w < s.code.dims8 / 4) {
        bits = 8, first = 4 * w;
      } else if ((w -= s.code.dims8 / 4) < s.code.dims4 / 8) {
        bits = 4, first = s.code.dims8 + 8 * w;
      } else if ((w -= s.code.dims4 / 8) < s.code.dims2 / 16) {
        bits = 2, first = s.code.dims8 + s.code.dims4 + 16 * w;
      } else {
        bits = 1, first = many + 32 * (w - s.code.dims2 / 16);
      }
      uint32_t word = 0;
      for (int k = 0; k < 32 / bits; ++k) {
        word |= uint32_t{levels[(first + k) * kTileTokens + t]} << (k % 4 * 8 + k / 4 * bits);
      }
      if (has_outliers && outlier[t]) word = 0;
      item.Store(token + t, words, number, word);
    }
  }
}

// `count` items or KV heads with `most` tokens at most.
template <DType kType, class Tokens>
int LaunchEncode(const DeviceStorage& storage, const typename Tokens::Argument& argument, int count,
                 int64_t most, cudaStream_t stream) {
  const int dims = storage.host.code.dims();
  const int floats =
      storage.host.row.dim_k * (storage.host.code.kind == IndexKind::kBalanced ? 2 : 1);
  const int bytes = floats * kTileTokens * 4 + dims * kTileTokens;
  const auto kernel = EncodeKernel<kType, Tokens>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int64_t tiles = (most + kTileTokens - 1) / kTileTokens;
  kernel<<<dim3(static_cast<unsigned>(tiles < 4096 ? tiles : 4096), static_cast<unsigned>(count)),
           kEncodeThreads, bytes, stream>>>(storage, argument);
  return cudaGetLastError();
}

}  // namespace

int Encode(const DeviceStorage& storage, const EncodeItem* items, int count, int64_t most,
           Stream stream) {
  const int error = EncodeValues(storage, items, count, most, stream);
  if (error != cudaSuccess || count == 0 || most == 0 || storage.host.code.bytes() == 0)
    return error;
  const cudaStream_t s = static_cast<cudaStream_t>(stream.handle);
  return DispatchDType(storage.host.row.dtype, [&]<DType kType>() {
    // 65,535 is the most that the second dimension of a grid takes.
    int result = cudaSuccess;
    for (int first = 0; result == cudaSuccess && first < count; first += 65535) {
      result = LaunchEncode<kType, ItemTokens>(
          storage, items + first, count - first < 65535 ? count - first : 65535, most, s);
    }
    return result;
  });
}

int EncodeSlots(const DeviceStorage& storage, const WriteSlotsParams& params, Stream stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream.handle);
  return DispatchDType(storage.host.row.dtype, [&]<DType kType>() {
    return LaunchEncode<kType, SlotTokens>(storage, params, params.kv_heads, params.count, s);
  });
}

}  // namespace vattn::cuda
