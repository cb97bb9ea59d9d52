#include "bench/step/step_check.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <memory>
#include <vector>

#include "api/vattn.h"
#include "bench/cli/dtype.h"
#include "bench/step/step_prompt.h"

namespace vattn::bench {
namespace {

constexpr int64_t kTokens = 5000;  // two pieces of the check
constexpr HeadPlace kKvHead = {1, 0, 1};
constexpr int64_t kQHead = 3;  // reads it

DecodeShape MakeShape() {
  return {.tokens = kTokens,
          .layers = 1,
          .q_heads = 4,
          .kv_heads = 2,
          .head_dim = 32,
          .batch = 2,
          .dtype = VATTN_BF16};
}

std::vector<double> Rounded(const std::vector<float>& values) {
  std::vector<uint16_t> bits(values.size());
  FromFloat(VATTN_BF16, values.data(), values.size(), bits.data());
  std::vector<float> back(values.size());
  ToFloat(VATTN_BF16, bits.data(), values.size(), back.data());
  return {back.begin(), back.end()};
}

struct Exact {
  std::vector<double> out;
  double length, rms_value;
};

// Attention over tokens 0 .. kTokens + step, all at once.
Exact Attend(const DecodeShape& shape, const DecodeData& data, int64_t step,
             const std::vector<float>& q) {
  const int64_t tokens = shape.tokens + step + 1, dim = shape.head_dim;
  std::vector<float> k(tokens * dim), v(k.size());
  data.Rows(kKvHead, 0, tokens, k.data(), v.data());
  const std::vector<double> keys = Rounded(k), values = Rounded(v);
  std::vector<double> sum(dim);
  double mass = 0, norm2 = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    double score = 0, value2 = 0;
    for (int64_t d = 0; d < dim; ++d) score += q[d] * keys[t * dim + d];
    const double e = std::exp(score / std::sqrt(static_cast<double>(dim)));
    for (int64_t d = 0; d < dim; ++d) {
      sum[d] += e * values[t * dim + d];
      value2 += values[t * dim + d] * values[t * dim + d];
    }
    mass += e;
    norm2 += e * value2;
  }
  double length2 = 0;
  for (double& x : sum) {
    x /= mass;
    length2 += x * x;
  }
  return {sum, std::sqrt(length2), std::sqrt(norm2 / mass)};
}

class StepCheckTest : public testing::Test {
 protected:
  StepCheckTest() : shape_(MakeShape()), data_(MakeSynthetic(shape_, 11)) {}

  // An answer that is off by `distance` from exact attention.
  HeadAnswer Answer(int64_t step, int32_t verdict, double distance) const {
    HeadAnswer answer = {.step = step, .verdict = verdict, .q = {}, .out = {}};
    answer.q.resize(shape_.head_dim);
    const std::vector<LayerInputs> inputs =
        MakeInputs(shape_, *data_, {.query = step, .token = step});
    const size_t at = (kKvHead.sequence * shape_.q_heads + kQHead) * shape_.head_dim * 2;
    ToFloat(VATTN_BF16, &inputs[0].q[at], shape_.head_dim, answer.q.data());
    const Exact exact = Attend(shape_, *data_, step, answer.q);
    answer.out.assign(exact.out.begin(), exact.out.end());
    answer.out[0] += static_cast<float>(distance);
    return answer;
  }

  const DecodeShape shape_;
  const std::unique_ptr<DecodeData> data_;
};

TEST_F(StepCheckTest, SeesTheErrorThatAnAnswerHas) {
  const HeadAnswer early = Answer(0, VATTN_VERDICT_VERIFIED, .25);
  const HeadAnswer late = Answer(7, VATTN_VERDICT_VERIFIED, .5);
  const Exact exact = Attend(shape_, *data_, 7, late.q);
  for (const int32_t norm : {VATTN_NORM_OUTPUT, VATTN_NORM_VALUE}) {
    AnswerErrors errors;
    CheckAnswers(shape_, *data_, kKvHead, {early, late}, norm, .5, 2, &errors);
    ASSERT_EQ(errors.verified.size(), 2u);
    const double ref =
        norm == VATTN_NORM_OUTPUT ? exact.length : std::max(exact.length, .5 * exact.rms_value);
    EXPECT_NEAR(errors.verified[1], .5 / ref, 1e-5);
    EXPECT_NEAR(errors.verified[0] / errors.verified[1], .5, .1);
    EXPECT_TRUE(errors.exact.empty());
    EXPECT_EQ(errors.VerifiedOver(.5 / ref + 1e-3), 0);
    EXPECT_EQ(errors.VerifiedOver(.5 / ref - 1e-3), 1);
  }
}

TEST_F(StepCheckTest, ExactAnswersAreKeptApartAndTheLastTokenCounts) {
  AnswerErrors errors;
  HeadAnswer late = Answer(7, VATTN_VERDICT_EXACT, 0);
  CheckAnswers(shape_, *data_, kKvHead, {Answer(0, VATTN_VERDICT_DENSE, 0), late},
               VATTN_NORM_OUTPUT, .5, 1, &errors);
  ASSERT_EQ(errors.exact.size(), 2u);
  EXPECT_LT(errors.WorstExact(), 1e-6);
  EXPECT_TRUE(errors.verified.empty());
  late.step = 6;  // not the tokens that it was answered over
  CheckAnswers(shape_, *data_, kKvHead, {late}, VATTN_NORM_OUTPUT, .5, 1, &errors);
  EXPECT_GT(errors.WorstExact(), 1e-6);
}

TEST_F(StepCheckTest, NanIsNeverWithinTheBound) {
  AnswerErrors errors;
  HeadAnswer verified = Answer(0, VATTN_VERDICT_VERIFIED, 0), exact = verified;
  verified.out[3] = NAN;
  exact.verdict = VATTN_VERDICT_EXACT;
  exact.out[5] = NAN;
  CheckAnswers(shape_, *data_, kKvHead, {verified, exact, Answer(1, VATTN_VERDICT_EXACT, 0)},
               VATTN_NORM_VALUE, .5, 1, &errors);
  EXPECT_EQ(errors.VerifiedOver(.1), 1);
  EXPECT_TRUE(std::isnan(errors.WorstExact()));
}

TEST(StepInputsTest, ForksHoldTheSameRowsAndAskTheirOwn) {
  const DecodeShape shape = MakeShape();
  const auto data = MakeSynthetic(shape, 11);
  const size_t q = shape.q_heads * shape.head_dim * 2, kv = shape.kv_heads * shape.head_dim * 2;
  const auto part = [](const std::vector<std::byte>& all, size_t i, size_t bytes) {
    return std::vector<std::byte>(all.begin() + i * bytes, all.begin() + (i + 1) * bytes);
  };
  for (const bool shared : {false, true}) {
    const LayerInputs in = MakeInputs(shape, *data, {.query = 2, .token = 3, .shared = shared})[0];
    EXPECT_EQ(part(in.k, 0, kv) == part(in.k, 1, kv), shared);
    EXPECT_EQ(part(in.v, 0, kv) == part(in.v, 1, kv), shared);
    EXPECT_NE(part(in.q, 0, q), part(in.q, 1, q));
  }
}

}  // namespace
}  // namespace vattn::bench
