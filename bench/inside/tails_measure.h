// Every tail term on a recording, over draws of the same rows.
#ifndef VATTN_BENCH_INSIDE_TAILS_MEASURE_H_
#define VATTN_BENCH_INSIDE_TAILS_MEASURE_H_

#include <array>
#include <cstdint>
#include <vector>

#include "api/vattn.h"
#include "bench/cli/progress.h"
#include "bench/trace/trace.h"

namespace vattn::bench {

struct TailPlan {
  std::vector<int32_t> layers;  // places in the trace
  std::vector<int64_t> steps;   // those that are looked at
  int32_t draws = 1;            // for each query head and step
  double rows = .01;            // expected, as a share of the middle
  vattn_options options = {};   // shaped for the trace (SetShape)
};

enum Tail { kNone, kMean, kValueCodes, kPages, kClusterMeans, kLinear, kProduct, kTails };

struct TailFigures {
  double bytes = 0;            // per token of the middle
  std::vector<double> errors;  // by head, step and draw
  int64_t certified = 0, off = 0;
  std::vector<double> needed;  // by head and step, as a share of the middle
};

// Attention over the prompt's tokens with the queries of the steps. Throws Failure.
std::array<TailFigures, kTails> MeasureTails(const Trace& trace, const TailPlan& plan,
                                             Progress* progress);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_INSIDE_TAILS_MEASURE_H_
