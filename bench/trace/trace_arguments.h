// Arguments that mean something only beside a recording.
#ifndef VATTN_BENCH_TRACE_TRACE_ARGUMENTS_H_
#define VATTN_BENCH_TRACE_TRACE_ARGUMENTS_H_

#include <cstdint>
#include <vector>

#include "bench/trace/trace.h"

namespace vattn::bench {

// The layers that --layers names: all, if it was not given. Throws UsageError for one that the
// recording does not have.
std::vector<int32_t> ResolveLayers(const Trace& trace, const std::vector<int32_t>& given);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_TRACE_TRACE_ARGUMENTS_H_
