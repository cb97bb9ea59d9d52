#include "bench/trace/trace_arguments.h"

#include <numeric>
#include <string>

#include "bench/cli/failure.h"

namespace vattn::bench {

std::vector<int32_t> ResolveLayers(const Trace& trace, const std::vector<int32_t>& given) {
  std::vector<int32_t> layers = given;
  if (layers.empty()) {
    layers.resize(trace.layers);
    std::iota(layers.begin(), layers.end(), 0);
  }
  for (const int32_t layer : layers) {
    if (layer >= 0 && layer < trace.layers) continue;
    throw UsageError("--layers: " + std::to_string(layer) + ", the trace has " +
                     std::to_string(trace.layers) + ", counted from 0");
  }
  return layers;
}

}  // namespace vattn::bench
