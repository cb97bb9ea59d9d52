#include "bench/cli/failure.h"
#include "bench/gather/gather.h"

namespace vattn::bench {

void RequireGatherDevice() {
  throw UsageError("gather: this build has no CUDA backend; configure with -DVATTN_CUDA=ON");
}

GatherFigures MeasureGather(const GatherShape&, Progress*) {
  RequireGatherDevice();
  return {};
}

}  // namespace vattn::bench
