// `vattn step` on a CUDA device: one line for each length and batch.
#ifndef VATTN_BENCH_STEP_STEP_CUDA_COMMAND_H_
#define VATTN_BENCH_STEP_STEP_CUDA_COMMAND_H_

#include <cstdint>
#include <string>
#include <vector>

#include "api/vattn.h"
#include "bench/cli/environment.h"
#include "bench/step/step_cuda.h"
#include "bench/trace/decode_data.h"
#include "bench/trace/trace.h"

namespace vattn::bench {

struct DeviceStepArguments {
  DecodeShape shape;  // tokens and batch come from the lists
  vattn_options options = {};
  std::vector<int64_t> tokens;
  std::vector<int32_t> batches;
  DeviceStepPlan plan;
  bool resident = false;  // a second line for each with plan.resident
  bool baselines = true;
  uint64_t host_bytes = 0;  // of host memory may be taken; 0: what is available
  std::string json;
};

// trace: null for synthetic keys. UsageError before anything is measured if a line does not fit the
// host; a line that fails is told of and left out, and Failure follows the report.
void RunDeviceStep(const DeviceStepArguments& arguments, const Trace* trace,
                   const CommandLine& command);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_STEP_STEP_CUDA_COMMAND_H_
