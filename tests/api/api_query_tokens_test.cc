// Several query tokens in a step: each sees the tokens up to its own, and is answered like one of a
// step by itself, under every policy.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "tests/api/attention_model.h"
#include "tests/api/backend.h"

namespace vattn::test {
namespace {

// One layer, slots of different lengths.
class World {
 public:
  World(const Shape& shape, const vattn_options& options, const std::vector<int64_t>& lengths)
      : shape_(shape), runtime_(options), batch_(runtime_, static_cast<int>(lengths.size())) {
    rows_.resize(lengths.size());
    for (size_t s = 0; s < lengths.size(); ++s) {
      sequences_.emplace_back(runtime_, s + 1);
      if (lengths[s] < 0) continue;
      rows_[s].AddGaussian(shape_, engine_, lengths[s]);
      AppendRows(sequences_[s], shape_, 0, rows_[s]);
      batch_.Set(static_cast<int32_t>(s), sequences_[s]);
    }
  }

  Call Step(int tokens, float query_sigma = 2, int32_t out_dtype = VATTN_F32) {
    Call call(shape_, static_cast<int>(rows_.size()), 0, out_dtype, tokens);
    call.Fill(engine_, tokens, query_sigma);
    batch_.BeginStep(tokens);
    batch_.Attend(call.Params());
    for (size_t s = 0; s < rows_.size(); ++s) {
      if (rows_[s].tokens > 0 || sequences_[s].Length(0) > 0)
        call.AddTo(rows_[s], static_cast<int>(s));
    }
    return call;
  }
  void Truncate(size_t s, int64_t tokens) {
    sequences_[s].Truncate(tokens);
    rows_[s].Truncate(shape_, tokens);
  }

  Rows& rows(size_t s) { return rows_[s]; }
  Sequence& sequence(size_t s) { return sequences_[s]; }
  Batch& batch() { return batch_; }
  const Runtime& runtime() const { return runtime_; }

