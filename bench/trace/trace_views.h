// Recordings made of a recording.
#ifndef VATTN_BENCH_TRACE_TRACE_VIEWS_H_
#define VATTN_BENCH_TRACE_TRACE_VIEWS_H_

#include <cstdint>
#include <span>

#include "bench/trace/trace.h"

namespace vattn::bench {

// The listed layers, each query head with a KV head of its own: what it costs not to share rows.
Trace SplitHeads(const Trace& trace, std::span<const int32_t> layers);

// A shorter context of the same text and the same queries: the listed layers, of the prompt the first
// `sinks` tokens and as many of the last as make `prompt_tokens`. Keys keep their positions. Throws
// UsageError if the recording is shorter.
Trace Shorten(const Trace& trace, std::span<const int32_t> layers, int64_t prompt_tokens, int64_t sinks);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_TRACE_TRACE_VIEWS_H_
