// The hostile inputs of bench/trace/hostile_inputs.h as recordings, so that what runs on recorded
// attention runs on them.
#ifndef VATTN_BENCH_TRACE_HOSTILE_TRACE_H_
#define VATTN_BENCH_TRACE_HOSTILE_TRACE_H_

#include <vector>

#include "bench/trace/hostile_inputs.h"
#include "bench/trace/trace.h"

namespace vattn::bench {

// `steps` decode steps, the first with the input's query, later ones drifting towards the
// calibration queries; the last `steps` of the input's tokens are theirs. metadata model is the
// input's name.
Trace HostileTrace(const test::HostileInput& input, int64_t steps);

// Isotropic inputs, of every head_dim and spread, then values with a faint mean. Every step has a
// query of its own of the same distribution.
std::vector<Trace> IsotropicTraces(int64_t steps);

// Where the promise must hold, then the known hole
std::vector<Trace> HostileTraces(int64_t steps);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_TRACE_HOSTILE_TRACE_H_
