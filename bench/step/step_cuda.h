// Decode steps on a CUDA device, for `vattn step`: all arrays on the device, the attention of a
// step replayed as a CUDA graph. Plain C++.
#ifndef VATTN_BENCH_STEP_STEP_CUDA_H_
#define VATTN_BENCH_STEP_STEP_CUDA_H_

#include <array>
#include <cstdint>
#include <string>

#include "api/vattn.h"
#include "bench/cli/progress.h"
#include "bench/step/step_check.h"
#include "bench/trace/decode_data.h"

namespace vattn::bench {

// Steps before those that count. The first ones fill the hot set and settle the controller.
constexpr int64_t kEagerWarmUp = 16;
constexpr int64_t kEagerSteps = 8;  // timed without a graph
constexpr int64_t kReplayWarmUp = 4;

struct DeviceStepPlan {
  int64_t steps = 64;        // replayed and timed
  bool keep_caches = false;  // do not fill the L2 cache with other bytes before a step
  bool resident = false;     // every step asks what the first one asked
  bool shared = false;       // the batch is forks of one sequence, with queries of their own
  int threads = 1;           // that make rows and check answers

  int64_t all_steps() const { return kEagerWarmUp + kEagerSteps + kReplayWarmUp + steps; }
};

struct DeviceStepFigures {
  // Device time of one layer's attention in microseconds: replayed and by calls.
  double us_p50 = 0, us_p90 = 0, eager_p50 = 0, eager_p90 = 0;
  double begin_p50 = 0, begin_p90 = 0;  // host time of vattn_batch_begin_step, all layers
  double looks = 0, selected = 0, fetched = 0, middle = 0;  // of a KV head, mean
  double pcie_bytes = 0;                                    // rows fetched for a layer, mean
  double scan_bytes = 0;                 // codes read, estimates written and read for a layer, mean
  std::array<int64_t, 4> verdicts = {};  // query heads by vattn_verdict
  double device_bytes = 0;               // of the runtime, its sequences and its batch
  int64_t distinct_tokens = 0;           // held in every layer
  double prompt_seconds = 0;
  // Between the marks of vattn_attend_params.timeline, mean over steps and layers; NaN where no
  // call passed both.
  std::array<double, VATTN_TIMELINE_MARKS - 1> stage_us = {};
  AnswerErrors errors;  // of some heads in some steps
};

// What the device and the way to it can do.
struct DeviceRates {
  std::string device;
  double memcpy_gbps = 0;  // from pinned host memory
  double copy_gbps = 0;    // within device memory, read and written together
};

// UsageError in a build without CUDA or on a machine without a device.
void RequireStepDevice();

DeviceRates MeasureDeviceRates(int threads);

// REQUIRES a device, options with the shape's fields and room for plan.all_steps() steps. Ends the
// program if the device does not answer.
DeviceStepFigures MeasureDeviceStep(const DecodeShape& shape, const DecodeData& data,
                                    const vattn_options& options, const DeviceStepPlan& plan,
                                    Progress* progress);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_STEP_STEP_CUDA_H_
