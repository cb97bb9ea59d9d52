// How well and how fast an index predicts the scores of a recording: the library's own index and
// scan, looked into.
#ifndef VATTN_BENCH_INSIDE_ZOO_SCAN_H_
#define VATTN_BENCH_INSIDE_ZOO_SCAN_H_

#include <cstdint>
#include <vector>

#include "api/vattn.h"
#include "bench/trace/trace.h"

namespace vattn::bench {

// Means over (layer, query head, step); KV heads for bytes and times.
struct ScanFigures {
  double bytes = 0;        // of code per token and KV head
  double table_bytes = 0;  // of tables per KV head
  // Of the best 1 % of the middle by exact score, found among as many by prediction
  double recall = 0;
  // Attention that those found by prediction have, over that of the best ones
  double mass = 0;
  double noise = 0;   // standard deviation of prediction - score over the middle
  double spread = 0;  // standard deviation of the scores
  // Of a scan on one thread, per token and KV head: all query heads of the group
  double ns = 0;
};

// options are shaped for the trace (SetShape); a step in `every` is looked at, of the first
// `steps`. Layers are those of the runtime. Throws Failure.
ScanFigures MeasureScan(const Trace& trace, const std::vector<int32_t>& layers,
                        const vattn_options& options, int64_t steps, int64_t every);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_INSIDE_ZOO_SCAN_H_
