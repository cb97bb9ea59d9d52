#include "bench/cli/failure.h"
#include "bench/step/step_baselines.h"
#include "bench/step/step_cuda.h"

namespace vattn::bench {

void RequireStepDevice() {
  throw UsageError("step: this build has no CUDA backend; configure with -DVATTN_CUDA=ON");
}

DeviceRates MeasureDeviceRates(int) {
  RequireStepDevice();
  return {};
}

DeviceStepFigures MeasureDeviceStep(const DecodeShape&, const DecodeData&, const vattn_options&,
                                    const DeviceStepPlan&, Progress*) {
  RequireStepDevice();
  return {};
}

StepBaselines MeasureStepBaselines(const DecodeShape&, const StepBaselinePlan&, Progress*) {
  RequireStepDevice();
  return {};
}

}  // namespace vattn::bench
