// Decode steps on long sequences, policy verified against dense, for `vattn step`.
#ifndef VATTN_BENCH_STEP_STEP_H_
#define VATTN_BENCH_STEP_STEP_H_

#include <cstdint>
#include <vector>

#include "api/vattn.h"
#include "bench/cli/progress.h"
#include "bench/step/bandwidth.h"
#include "bench/trace/decode_data.h"

namespace vattn::bench {

struct StepFigures {
  int64_t tokens = 0;
  // Microseconds of one layer of one step, the layer's part in opening the step included.
  double verified_p50 = 0, verified_p90 = 0, dense_p50 = 0, dense_p90 = 0;
  double dense_gbps = 0;      // bytes of all rows over dense_p50
  double selected_share = 0;  // of the middle, mean
  double promised_share = 0;  // query heads with verdict VERIFIED or EXACT
};

// Two runtimes with the same sequences take `steps` steps in turns, after a few that do not count.
// caches, if not null, is read through before every timed call, as the other layers of a model
// would. REQUIRES options.policy verified and the shape's fields set in options.
StepFigures MeasureStep(const DecodeShape& shape, const DecodeData& data,
                        const vattn_options& options, int64_t steps, const ReadBuffer* caches,
                        Progress* progress);

// Fills in what the shape decides; room for `steps` steps.
void SetShape(const DecodeShape& shape, int64_t steps, vattn_options* options);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_STEP_STEP_H_
