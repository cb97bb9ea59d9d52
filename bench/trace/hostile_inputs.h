// Attention inputs made to break a sampled answer: one query against one context,
// with the logits chosen exactly.
#ifndef VATTN_BENCH_TRACE_HOSTILE_INPUTS_H_
#define VATTN_BENCH_TRACE_HOSTILE_INPUTS_H_

#include <cstdint>
#include <string>
#include <vector>

namespace vattn::test {

constexpr int64_t kDim = 64;   // of keys and values
constexpr int64_t kHeads = 2;  // query heads on the one KV head
constexpr int64_t kTokens = 4096;
constexpr int64_t kCalibration = 128;                    // query tokens that calibrate the index
constexpr int64_t kMiddleBegin = 16, kMiddleEnd = 3968;  // with 16 sinks and a window of 128

struct HostileInput {
  std::string name;
  std::vector<float> keys;         // [kTokens][kDim]
  std::vector<float> values;       // [kTokens][kDim]
  std::vector<float> calibration;  // [kCalibration][kHeads][kDim], unscaled
  std::vector<float> query;        // [kHeads][kDim], unscaled
  // Least share of heads to verify under norm = value, in a first step and after some steps.
  double least_first = .95, least_settled = .95;
  // The same with value codes, in both.
  double least_coded = .95;
};

// The same numbers in every run. On these the promise must hold.
std::vector<HostileInput> HostileInputs();

// Exact attention of a query [kHeads][kDim] in float64.
struct Exact {
  std::vector<double> out;          // [kHeads][kDim]
  std::vector<double> value_scale;  // [kHeads] rms|v|, weighted by attention
};
Exact ExactAttention(const HostileInput& input, const std::vector<float>& query);

}  // namespace vattn::test

#endif  // VATTN_BENCH_TRACE_HOSTILE_INPUTS_H_
