#include "bench/trace/hostile_trace.h"

#include <cstring>

#include "api/vattn.h"

namespace vattn::bench {
namespace {

constexpr float kDrift = .02f;  // of a query towards a calibration query, a step

Tensor MakeTensor(int64_t heads, int64_t tokens, const std::vector<float>& values) {
  Tensor tensor;
  tensor.dtype = VATTN_F32;
  tensor.shape = {1, heads, tokens, test::kDim};
  tensor.bytes.resize(values.size() * sizeof(float));
  std::memcpy(tensor.bytes.data(), values.data(), tensor.bytes.size());
  return tensor;
}

// [tokens][heads][dim] to [heads][tokens][dim].
std::vector<float> HeadsFirst(const std::vector<float>& from) {
  const int64_t tokens = static_cast<int64_t>(from.size()) / (test::kHeads * test::kDim);
  std::vector<float> to;
  for (int64_t head = 0; head < test::kHeads; ++head) {
    for (int64_t token = 0; token < tokens; ++token) {
      const float* at = &from[(token * test::kHeads + head) * test::kDim];
      to.insert(to.end(), at, at + test::kDim);
    }
  }
  return to;
}

}  // namespace

Trace HostileTrace(const test::HostileInput& input, int64_t steps) {
  const int64_t row = test::kHeads * test::kDim;
  std::vector<float> queries;
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t i = 0; i < row; ++i) {
      const float toward = input.calibration[step % test::kCalibration * row + i];
      queries.push_back(input.query[i] + kDrift * static_cast<float>(step) * (toward - input.query[i]));
    }
  }
  Trace trace;
  trace.path = input.name;
  trace.layer_names = {"0"};
  trace.layers = trace.kv_heads = 1;
  trace.q_heads = test::kHeads;
  trace.tokens = test::kTokens;
  trace.prompt_tokens = test::kTokens - steps;
  trace.steps = steps;
  trace.prompt_queries = test::kCalibration;
  trace.head_dim_k = trace.head_dim_v = test::kDim;
  trace.dtype = VATTN_F32;
  trace.k = MakeTensor(1, test::kTokens, input.keys);
  trace.v = MakeTensor(1, test::kTokens, input.values);
  trace.q = MakeTensor(test::kHeads, steps, HeadsFirst(queries));
  trace.q_prompt = MakeTensor(test::kHeads, test::kCalibration, HeadsFirst(input.calibration));
  return trace;
}

std::vector<Trace> HostileTraces(int64_t steps) {
  std::vector<Trace> traces;
  for (const test::HostileInput& input : test::HostileInputs()) {
    traces.push_back(HostileTrace(input, steps));
  }
  traces.push_back(HostileTrace(test::BlindIndexInput(), steps));
  return traces;
}

}  // namespace vattn::bench
