// Keys and queries without any structure, as a first test of a new user has them: torch.randn(...)
// * 4. No direction is worth more bits than another, so codes of a few bytes leave noise in every
// score.
#ifndef VATTN_BENCH_TRACE_ISOTROPIC_INPUTS_H_
#define VATTN_BENCH_TRACE_ISOTROPIC_INPUTS_H_

#include <cstdint>
#include <vector>

namespace vattn::test {

constexpr int64_t kIsotropicDims[] = {64, 128};
// Standard deviations of a query's logits
constexpr double kIsotropicSpreads[] = {1, 3, 5, 10, 20, 30};

struct IsotropicInput {
  int64_t dim = 0, heads = 0, tokens = 0, calibration_tokens = 0, query_tokens = 0;
  std::vector<float> keys = {}, values = {};  // [tokens][dim], independent N(0, 1)
  // [calibration_tokens or query_tokens][heads][dim], unscaled: independent N(0, spread^2), so that
  // logits q.k / sqrt(dim) have the standard deviation spread
  std::vector<float> calibration = {}, queries = {};
};

// The same numbers in every run. One KV head.
IsotropicInput MakeIsotropic(int64_t dim, double spread, int64_t heads, int64_t tokens,
                             int64_t calibration_tokens, int64_t query_tokens);

// Values whose mean is far below their length, under nearly equal weights: the length of an
// estimate of the output is then mostly its error. The queries are N(0, .01).
IsotropicInput MakeFaintMean(int64_t dim, double mean, int64_t heads, int64_t tokens,
                             int64_t calibration_tokens, int64_t query_tokens);

}  // namespace vattn::test

#endif  // VATTN_BENCH_TRACE_ISOTROPIC_INPUTS_H_
