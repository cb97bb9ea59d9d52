#include "bench/trace/hostile_trace.h"

#include <cstring>
#include <string>

#include "api/vattn.h"
#include "bench/cli/text.h"
#include "bench/trace/isotropic_inputs.h"

namespace vattn::bench {
namespace {

constexpr float kDrift = .02f;  // of a query towards a calibration query, a step

Tensor MakeTensor(int64_t heads, int64_t tokens, const std::vector<float>& values) {
  Tensor tensor;
  tensor.dtype = VATTN_F32;
  tensor.shape = {1, heads, tokens, static_cast<int64_t>(values.size()) / (heads * tokens)};
  tensor.bytes.resize(values.size() * sizeof(float));
  std::memcpy(tensor.bytes.data(), values.data(), tensor.bytes.size());
  return tensor;
}

// [tokens][heads][dim] to [heads][tokens][dim].
std::vector<float> HeadsFirst(const std::vector<float>& from, int64_t heads, int64_t dim) {
  const int64_t tokens = static_cast<int64_t>(from.size()) / (heads * dim);
  std::vector<float> to;
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t token = 0; token < tokens; ++token) {
      const float* at = &from[(token * heads + head) * dim];
      to.insert(to.end(), at, at + dim);
    }
  }
  return to;
}

Trace IsotropicTrace(const test::IsotropicInput& input, const std::string& name) {
  Trace trace;
  trace.path = name;
  trace.layer_names = {"0"};
  trace.layers = trace.kv_heads = 1;
  trace.q_heads = input.heads;
  trace.tokens = input.tokens;
  trace.prompt_tokens = input.tokens - input.query_tokens;
  trace.steps = input.query_tokens;
  trace.prompt_queries = input.calibration_tokens;
  trace.head_dim_k = trace.head_dim_v = input.dim;
  trace.dtype = VATTN_F32;
  trace.k = MakeTensor(1, input.tokens, input.keys);
  trace.v = MakeTensor(1, input.tokens, input.values);
  trace.q = MakeTensor(input.heads, trace.steps, HeadsFirst(input.queries, input.heads, input.dim));
  trace.q_prompt = MakeTensor(input.heads, trace.prompt_queries,
                              HeadsFirst(input.calibration, input.heads, input.dim));
  return trace;
}

}  // namespace

Trace HostileTrace(const test::HostileInput& input, int64_t steps) {
  const int64_t row = test::kHeads * test::kDim;
  std::vector<float> queries;
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t i = 0; i < row; ++i) {
      const float toward = input.calibration[step % test::kCalibration * row + i];
      queries.push_back(input.query[i] +
                        kDrift * static_cast<float>(step) * (toward - input.query[i]));
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
  trace.q = MakeTensor(test::kHeads, steps, HeadsFirst(queries, test::kHeads, test::kDim));
  trace.q_prompt = MakeTensor(test::kHeads, test::kCalibration,
                              HeadsFirst(input.calibration, test::kHeads, test::kDim));
  return trace;
}

std::vector<Trace> IsotropicTraces(int64_t steps) {
  constexpr int64_t kHeads = 4, kContext = 4096, kCalibrated = 512;
  std::vector<Trace> traces;
  for (const int64_t dim : test::kIsotropicDims) {
    for (const double spread : test::kIsotropicSpreads) {
      traces.push_back(IsotropicTrace(
          test::MakeIsotropic(dim, spread, kHeads, kContext + steps, kCalibrated, steps),
          "isotropic " + std::to_string(dim) + ", deviation " + Number(spread, 3)));
    }
  }
  for (const double mean : {.05, .1}) {
    traces.push_back(
        IsotropicTrace(test::MakeFaintMean(128, mean, kHeads, kContext + steps, kCalibrated, steps),
                       "values of mean " + Number(mean, 3)));
  }
  return traces;
}

std::vector<Trace> HostileTraces(int64_t steps) {
  std::vector<Trace> traces;
  for (const test::HostileInput& input : test::HostileInputs()) {
    traces.push_back(HostileTrace(input, steps));
  }
  return traces;
}

}  // namespace vattn::bench
