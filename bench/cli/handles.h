// Owners of the C API's handles, and its codes as exceptions.
#ifndef VATTN_BENCH_CLI_HANDLES_H_
#define VATTN_BENCH_CLI_HANDLES_H_

#include <cstdint>
#include <memory>

#include "api/vattn.h"

namespace vattn::bench {

template <class Handle, void (*kDestroy)(Handle*)>
struct Destroyer {
  void operator()(Handle* handle) const { kDestroy(handle); }
};
// A sequence or batch must go before its runtime: declare it after.
using Runtime = std::unique_ptr<vattn_runtime, Destroyer<vattn_runtime, vattn_runtime_destroy>>;
using Sequence = std::unique_ptr<vattn_sequence, Destroyer<vattn_sequence, vattn_sequence_destroy>>;
using Batch = std::unique_ptr<vattn_batch, Destroyer<vattn_batch, vattn_batch_destroy>>;

// Throws Failure with the name of the call, the code and the library's text.
void Check(vattn_code code, const char* call);

// UsageError if the library refuses an option.
Runtime CreateRuntime(const vattn_options& options);
// With a fixed id, so that the options' seed alone decides every draw.
Sequence CreateSequence(vattn_runtime* runtime, uint64_t id);
Batch CreateBatch(vattn_runtime* runtime, int32_t slots);

// Host pool for `sequences` sequences of `tokens` tokens in every layer of options, with room for
// codes and for whole blocks.
uint64_t HostBytes(const vattn_options& options, int64_t tokens, int64_t sequences);
// Bytes of one token and KV head as kernels/geometry.h lays a row out: K and V, padded to 128.
int64_t RowBytes(const vattn_options& options);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_CLI_HANDLES_H_
