// Element types of traces and runtimes, to and from float.
#ifndef VATTN_BENCH_CLI_DTYPE_H_
#define VATTN_BENCH_CLI_DTYPE_H_

#include <cstddef>
#include <cstdint>

#include "api/vattn.h"

namespace vattn::bench {

// dtype is a vattn_dtype everywhere.
size_t ElementBytes(int32_t dtype);

// [count] elements each. Pointers are aligned to the element.
void ToFloat(int32_t dtype, const void* from, size_t count, float* to);
// Rounds to nearest, ties to even; what is too large becomes infinite.
void FromFloat(int32_t dtype, const float* from, size_t count, void* to);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_CLI_DTYPE_H_
