// Inf and NaN in keys, values and queries: no crash, no hang, and no answer that is not finite is
// flagged VERIFIED. A middle row that no draw met counts for nothing, so answers without it stay.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "api/vattn.h"
#include "bench/cli/handles.h"
#include "bench/trace/hostile_inputs.h"
#include "tests/api/backend.h"

namespace vattn::test {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kBroken[] = {kNaN, kInf, -kInf};
// In the sinks, in the middle (first, inside) and in the window.
constexpr int64_t kPlaces[] = {3, kMiddleBegin, 2000, kTokens - 1};

struct Answer {
  std::vector<float> out = std::vector<float>(kHeads * kDim);
  std::vector<int32_t> verdict = std::vector<int32_t>(kHeads);
  int32_t selected = 0;  // of the middle's rows

  bool Finite(int64_t head) const {
    for (int64_t d = 0; d < kDim; ++d) {
      if (!std::isfinite(out[head * kDim + d])) return false;
    }
    return true;
  }
};

class Decoder {
 public:
  Decoder(const HostileInput& input, int32_t on_unverified, int32_t value_bits) {
    vattn_options options;
    vattn_options_init(&options, sizeof(options));
    options.num_q_heads = kHeads;
    options.num_kv_heads = 1;
    options.head_dim_k = options.head_dim_v = kDim;
    options.dtype = VATTN_F32;
    options.value_bits = value_bits;
    options.on_unverified = on_unverified;
    options.host_bytes = bench::HostBytes(options, kTokens, 1);
    runtime_ = bench::CreateRuntime(options);
    sequence_ = bench::CreateSequence(runtime_.get(), 1);
    batch_ = bench::CreateBatch(runtime_.get(), 1);
    vattn_append_params append;
    vattn_append_params_init(&append, sizeof(append));
    append.num_tokens = kTokens;
    append.num_queries = kCalibration;
    append.k = input.keys.data();
    append.v = input.values.data();
    append.q = input.calibration.data();
    bench::Check(vattn_append(sequence_.get(), &append), "vattn_append");
    bench::Check(vattn_batch_set(batch_.get(), 0, sequence_.get()), "vattn_batch_set");
  }

  Answer Step(const std::vector<float>& query) {
    Answer answer;
    vattn_attend_params attend;
    vattn_attend_params_init(&attend, sizeof(attend));
    attend.out_dtype = VATTN_F32;
    attend.q = query.data();
    attend.out = answer.out.data();
    attend.verdict = answer.verdict.data();
    attend.selected = &answer.selected;
    bench::Check(vattn_batch_begin_step(batch_.get(), 0, nullptr), "vattn_batch_begin_step");
    bench::Check(vattn_attend(batch_.get(), &attend, nullptr), "vattn_attend");
    return answer;
  }

