// What `vattn step` sets beside a decode step on a CUDA device: the baselines of cuda_baselines.h
// for the same shape. Plain C++.
#ifndef VATTN_BENCH_STEP_STEP_BASELINES_H_
#define VATTN_BENCH_STEP_STEP_BASELINES_H_

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "bench/cli/progress.h"
#include "bench/trace/decode_data.h"

namespace vattn::bench {

struct StepBaselinePlan {
  uint64_t host_bytes = 0;  // of host memory may be taken
  int threads = 1;          // that fill it
  uint64_t seed = 1;
};

// Microseconds of one layer's attention; NaN: not measured, `notes` says why.
struct StepBaselines {
  double dense_us = NAN;        // all KV in device memory
  double streamed_us = NAN;     // all KV streamed from the host
  double hot_set_us = NAN;      // HiSparse-style hot set
  double hot_set_missed = NAN;  // share of its list
  std::vector<std::string> notes;
};

// Frees everything before it returns. REQUIRES a device.
StepBaselines MeasureStepBaselines(const DecodeShape& shape, const StepBaselinePlan& plan,
                                   Progress* progress);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_STEP_STEP_BASELINES_H_
