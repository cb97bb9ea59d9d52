// Rows of the baselines: bf16 numbers of either sign, .5 <= |x| < 2, the same on host and device.
// For .cu files only.
#ifndef VATTN_BENCH_BASELINES_BASELINE_DATA_H_
#define VATTN_BENCH_BASELINES_BASELINE_DATA_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace vattn::bench {

// Four numbers: 64-bit word i of array `seed`.
__host__ __device__ inline uint64_t DataWord(uint64_t seed, uint64_t i) {
  uint64_t x = (i + 1) * 0x9e3779b97f4a7c15u + seed * 0xd1342543de82ef95u;  // splitmix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  x ^= x >> 31;
  return (x & 0x80ff80ff80ff80ffu) | 0x3f003f003f003f00u;
}

// Enqueues the filling of words [0, count); a cudaError_t value.
int FillData(uint64_t* words, int64_t count, uint64_t seed, cudaStream_t stream);

inline float FromBf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  static_assert(sizeof(value) == sizeof(wide));
  __builtin_memcpy(&value, &wide, sizeof(value));
  return value;
}

}  // namespace vattn::bench

#endif  // VATTN_BENCH_BASELINES_BASELINE_DATA_H_
