#include "bench/trace/decode_data.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "api/vattn.h"
#include "bench/cli/dtype.h"
#include "bench/cli/failure.h"

namespace vattn::bench {
namespace {

constexpr int64_t kPrompt = 400, kSteps = 3, kDim = 16;

// Elements differ by tensor, layer, head, token and dimension, so that a row tells where it is
// from.
Tensor MakeTensor(double tensor_number, int64_t layers, int64_t heads, int64_t tokens) {
  Tensor tensor;
  tensor.dtype = VATTN_F32;
  tensor.shape = {layers, heads, tokens, kDim};
  std::vector<float> values;
  for (int64_t row = 0; row < layers * heads * tokens; ++row) {
    for (int64_t d = 0; d < kDim; ++d) {
      values.push_back(static_cast<float>(std::sin(tensor_number * 1e6 + row * kDim + d)));
    }
  }
  tensor.bytes.resize(values.size() * sizeof(float));
  std::memcpy(tensor.bytes.data(), values.data(), tensor.bytes.size());
  return tensor;
}

Trace MakeTrace() {
  Trace trace;
  trace.layers = 2;
  trace.kv_heads = 2;
  trace.q_heads = 4;
  trace.tokens = kPrompt + kSteps;
  trace.prompt_tokens = kPrompt;
  trace.steps = kSteps;
  trace.prompt_queries = 5;
  trace.head_dim_k = trace.head_dim_v = kDim;
  trace.dtype = VATTN_F32;
  trace.k = MakeTensor(1, 2, 2, trace.tokens);
  trace.v = MakeTensor(2, 2, 2, trace.tokens);
  trace.q = MakeTensor(3, 2, 4, kSteps);
  trace.q_prompt = MakeTensor(4, 2, 4, 5);
  return trace;
}

DecodeShape MakeShape(int64_t tokens) {
  return {.tokens = tokens,
          .layers = 3,
          .q_heads = 16,
          .kv_heads = 4,
          .head_dim = kDim,
          .batch = 2,
          .dtype = VATTN_F32};
}

std::vector<float> KeyOf(const DecodeData& data, const HeadPlace& place, int64_t token) {
  std::vector<float> k(kDim), v(kDim);
  data.Rows(place, token, 1, k.data(), v.data());
  return k;
}

std::vector<float> Recorded(const Tensor& tensor, int64_t layer, int64_t head, int64_t token) {
  std::vector<float> row(kDim);
  ToFloat(tensor.dtype, tensor.Row(layer, head, token), kDim, row.data());
  return row;
}

double Distance(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum / static_cast<double>(a.size()));
}

TEST(StretchTraceTest, KeepsBothEndsAndTilesTheMiddle) {
  const Trace trace = MakeTrace();
  for (const int64_t tokens : {200, 400, 1500}) {
    const auto data = StretchTrace(trace, MakeShape(tokens), 7);
    const HeadPlace place = {0, 1, 1};
    for (const int64_t token : {0, 15}) {
      EXPECT_EQ(KeyOf(*data, place, token), Recorded(trace.k, 1, 1, token));
    }
    for (const int64_t back : {1, 128}) {
      EXPECT_EQ(KeyOf(*data, place, tokens - back), Recorded(trace.k, 1, 1, kPrompt - back));
    }
    for (const int64_t step : {0, 2, 3}) {  // the fourth step is the first again
      EXPECT_EQ(KeyOf(*data, place, tokens + step),
                Recorded(trace.k, 1, 1, kPrompt + step % kSteps));
    }
    for (const int64_t token : {int64_t{16}, tokens - 129}) {  // values of sin have deviation .71
      const int64_t source = 16 + (token - 16) % (kPrompt - 16 - 128);
      EXPECT_NEAR(Distance(KeyOf(*data, place, token), Recorded(trace.k, 1, 1, source)), .035,
                  .025);
    }
  }
}

TEST(StretchTraceTest, NoTwoRowsOfTheMiddleAreAlike) {
  const Trace trace = MakeTrace();
  const auto data = StretchTrace(trace, MakeShape(1500), 7);
  const int64_t period = kPrompt - 16 - 128;
  const std::vector<float> first = KeyOf(*data, {0, 0, 0}, 20);
  EXPECT_NE(first, KeyOf(*data, {0, 0, 0}, 20 + period));
  EXPECT_NE(first, KeyOf(*data, {0, 0, 2}, 20));  // the same recorded head
  EXPECT_NE(first, KeyOf(*data, {0, 2, 0}, 20));  // the same recorded layer
  EXPECT_EQ(first, KeyOf(*StretchTrace(trace, MakeShape(1500), 7), {0, 0, 0}, 20));
  EXPECT_NE(first, KeyOf(*StretchTrace(trace, MakeShape(1500), 8), {0, 0, 0}, 20));
}

TEST(StretchTraceTest, QueriesReadTheHeadTheyWereRecordedWith) {
  const Trace trace = MakeTrace();
  const auto data = StretchTrace(trace, MakeShape(1500), 7);
  std::vector<float> q(kDim);
  // Query head 13 reads KV head 3 of 4, which stands for recorded head 1, read by 2 and 3.
  data->Query({0, 1, 13}, 4, q.data());
  EXPECT_EQ(q, Recorded(trace.q, 1, 3, 1));
  data->PromptQuery({0, 2, 4}, 4, q.data());  // KV head 1, layer 0
  EXPECT_EQ(q, Recorded(trace.q_prompt, 0, 2, 4));
}

TEST(StretchTraceTest, RefusesWhatDoesNotFit) {
  Trace trace = MakeTrace();
  DecodeShape shape = MakeShape(1500);
  shape.head_dim = 32;
  EXPECT_THROW(StretchTrace(trace, shape, 1), UsageError);
  trace.prompt_tokens = 144;
  EXPECT_THROW(StretchTrace(trace, MakeShape(1500), 1), UsageError);
}

TEST(SyntheticTest, ScoresHaveTheDeviationThatIsPromised) {
  const DecodeShape shape = MakeShape(4000);
  const auto data = MakeSynthetic(shape, 3);
  double sum2 = 0;
  int64_t count = 0;
  std::vector<float> q(kDim);
  for (int64_t step = 0; step < 320; step += 16) {
    data->Query({0, 0, 1}, step, q.data());
    for (int64_t token = 0; token < 500; ++token, ++count) {
      const std::vector<float> k = KeyOf(*data, {0, 0, 0}, token);
      double score = 0;
      for (int64_t d = 0; d < kDim; ++d) score += q[d] * k[d];
      sum2 += score * score / kDim;
    }
  }
  EXPECT_NEAR(std::sqrt(sum2 / static_cast<double>(count)), 2.5, 1);
}

TEST(SyntheticTest, RowsDifferAndFollowFromTheSeed) {
  const auto data = MakeSynthetic(MakeShape(4000), 3);
  const std::vector<float> key = KeyOf(*data, {1, 2, 3}, 9);
  EXPECT_EQ(key, KeyOf(*MakeSynthetic(MakeShape(4000), 3), {1, 2, 3}, 9));
  EXPECT_NE(key, KeyOf(*data, {1, 2, 3}, 10));
  EXPECT_NE(key, KeyOf(*data, {1, 2, 2}, 9));
  EXPECT_NE(key, KeyOf(*data, {0, 2, 3}, 9));
}

}  // namespace
}  // namespace vattn::bench
