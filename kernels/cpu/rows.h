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
  int32_t offset = 0;  // bytes from the start of each row
  int32_t dim = 0;
  DType dtype = DType::kBF16;
  int32_t prefetch_bytes = 0;  // of each row, from its start, that are soon needed
  int32_t listed = 0;          // rows may go on past count, up to here: they are prefetched in time
};

// out[g * ld + i] = queries[g] . row_i; queries [heads][dim].
void DotRows(const RowList& list, const float* queries, int heads, float* out, int64_t ld);
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