 private:
  const Shape shape_;
  std::mt19937_64 engine_{5};
  const Runtime runtime_;
  std::vector<Sequence> sequences_;
  std::vector<Rows> rows_;
  Batch batch_;
};

struct Case {
  const char* name;
  Shape shape;
};

class DenseQueryTokensTest : public testing::TestWithParam<Case> {};

TEST_P(DenseQueryTokensTest, IsExact) {
  const Shape& shape = GetParam().shape;
  vattn_options options = OptionsFor(shape);
  options.policy = VATTN_POLICY_DENSE;
  for (const int tokens : {2, 5, 16}) {
    if (tokens * shape.q_heads / shape.kv_heads > 128) continue;
    SCOPED_TRACE(tokens);
    World world(shape, options, {700, 0, -1, 3, 253});
    for (int step = 0; step < 2; ++step) {
      const Call call = world.Step(tokens, 1, step == 0 ? VATTN_F32 : shape.dtype);
      for (const int s : {0, 1, 3, 4}) {
        ExpectExact(call, s, world.rows(s));
        EXPECT_EQ(world.sequence(s).Length(0), world.rows(s).tokens);
        for (int t = 0; t < tokens; ++t) {
          EXPECT_EQ(call.verdict[call.At(s, 0, t)], VATTN_VERDICT_EXACT);
          EXPECT_EQ(call.error[call.At(s, shape.q_heads - 1, t)], 0);
        }
      }
      EXPECT_EQ(call.verdict[call.At(2, 0)], -7) << "an empty slot was written";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, DenseQueryTokensTest,
                         testing::Values(Case{"mha_64_f32", {4, 4, 64, 64, false, VATTN_F32}},
                                         Case{"gqa_128_bf16", {12, 2, 128, 128, false, VATTN_BF16}},
                                         Case{"gqa_96_f16", {6, 2, 96, 96, false, VATTN_F16}},
                                         Case{"mqa_256_bf16", {9, 1, 256, 256, false, VATTN_BF16}},
                                         Case{"mla_576_512_bf16",
                                              {16, 1, 576, 512, true, VATTN_BF16}}),
                         [](const auto& info) { return std::string(info.param.name); });

// Windows and sinks of every size, the policy that samples, and a middle that is too short for it.
TEST(QueryTokensTest, ShortSequencesAreExact) {
  const Shape shape;
  for (const int window : {1, 63, 128}) {
    vattn_options options = OptionsFor(shape);
    options.window = window;
    options.exact_below = 256;
    World world(shape, options, {0, 1, 15, 16, 17, window, 16 + window, 300});
    for (int step = 0; step < 3; ++step) {
      const Call call = world.Step(7);
      for (int s = 0; s < 8; ++s) ExpectExact(call, s, world.rows(s));
    }
  }
}

struct Policies {
  const char* name;
  int32_t policy, index, value_bits;
};

class LongQueryTokensTest : public testing::TestWithParam<Policies> {};

// Verified answers keep the promise; those of other policies are held to what they read elsewhere.
TEST_P(LongQueryTokensTest, EveryTokenIsAnswered) {
  const Shape shape{8, 2, 64, 64, false, VATTN_F32};
  vattn_options options = OptionsFor(shape);
  options.policy = GetParam().policy;
  options.index = GetParam().index;
  options.value_bits = GetParam().value_bits;
  options.refresh = 1;
  options.epsilon = .2f;
  options.topk_share = 1;  // of a ranking: everything, which is exact
  World world(shape, options, {6000, 4000});
  int trials = 0, verified = 0, failures = 0;
  for (int step = 0; step < 6; ++step) {
    const int tokens = step % 2 == 0 ? 4 : 7;
    const Call call = world.Step(tokens);
    for (int s = 0; s < 2; ++s) {
      EXPECT_GT(call.middle[s * 2], 3000);
      for (int t = 0; t < tokens; ++t) {
        const int64_t seen = world.rows(s).tokens - tokens + 1 + t;
        for (int h = 0; h < shape.q_heads; ++h, ++trials) {
          const Answer answer = Attend(shape, world.rows(s), seen, h / 4, call.Query(s, h, t));
          const double distance = Distance(answer, call.Out(s, h, t).data());
          const double ref = std::max(answer.norm, double{options.norm_floor} * answer.rms_value);
          const size_t at = call.At(s, h, t);
          if (call.verdict[at] == VATTN_VERDICT_VERIFIED) {
            ++verified;
            failures += distance > options.epsilon * ref;
            EXPECT_GT(call.error[at], 0);
            EXPECT_LE(call.error[at], options.epsilon);
            EXPECT_NEAR(call.lse[at], answer.lse, .5);
          } else {
            EXPECT_LE(distance, Tolerance(answer, VATTN_F32));
          }
        }
      }
    }
  }
  EXPECT_LE(failures, options.delta * trials);
  if (options.policy == VATTN_POLICY_VERIFIED) {
    EXPECT_GE(verified, trials / 2);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Policies, LongQueryTokensTest,
    testing::Values(Policies{"verified", VATTN_POLICY_VERIFIED, VATTN_INDEX_BALANCED, 0},
                    Policies{"value_codes", VATTN_POLICY_VERIFIED, VATTN_INDEX_BALANCED, 4},
                    Policies{"index_exact", VATTN_POLICY_VERIFIED, VATTN_INDEX_EXACT, 0},
                    Policies{"dense", VATTN_POLICY_DENSE, VATTN_INDEX_BALANCED, 0},
                    Policies{"topk", VATTN_POLICY_TOPK, VATTN_INDEX_BALANCED, 0},
                    Policies{"topk_uniform", VATTN_POLICY_TOPK_UNIFORM, VATTN_INDEX_BALANCED, 0}),
    [](const auto& info) { return std::string(info.param.name); });

// What vattn_select lists is what every query token may read, and vattn_attend_selected masks it by
// query token.
TEST(QueryTokensTest, SelectionsAreOfAllTokens) {
  const Shape shape{8, 2, 64, 64, false, VATTN_F32};
  World world(shape, OptionsFor(shape), {5000});
  constexpr int kTokens = 5;
  constexpr int64_t kCapacity = 6000;
  std::vector<int32_t> tokens(2 * kCapacity), counts(2);
  std::vector<float> weights(2 * kCapacity);
  vattn_selection selection = Init<vattn_selection>();
  selection.capacity = kCapacity;
  selection.tokens = tokens.data();
  selection.log_weights = weights.data();
  selection.counts = counts.data();
  const auto call = [&](auto&& attend) {
    std::mt19937_64 engine(3);
    Call one(shape, 1, 0, VATTN_F32, kTokens);
    one.Fill(engine, kTokens, 2);
    world.batch().BeginStep(kTokens);
    attend(one.Params());
    one.AddTo(world.rows(0), 0);
    return one;
  };
  call([&](const vattn_attend_params& p) { world.batch().Select(p, selection); });
  const int64_t length = world.rows(0).tokens;
  for (int h = 0; h < 2; ++h) {
    // Sinks, draw and the window of the first token up to the last one.
    ASSERT_GT(counts[h], 16 + 128 + kTokens);
    EXPECT_EQ(tokens[h * kCapacity + counts[h] - 1], length - 1);
    EXPECT_EQ(tokens[h * kCapacity + counts[h] - 128 - kTokens], length - 128 - kTokens);
  }
  // A list that reaches into the new tokens of the next step.
  for (int h = 0; h < 2; ++h) {
    for (int32_t t = 0; t < kTokens; ++t)
      tokens[h * kCapacity + counts[h]++] = static_cast<int32_t>(length) + t;
  }
  std::fill(weights.begin(), weights.end(), .5f);
  const Call answered =
      call([&](const vattn_attend_params& p) { world.batch().AttendSelected(p, selection); });
  for (int t = 0; t < kTokens; ++t) {
    for (int h = 0; h < shape.q_heads; ++h) {
      const int32_t* list = tokens.data() + h / 4 * kCapacity;
      const int64_t seen = counts[h / 4] - kTokens + 1 + t;
      const Answer answer =
          Attend(shape, world.rows(0), h / 4, answered.Query(0, h, t), list, seen, weights.data());
      EXPECT_LE(Distance(answer, answered.Out(0, h, t).data()), Tolerance(answer, VATTN_F32));
    }
  }
}

// Scores of a caller's own by query token: the exact ones, one row for all heads of a KV head or
// one for each, which is in fp16.
TEST(QueryTokensTest, ExternalScoresAreByToken) {
  const Shape shape{4, 2, 64, 64, false, VATTN_F32};
  vattn_options options = OptionsFor(shape);
  options.index = VATTN_INDEX_EXTERNAL;
  options.refresh = 1;
  constexpr int kTokens = 3;
  World world(shape, options, {3000});
  int verified = 0;
  for (const int32_t heads : {4, 2}) {
    Call call(shape, 1, 0, VATTN_F32, kTokens);
    std::mt19937_64 engine(4);
    call.Fill(engine, kTokens, 2);
    for (int t = 0; t < kTokens && heads == 2; ++t) {
      for (int h = 0; h < 4; ++h)  // heads of a KV head ask the same
        std::copy_n(call.Query(0, h / 2 * 2, t), 64, call.q.begin() + (call.At(0, h, t)) * 64);
    }
    const int64_t stride = 3100, length = world.rows(0).tokens;
    std::vector<float> scores(static_cast<size_t>(kTokens * heads * stride));
    for (int t = 0; t < kTokens; ++t) {
      for (int s = 0; s < heads; ++s) {
        const float* q = call.Query(0, s * 4 / heads, t);
        for (int64_t i = 0; i < length; ++i) {
          const float* k = world.rows(0).k.data() + (i * 2 + s * 2 / heads) * 64;
          float dot = 0;
          for (int c = 0; c < 64; ++c) dot += q[c] * k[c] / 8;
          scores[(t * heads + s) * stride + i] = dot;
        }
      }
    }
    vattn_attend_params params = call.Params();
    params.scores_dtype = heads == 4 ? VATTN_F16 : VATTN_F32;
    const std::vector<std::byte> bytes = ToBytes(params.scores_dtype, scores);
    params.scores = bytes.data();
    params.score_heads = heads;
    params.scores_stride = stride;
    world.batch().BeginStep(kTokens);
    world.batch().Attend(params);
    call.AddTo(world.rows(0), 0);
    for (int t = 0; t < kTokens; ++t) {
      for (int h = 0; h < 4; ++h) {
        const Answer answer =
            Attend(shape, world.rows(0), length + 1 + t, h / 2, call.Query(0, h, t));
        const double ref = std::max(answer.norm, double{options.norm_floor} * answer.rms_value);
        EXPECT_LE(Distance(answer, call.Out(0, h, t).data()), 2 * options.epsilon * ref);
        verified += call.verdict[call.At(0, h, t)] == VATTN_VERDICT_VERIFIED;
      }
    }
  }
  EXPECT_GE(verified, 12);
}

// Speculative decoding: rejected tokens are cut off, and what follows does not know of them.
TEST(QueryTokensTest, RejectedTokensLeaveNothingBehind) {
  const Shape shape{8, 2, 64, 64, false, VATTN_F32};
  vattn_options options = OptionsFor(shape);
  options.policy = VATTN_POLICY_DENSE;
  for (const int64_t length : {250, 2000}) {
    World world(shape, options, {length});
    for (int step = 0; step < 12; ++step) {
      const int tokens = 1 + step * 5 % 16;
      ExpectExact(world.Step(tokens), 0, world.rows(0));
      world.Truncate(0, world.rows(0).tokens - step % (tokens + 1));
    }
  }
}

// The first query token decides where the middle ends, so that all of them see their whole window.
TEST(QueryTokensTest, TheMiddleIsThatOfTheFirstToken) {
  const Shape shape;
  vattn_options options = OptionsFor(shape);
  options.window = 64;
  options.exact_below = 128;
  World many(shape, options, {1000}), one(shape, options, {1000});
  for (int step = 0; step < 8; ++step) {
    const Call first = one.Step(1);
    EXPECT_EQ(many.Step(16).middle, first.middle);
    for (int t = 1; t < 16; ++t) one.Step(1);
  }
}

// The text of the error of a call, or "OK".
template <class F>
std::string TextOf(F&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "OK";
}

void ExpectNamed(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << text;
}

TEST(QueryTokensTest, NumbersThatDoNotFitAreRefused) {
  const Shape shape{64, 1, 32, 32, false, VATTN_F32};
  World world(shape, OptionsFor(shape), {100});
  ExpectNamed(TextOf([&] { world.batch().BeginStep(17); }), "new_tokens is 17");
  ExpectNamed(TextOf([&] { world.batch().BeginStep(-1); }), "new_tokens is -1");
  if (OnCuda()) ExpectNamed(TextOf([&] { world.batch().BeginStep(3); }), "must be at most 2");
  world.batch().BeginStep(2);
  for (const int tokens : {1, 3, 0, 17}) {
    Call call(shape, 1, 0, VATTN_F32, 17);
    std::mt19937_64 engine(1);
    call.Fill(engine, 17);
    vattn_attend_params params = call.Params();
    params.num_tokens = tokens;
    ExpectNamed(TextOf([&] { world.batch().Attend(params); }),
                "num_tokens is " + std::to_string(tokens));
  }
  world.batch().Abandon();
  ExpectExact(world.Step(2), 0, world.rows(0));
}

}  // namespace
}  // namespace vattn::test
