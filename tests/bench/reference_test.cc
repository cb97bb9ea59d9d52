#include "bench/trace/reference.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "api/vattn.h"
#include "bench/cli/dtype.h"

namespace vattn::bench {
namespace {

Tensor MakeTensor(const std::vector<int64_t>& shape, double scale, uint64_t seed) {
  Tensor tensor;
  tensor.dtype = VATTN_F32;
  tensor.shape = shape;
  std::vector<float> values(shape[0] * shape[1] * shape[2] * shape[3]);
  std::mt19937_64 engine(seed);
  std::normal_distribution<float> normal(0, static_cast<float>(scale));
  for (float& value : values) value = normal(engine);
  tensor.bytes.resize(values.size() * sizeof(float));
  std::memcpy(tensor.bytes.data(), values.data(), tensor.bytes.size());
  return tensor;
}

Trace MakeTrace(int64_t layers, int64_t kv_heads, int64_t group, int64_t prompt, int64_t steps,
                int64_t dim_k, int64_t dim_v, double key_scale) {
  Trace trace;
  trace.layers = layers;
  trace.kv_heads = kv_heads;
  trace.q_heads = kv_heads * group;
  trace.tokens = prompt + steps;
  trace.prompt_tokens = prompt;
  trace.steps = steps;
  trace.head_dim_k = dim_k;
  trace.head_dim_v = dim_v;
  trace.dtype = VATTN_F32;
  trace.k = MakeTensor({layers, kv_heads, trace.tokens, dim_k}, key_scale, 1);
  trace.v = MakeTensor({layers, kv_heads, trace.tokens, dim_v}, 1, 2);
  trace.q = MakeTensor({layers, trace.q_heads, steps, dim_k}, 1, 3);
  return trace;
}

std::vector<double> Row(const Tensor& tensor, int64_t layer, int64_t head, int64_t token) {
  std::vector<float> row(tensor.shape[3]);
  ToFloat(tensor.dtype, tensor.Row(layer, head, token), row.size(), row.data());
  return {row.begin(), row.end()};
}

double Dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// The definition, one token after the other, and compared entry by entry.
void ExpectMatchesDefinition(const Trace& trace, const std::vector<int32_t>& layers, int64_t steps,
                             int num_threads) {
  const Reference reference = ComputeReference(trace, layers, steps, num_threads);
  for (size_t i = 0; i < layers.size(); ++i) {
    for (int64_t head = 0; head < trace.q_heads; ++head) {
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t kv_head = head / (trace.q_heads / trace.kv_heads);
        const int64_t tokens = trace.prompt_tokens + step + 1;
        const std::vector<double> q = Row(trace.q, layers[i], head, step);
        std::vector<double> score(tokens);
        double maximum = -INFINITY;
        for (int64_t t = 0; t < tokens; ++t) {
          score[t] = Dot(q, Row(trace.k, layers[i], kv_head, t)) / std::sqrt(trace.head_dim_k);
          maximum = std::max(maximum, score[t]);
        }
        double mass = 0, square = 0;
        std::vector<double> out(trace.head_dim_v);
        for (int64_t t = 0; t < tokens; ++t) {
          const double weight = std::exp(score[t] - maximum);
          const std::vector<double> v = Row(trace.v, layers[i], kv_head, t);
          mass += weight;
          square += weight * Dot(v, v);
          for (size_t d = 0; d < out.size(); ++d) out[d] += weight * v[d];
        }
        for (double& value : out) value /= mass;
        const int64_t index = reference.Index(static_cast<int64_t>(i), head, step);
        ASSERT_NEAR(reference.out_norm[index], std::sqrt(Dot(out, out)), 1e-12);
        ASSERT_NEAR(reference.rms_value[index], std::sqrt(square / mass), 1e-12);
        for (size_t d = 0; d < out.size(); ++d) {
          ASSERT_NEAR(reference.out[index * trace.head_dim_v + d], out[d],
                      1e-7 * std::max(1.0, std::abs(out[d])));
        }
      }
    }
  }
}

TEST(ReferenceTest, MatchesTheDefinition) {
  ExpectMatchesDefinition(MakeTrace(2, 2, 3, 300, 7, 32, 32, 1), {0, 1}, 7, 2);
}

TEST(ReferenceTest, TakesLayersAndStepsAsChosen) {
  ExpectMatchesDefinition(MakeTrace(3, 1, 2, 70, 5, 16, 16, 1), {2, 0}, 3, 1);
}

TEST(ReferenceTest, LengthsAroundATile) {
  for (const int64_t prompt : {1, 2, 62, 63, 64, 65, 127, 128}) {
    ExpectMatchesDefinition(MakeTrace(1, 1, 1, prompt, 2, 16, 16, 1), {0}, 2, 1);
  }
}

TEST(ReferenceTest, MoreRowsThanAChunkOfQueries) {
  ExpectMatchesDefinition(MakeTrace(1, 1, 4, 40, 70, 16, 16, 1), {0}, 70, 3);
}

TEST(ReferenceTest, HeadDimsThatDifferOrFillNoLanes) {
  ExpectMatchesDefinition(MakeTrace(1, 2, 2, 100, 2, 48, 20, 1), {0}, 2, 1);
  ExpectMatchesDefinition(MakeTrace(1, 1, 1, 100, 2, 4, 5, 1), {0}, 2, 1);
}

TEST(ReferenceTest, HugeScoresDoNotOverflow) {
  ExpectMatchesDefinition(MakeTrace(1, 1, 2, 200, 3, 64, 64, 1e4), {0}, 3, 1);
}

TEST(ReferenceTest, RefFollowsTheNorm) {
  Reference reference;
  reference.out_norm = {.2, .9};
  reference.rms_value = {1, 1};
  EXPECT_EQ(reference.Ref(0, VATTN_NORM_OUTPUT, .5), .2);
  EXPECT_EQ(reference.Ref(0, VATTN_NORM_VALUE, .5), .5);
  EXPECT_EQ(reference.Ref(1, VATTN_NORM_VALUE, .5), .9);
}

TEST(ReferenceTest, DistanceIsEuclidean) {
  Reference reference;
  reference.head_dim_v = 2;
  reference.out = {9, 9, 1, 2};
  const float a[] = {4, 6};
  EXPECT_EQ(DistanceToReference(reference, 1, a), 5);
}

}  // namespace
}  // namespace vattn::bench
