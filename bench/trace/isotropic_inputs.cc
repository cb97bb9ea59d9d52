#include "bench/trace/isotropic_inputs.h"

#include <cmath>
#include <random>

namespace vattn::test {
namespace {

// Gaussian numbers that are the same with every standard library.
std::vector<float> Gaussian(std::mt19937& engine, int64_t count, double scale) {
  std::vector<float> x(count);
  for (int64_t i = 0; i < count; i += 2) {
    const double radius = scale * std::sqrt(-2 * std::log((engine() + .5) / 4294967296.0));
    const double angle = 2 * M_PI * (engine() / 4294967296.0);
    x[i] = static_cast<float>(radius * std::cos(angle));
    if (i + 1 < count) x[i + 1] = static_cast<float>(radius * std::sin(angle));
  }
  return x;
}

}  // namespace

IsotropicInput MakeIsotropic(int64_t dim, double spread, int64_t heads, int64_t tokens,
                             int64_t calibration_tokens, int64_t query_tokens) {
  std::mt19937 engine(static_cast<uint32_t>(1000 * dim + 10 * spread));
  IsotropicInput input{.dim = dim,
                       .heads = heads,
                       .tokens = tokens,
                       .calibration_tokens = calibration_tokens,
                       .query_tokens = query_tokens};
  input.keys = Gaussian(engine, tokens * dim, 1);
  input.values = Gaussian(engine, tokens * dim, 1);
  input.calibration = Gaussian(engine, calibration_tokens * heads * dim, spread);
  input.queries = Gaussian(engine, query_tokens * heads * dim, spread);
  return input;
}

IsotropicInput MakeFaintMean(int64_t dim, double mean, int64_t heads, int64_t tokens,
                             int64_t calibration_tokens, int64_t query_tokens) {
  IsotropicInput input = MakeIsotropic(dim, .1, heads, tokens, calibration_tokens, query_tokens);
  for (float& value : input.values) value += static_cast<float>(mean);
  return input;
}

}  // namespace vattn::test