 private:
  bench::Runtime runtime_;
  bench::Sequence sequence_;
  bench::Batch batch_;
};

// Gaussian logits and values.
const HostileInput& Plain() {
  static const HostileInput input = HostileInputs()[0];
  return input;
}

// on_unverified, value_bits.
class NonFiniteTest : public testing::TestWithParam<std::tuple<int32_t, int32_t>> {
 protected:
  void SetUp() override {
    vattn_options options;
    vattn_options_init(&options, sizeof(options));
    options.value_bits = std::get<1>(GetParam());
  }
  Decoder MakeDecoder(const HostileInput& input) {
    return Decoder(input, std::get<0>(GetParam()), std::get<1>(GetParam()));
  }
  // Some steps, none of which may be verified and not finite.
  void ExpectHonest(const HostileInput& input, Decoder& decoder) {
    for (int step = 0; step < 3; ++step) {
      const Answer answer = decoder.Step(input.query);
      for (int64_t head = 0; head < kHeads; ++head) {
        EXPECT_TRUE(answer.Finite(head) || answer.verdict[head] != VATTN_VERDICT_VERIFIED)
            << "head " << head;
      }
    }
  }
  const HostileInput& input_ = Plain();
};

TEST_P(NonFiniteTest, Keys) {
  for (const float broken : kBroken) {
    for (const int64_t place : kPlaces) {
      SCOPED_TRACE(testing::Message() << broken << " in key " << place);
      HostileInput input = input_;
      input.keys[place * kDim + 5] = broken;
      Decoder decoder = MakeDecoder(input);
      ExpectHonest(input, decoder);
    }
  }
}

TEST_P(NonFiniteTest, Values) {
  for (const float broken : kBroken) {
    for (const int64_t place : kPlaces) {
      SCOPED_TRACE(testing::Message() << broken << " in value " << place);
      HostileInput input = input_;
      input.values[place * kDim + 5] = broken;
      Decoder decoder = MakeDecoder(input);
      ExpectHonest(input, decoder);
    }
  }
}

TEST_P(NonFiniteTest, ValuesWhoseSquaresOverflow) {
  HostileInput input = input_;
  for (float& v : input.values) v *= 1e25f;
  Decoder decoder = MakeDecoder(input);
  for (int step = 0; step < 3; ++step) {
    for (const int32_t verdict : decoder.Step(input.query).verdict)
      EXPECT_NE(verdict, VATTN_VERDICT_VERIFIED);
  }
}

// Nothing can be judged by a variance that is 0; a head may be verified there only because every
// row was read.
TEST_P(NonFiniteTest, ValuesWhoseSquaresUnderflow) {
  HostileInput input = input_;
  for (float& v : input.values) v *= 1e-25f;
  const Exact exact = ExactAttention(input, input.query);
  Decoder decoder = MakeDecoder(input);
  for (int step = 0; step < 3; ++step) {
    const Answer answer = decoder.Step(input.query);
    for (int64_t h = 0; h < kHeads; ++h) {
      if (answer.verdict[h] != VATTN_VERDICT_VERIFIED) continue;
      EXPECT_EQ(answer.selected, kMiddleEnd - kMiddleBegin);
      for (int64_t d = 0; d < kDim; ++d)
        EXPECT_NEAR(answer.out[h * kDim + d] * 1e25, exact.out[h * kDim + d] * 1e25, 1e-5);
    }
  }
}

// Finite rows whose answer is not, under every policy: a sum that overflows, scores that do, an
// output type that is too small. No head with such an answer is called exact, and its error is
// infinite.
TEST(NotFiniteAnswersTest, AreNeverExact) {
  if (OnCuda()) GTEST_SKIP() << "the device does not look at its answers yet";
  struct Case {
    const char* name;
    float key_scale, value_scale;
    int32_t out_dtype;
    bool broken;
  };
  const HostileInput& plain = Plain();
  for (const Case& c : {Case{"plain", 1, 1, VATTN_F32, false},
                        Case{"values over half a float", 1, 3e38f, VATTN_F32, true},
                        Case{"scores over a float", 1e25f, 1, VATTN_F32, true},
                        Case{"values over f16", 1, 1e9f, VATTN_F16, true},
                        Case{"values over bf16", 1, 1e9f, VATTN_BF16, false}}) {
    for (const int32_t policy : {VATTN_POLICY_DENSE, VATTN_POLICY_VERIFIED, VATTN_POLICY_TOPK}) {
      for (const int64_t tokens : {int64_t{40}, kTokens}) {
        SCOPED_TRACE(testing::Message()
                     << c.name << ", policy " << policy << ", " << tokens << " tokens");
        HostileInput input = plain;
        for (float& k : input.keys) k = std::clamp(k, -2.f, 2.f) * c.key_scale;
        // All of one sign, so that nothing cancels.
        for (float& v : input.values)
          v = c.value_scale == 1 ? v : (.5f + std::abs(v) / 100) * c.value_scale;
        std::vector<float> query = input.query;
        for (float& q : query) q *= c.key_scale;
        vattn_options options;
        vattn_options_init(&options, sizeof(options));
        options.num_q_heads = kHeads;
        options.num_kv_heads = 1;
        options.head_dim_k = options.head_dim_v = kDim;
        options.dtype = VATTN_F32;
        options.policy = policy;
        options.host_bytes = bench::HostBytes(options, kTokens, 1);
        const bench::Runtime runtime = bench::CreateRuntime(options);
        const bench::Sequence sequence = bench::CreateSequence(runtime.get(), 1);
        const bench::Batch batch = bench::CreateBatch(runtime.get(), 1);
        vattn_append_params append;
        vattn_append_params_init(&append, sizeof(append));
        append.num_tokens = tokens;
        append.k = input.keys.data();
        append.v = input.values.data();
        bench::Check(vattn_append(sequence.get(), &append), "vattn_append");
        bench::Check(vattn_batch_set(batch.get(), 0, sequence.get()), "vattn_batch_set");
        std::vector<float> out(kHeads * kDim), error(kHeads);
        std::vector<int32_t> verdict(kHeads);
        vattn_attend_params attend;
        vattn_attend_params_init(&attend, sizeof(attend));
        attend.out_dtype = c.out_dtype;
        attend.q = query.data();
        attend.out = out.data();
        attend.verdict = verdict.data();
        attend.error = error.data();
        bench::Check(vattn_batch_begin_step(batch.get(), 0, nullptr), "vattn_batch_begin_step");
        bench::Check(vattn_attend(batch.get(), &attend, nullptr), "vattn_attend");
        for (int64_t head = 0; head < kHeads; ++head) {
          const bool promised = verdict[head] != VATTN_VERDICT_BEST_EFFORT;
          if (c.broken) {
            EXPECT_FALSE(promised) << "head " << head << ", verdict " << verdict[head];
            EXPECT_TRUE(std::isinf(error[head])) << "head " << head << ", error " << error[head];
          } else if (policy == VATTN_POLICY_DENSE || tokens == 40) {
            EXPECT_EQ(verdict[head], VATTN_VERDICT_EXACT) << "head " << head;
            EXPECT_EQ(error[head], 0) << "head " << head;
          }
        }
      }
    }
  }
}

// A broken query spoils its own head in its own step: neither the other head nor the steps that
// follow.
TEST_P(NonFiniteTest, QueryOfOneHead) {
  const Exact exact = ExactAttention(input_, input_.query);
  for (const float broken : kBroken) {
    SCOPED_TRACE(broken);
    Decoder decoder = MakeDecoder(input_);
    decoder.Step(input_.query);
    std::vector<float> query = input_.query;
    query[7] = broken;
    const Answer answer = decoder.Step(query);
    EXPECT_NE(answer.verdict[0], VATTN_VERDICT_VERIFIED);
    if (answer.verdict[1] != VATTN_VERDICT_BEST_EFFORT) {
      double distance2 = 0;
      for (int64_t d = kDim; d < 2 * kDim; ++d)
        distance2 += std::pow(answer.out[d] - exact.out[d], 2);
      EXPECT_LE(std::sqrt(distance2), exact.value_scale[1] * .2);
    }
    for (int step = 0; step < 3; ++step) {
      const Answer next = decoder.Step(input_.query);
      for (int64_t head = 0; head < kHeads; ++head) {
        EXPECT_TRUE(next.Finite(head));
        // The controller starts anew, which may take a fall-back.
        if (step == 0) continue;
        EXPECT_EQ(next.verdict[head], VATTN_VERDICT_VERIFIED)
            << "head " << head << ", step " << step;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, NonFiniteTest,
                         testing::Combine(testing::Values(VATTN_ON_UNVERIFIED_DENSE,
                                                          VATTN_ON_UNVERIFIED_BEST_EFFORT),
                                          testing::Values(0, 2)));

}  // namespace
}  // namespace vattn::test
