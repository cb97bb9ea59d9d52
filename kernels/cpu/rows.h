// The three row primitives that attention and its certificate are made of, for rows in any dtype.
#ifndef VATTN_KERNELS_CPU_ROWS_H_
#define VATTN_KERNELS_CPU_ROWS_H_

#include <cstdint>

#include "kernels/geometry.h"

namespace vattn::cpu {

// A list of row parts of `dim` elements each, dim a multiple of 16.
struct RowList {
  const uint8_t* const* rows = nullptr;  // [count]
  int32_t count = 0;
  int64_t offset = 0;  // bytes from the start of each row
  int32_t dim = 0;
  DType dtype = DType::kBF16;
  // [soon_count] rows needed next, of which the first soon_bytes
  const uint8_t* const* soon = nullptr;
  int32_t soon_count = 0;  // are fetched on the way by DotRows and AddRows
  int32_t soon_bytes = 0;  // a multiple of 128
};

// Fetches the cache line of `at` into the second level. The first level has too few misses in
// flight to hide memory behind work, and a burst of fetches stalls what follows: spread them over
// the work. Always inline: GCC 12 takes a call of it for one without effect and drops it.
[[gnu::always_inline]] inline void FetchSoon(const void* at) {
  __builtin_prefetch(at, /*rw=*/0, /*locality=*/2);
}

// out[g * ld + i] = queries[g] . row_i; queries [heads][dim]. Queries that are `unit` times numbers
// of the rows' dtype can be faster; the result is right whatever unit is.
void DotRows(const RowList& list, const float* queries, int heads, float* out, int64_t ld,
             float unit = 0);
// sum[g * sum_ld ..] += weights[g * ld + i] * row_i over i; dim elements a head.
void AddRows(const RowList& list, const float* weights, int64_t ld, int heads, float* sum,
             int64_t sum_ld);
// out[i] = |row_i|^2.
void NormRows(const RowList& list, float* out);
// out[i] = row_i . other_i, other [count][dim].
void DotPairs(const RowList& list, const float* other, float* out);
// out[i] = row_i as fp32, [count][dim].
void LoadRows(const RowList& list, float* out);
// out[i] = values[i] rounded to `dtype`; count a multiple of 16.
void StoreRow(const float* values, int count, DType dtype, void* out);
// Name of the instruction set in use, such as "AVX3".
const char* SimdTarget();

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_ROWS_H_
