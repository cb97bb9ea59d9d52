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

// Codes tiles of 16 tokens: grid x goes round the tiles, grid y is the item. Load, transform, errors
// and packing hand over in shared memory that is laid out at the top, so they stand in one function.
template <DType kType>
__global__ void __launch_bounds__(kEncodeThreads)
    EncodeKernel(DeviceStorage storage, const EncodeItem* items) {
  using E = Element<kType>;
  extern __shared__ __align__(16) float memory[];
  const Storage& s = storage.host;
  const EncodeItem& item = items[blockIdx.y];
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
      const float k = E::One(HostRow(s, item.blocks, token + t) + c * E::kBytes);
      keys[c * kTileTokens + t] = __fsub_rn(k, item.index.center[c]);
    }
    __syncthreads();
    for (int j = threadIdx.x; j < (has_outliers ? dim : dims); j += kEncodeThreads) {
      const float* column = j < dims ? item.index.encode + j : item.index.rest + j - dims;
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
                  step = has_outliers && j < dims ? item.index.step[j] : 1;
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
      const std::byte* value = HostRow(s, item.blocks, token + t) + s.row.v_offset;
      float residual2 = 0, noise2 = 0, norm2 = 0;
      for (int j = 0; j < dim; ++j) {
        const float r2 = squares[j * kTileTokens + t];
        residual2 = __fadd_rn(residual2, r2);
        noise2 = __fadd_rn(noise2, __fmul_rn(item.index.weight[j], r2));
      }
      for (int j = 0; j < s.row.dim_v; ++j) {
        const float v = E::One(value + j * E::kBytes);
        norm2 = __fadd_rn(norm2, __fmul_rn(v, v));
      }
      outlier[t] = !(residual2 <= item.index.residual_limit && noise2 <= item.index.noise_limit &&
                     norm2 <= item.index.value_limit);
      const unsigned outliers = __ballot_sync((1u << kTileTokens) - 1, outlier[t]);
      if (t == 0 && outliers != 0 && item.outliers != nullptr) {
        atomicAdd(item.outliers, static_cast<unsigned long long>(__popc(outliers)));
      }
    }
    __syncthreads();
    const int64_t block = item.blocks[token / kBlockTokens],
                  at = token % kBlockTokens / kTileTokens * words * 64;
    for (int i = threadIdx.x; i < words * kTileTokens; i += kEncodeThreads) {
      int w = i / kTileTokens, first, bits;
      const int t = i % kTileTokens;
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
      reinterpret_cast<uint32_t*>(storage.codes + block * storage.code_block_bytes + at)[i] = word;
      reinterpret_cast<uint32_t*>(s.base + block * s.block.bytes + s.block.codes + at)[i] = word;
    }
  }
}

template <DType kType>
int LaunchEncode(const DeviceStorage& storage, const EncodeItem* items, int count, int64_t most,
                 cudaStream_t stream) {
  const int dims = storage.host.code.dims();
  const int floats =
      storage.host.row.dim_k * (storage.host.code.kind == IndexKind::kBalanced ? 2 : 1);
  const int bytes = floats * kTileTokens * 4 + dims * kTileTokens;
  const auto kernel = EncodeKernel<kType>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int64_t tiles = (most + kTileTokens - 1) / kTileTokens;
  // 65,535 is the most that the second dimension of a grid takes.
  for (int first = 0; first < count; first += 65535) {
    const dim3 grid(static_cast<unsigned>(tiles < 4096 ? tiles : 4096),
                    static_cast<unsigned>(count - first < 65535 ? count - first : 65535));
    kernel<<<grid, kEncodeThreads, bytes, stream>>>(storage, items + first);
  }
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
    return LaunchEncode<kType>(storage, items, count, most, s);
  });
}

}  // namespace vattn::cuda
