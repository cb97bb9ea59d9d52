// Recordings made of a recording.
#ifndef VATTN_BENCH_TRACE_TRACE_VIEWS_H_
#define VATTN_BENCH_TRACE_TRACE_VIEWS_H_

#include <cstdint>
#include <span>

#include "bench/trace/trace.h"

namespace vattn::bench {

// The listed layers, each query head with a KV head of its own: what it costs not to share rows.
Trace SplitHeads(const Trace& trace, std::span<const int32_t> layers);

// A shorter context of the same text and the same queries: the listed layers, of the prompt the
// first `sinks` tokens and as many of the last as make `prompt_tokens`. Keys keep their positions.
// Throws UsageError if the recording is shorter.
Trace Shorten(const Trace& trace, std::span<const int32_t> layers, int64_t prompt_tokens,
              int64_t sinks);

// The same recording split elsewhere: its first `prompt_tokens` tokens are the prompt, and the next
// `steps` the steps (0: all that have queries). The prompt's queries are those of the last
// `queries` tokens (0: all that were recorded) before `queries_end`, which need not be the prompt's
// end (0: it is). Throws UsageError where there are no queries.
Trace SplitAt(const Trace& trace, int64_t prompt_tokens, int64_t steps, int64_t queries,
              int64_t queries_end);

// A loop: the token and the query of step `step` come `times` times, after the steps before them,
// which become part of the prompt. Throws UsageError if the recording has no such step.
Trace RepeatStep(const Trace& trace, int64_t step, int64_t times);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_TRACE_TRACE_VIEWS_H_
