// What `vattn step` says of decode steps on a CUDA device.
#ifndef VATTN_BENCH_STEP_STEP_CUDA_REPORT_H_
#define VATTN_BENCH_STEP_STEP_CUDA_REPORT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "api/vattn.h"
#include "bench/cli/json.h"
#include "bench/step/step_baselines.h"
#include "bench/step/step_cuda.h"
#include "bench/trace/decode_data.h"

namespace vattn::bench {

struct DeviceStepLine {
  DecodeShape shape;
  vattn_options options = {};
  DeviceStepPlan plan;
  DeviceStepFigures figures;
  StepBaselines baselines;
};

// The least that a layer can take, in microseconds: the rows' way to the device or the scan's bytes
// in device memory, whichever is longer.
double FloorMicroseconds(const DeviceStepFigures& figures, const DeviceRates& rates);

// Tables with what their columns mean.
std::string DeviceStepTables(const std::vector<DeviceStepLine>& lines, const DeviceRates& rates);
Json DeviceStepJson(const DeviceStepLine& line, const DeviceRates& rates);

// "32768 x 4", and what sets the line apart.
std::string LineName(const DeviceStepLine& line);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_STEP_STEP_CUDA_REPORT_H_
