// Every kind of index through the C API: promise kept, state saved, bad arguments named.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <string>

#include "tests/api/attention_model.h"
#include "tests/api/backend.h"

namespace vattn::test {
namespace {

constexpr int64_t kTokens = 4000;
constexpr Shape kShape{
    .q_heads = 6, .kv_heads = 2, .dim_k = 64, .dim_v = 64, .shared_kv = false, .dtype = VATTN_F32};

vattn_options Options(int32_t index) {
  vattn_options options = OptionsFor(kShape);
  options.index = index;
  options.refresh = 1;
  options.epsilon = .25f;
  return options;
}

// A sequence of kTokens, its batch, and exact scores of the last call's queries with a little
// noise, in `dtype`.
struct Decoder {
  explicit Decoder(const vattn_options& options) : runtime(options) {
    rows.AddGaussian(kShape, engine, kTokens);
    AppendRows(sequence, kShape, 0, rows);
    batch.Set(0, sequence);
  }

  // Scores for the middle by query head, or for whole groups those of their first head.
  void Predict(const Call& call, int heads, int32_t dtype = VATTN_F32) {
    stride = rows.tokens;
    scores.assign(heads * stride, 0);
    std::normal_distribution<float> noise(0, .3f);
    for (int h = 0; h < heads; ++h) {
      const int q_head = h * kShape.q_heads / heads,
                kv_head = q_head * kShape.kv_heads / kShape.q_heads;
      for (int64_t t = 0; t < rows.tokens; ++t) {
        double sum = 0;
        for (int c = 0; c < 64; ++c) {
          sum +=
              double{call.Query(0, q_head)[c]} * rows.k[(t * kShape.kv_heads + kv_head) * 64 + c];
        }
        scores[h * stride + t] = static_cast<float>(sum / 8) + noise(engine);
      }
    }
    score_bytes = ToBytes(dtype, scores);
  }

  std::mt19937_64 engine{5};
  Rows rows;
  const Runtime runtime;
  Sequence sequence{runtime, 3};
  Batch batch{runtime, 1};
  std::vector<float> scores;
  std::vector<std::byte> score_bytes;
  int64_t stride = 0;
};

struct Kind {
  const char* name;
  int32_t index;
  int score_heads = 0;
  int32_t scores_dtype = VATTN_F32;
};

class ApiIndexTest : public testing::TestWithParam<Kind> {};

TEST_P(ApiIndexTest, KeepsThePromise) {
  const vattn_options options = Options(GetParam().index);
  if (const std::string why = NotServed(options); !why.empty()) GTEST_SKIP() << why;
  Decoder decoder(options);
  int trials = 0, verified = 0, failures = 0;
  for (int step = 0; step < 12; ++step) {
    Call call(kShape, 1, 0);
    call.Fill(decoder.engine, 1, 1.5f);
    vattn_attend_params params = call.Params();
    if (GetParam().score_heads > 0) {
      decoder.Predict(call, GetParam().score_heads, GetParam().scores_dtype);
      params.scores = decoder.score_bytes.data();
      params.scores_dtype = GetParam().scores_dtype;
      params.scores_stride = decoder.stride;
      params.score_heads = GetParam().score_heads;
    }
    decoder.batch.BeginStep(1);
    decoder.batch.Attend(params);
    call.AddTo(decoder.rows, 0);
    for (int h = 0; h < kShape.q_heads; ++h, ++trials) {
      const Answer answer = test::Attend(kShape, decoder.rows, h / 3, call.Query(0, h));
      const double distance = Distance(answer, call.Out(0, h).data());
      if (call.verdict[h] == VATTN_VERDICT_VERIFIED) {
        ++verified;
        failures += distance > options.epsilon * std::max(answer.norm, .5 * answer.rms_value);
      } else {
        EXPECT_EQ(call.verdict[h], VATTN_VERDICT_DENSE);
        EXPECT_LE(distance, Tolerance(answer, VATTN_F32));
      }
    }
  }
  EXPECT_LE(failures, .2 * trials);  // delta is .1
  EXPECT_GT(verified, trials / 4);
}

TEST_P(ApiIndexTest, SavedSequencesGoOnBitForBit) {
  if (GetParam().index == VATTN_INDEX_EXTERNAL) GTEST_SKIP() << "has no codes";
  const vattn_options options = Options(GetParam().index);
  if (const std::string why = NotServed(options); !why.empty()) GTEST_SKIP() << why;
  const std::string path =
      std::filesystem::temp_directory_path() / ("vattn_api_index_test." + std::to_string(getpid()));
  Decoder decoder(options);
  Call call(kShape, 1, 0);
  call.Fill(decoder.engine, 1);
  decoder.batch.BeginStep(1);
  decoder.batch.Attend(call.Params());
  decoder.sequence.Save(path);
  Sequence restored = Sequence::Restore(decoder.runtime, path);
  std::filesystem::remove(path);
  Batch batch(decoder.runtime, 1);
  batch.Set(0, restored);
  Call one(kShape, 1, 0), two(kShape, 1, 0);
  one.Fill(decoder.engine, 1);
  two.q = one.q, two.k_new = one.k_new, two.v_new = one.v_new;
  decoder.batch.BeginStep(1);
  decoder.batch.Attend(one.Params());
  batch.BeginStep(1);
  batch.Attend(two.Params());
  EXPECT_EQ(one.out, two.out);
  EXPECT_EQ(one.selected, two.selected);
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, ApiIndexTest,
    testing::Values(Kind{"balanced", VATTN_INDEX_BALANCED}, Kind{"sign", VATTN_INDEX_SIGN},
                    Kind{"hadamard2", VATTN_INDEX_HADAMARD2}, Kind{"page", VATTN_INDEX_PAGE},
                    Kind{"pooled", VATTN_INDEX_POOLED}, Kind{"clusters", VATTN_INDEX_CLUSTERS},
                    Kind{"external", VATTN_INDEX_EXTERNAL, 6},
                    Kind{"external_by_group", VATTN_INDEX_EXTERNAL, 2},
                    Kind{"external_f16", VATTN_INDEX_EXTERNAL, 6, VATTN_F16},
                    Kind{"external_bf16", VATTN_INDEX_EXTERNAL, 2, VATTN_BF16}),
    [](const auto& info) { return std::string(info.param.name); });

// Refused with INVALID_ARGUMENT and this text; the layer can be attended afterwards.
void ExpectRefused(Batch& batch, const vattn_attend_params& params, const std::string& text) {
  try {
    batch.Attend(params);
    ADD_FAILURE() << "taken, not refused: " << text;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), VATTN_INVALID_ARGUMENT);
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
  }
}

TEST(ApiExternalTest, BadScoresAreNamed) {
  if (const std::string why = NotServed(Options(VATTN_INDEX_EXTERNAL)); !why.empty())
    GTEST_SKIP() << why;
  Decoder decoder(Options(VATTN_INDEX_EXTERNAL));
  Call call(kShape, 1, 0);
  call.Fill(decoder.engine, 1);
  decoder.Predict(call, 2);
  decoder.batch.BeginStep(1);
  vattn_attend_params params = call.Params();
  ExpectRefused(decoder.batch, params, "scores is NULL, must be given with index = 7");
  params.scores = decoder.scores.data();
  params.scores_stride = 3839;
  ExpectRefused(decoder.batch, params, "scores_stride is 3839, must be at least 3840");
  params.scores_stride = decoder.stride;
  params.score_heads = 3;
  ExpectRefused(decoder.batch, params,
                "score_heads is 3, must be 0, the 2 KV heads of the layer or the 6 query heads");
  params.score_heads = 0;
  params.scores_dtype = 3;
  ExpectRefused(decoder.batch, params, "scores_dtype is 3, must be 0 to 2");
  params.scores_dtype = VATTN_F32;
  params.policy = VATTN_POLICY_TOPK;
  ExpectRefused(decoder.batch, params,
                "policy is 1, must be 0, the runtime's, or VATTN_POLICY_DENSE (3)");
  params.policy = 0;
  decoder.batch.Attend(params);

  // Every row, for once: nothing has to be predicted.
  Call whole(kShape, 1, 0);
  whole.Fill(decoder.engine, 1);
  vattn_attend_params exact = whole.Params();
  exact.policy = VATTN_POLICY_DENSE;
  decoder.batch.BeginStep(1);
  decoder.batch.Attend(exact);
  EXPECT_EQ(std::count(whole.verdict.begin(), whole.verdict.end(), VATTN_VERDICT_EXACT),
            kShape.q_heads);

  vattn_options dense = Options(VATTN_INDEX_EXTERNAL);
  dense.policy = VATTN_POLICY_DENSE;
  Decoder without(dense);
  without.batch.BeginStep(1);
  without.batch.Attend(call.Params());  // predicts nothing

  Decoder balanced(Options(VATTN_INDEX_BALANCED));
  balanced.batch.BeginStep(1);
  ExpectRefused(balanced.batch, params, "scores is given, must be NULL with index = 0");
}

// Scores that are no numbers, or useless ones, never make a wrong result look verified.
TEST(ApiExternalTest, HostileScoresAreAnsweredDensely) {
  if (const std::string why = NotServed(Options(VATTN_INDEX_EXTERNAL)); !why.empty())
    GTEST_SKIP() << why;
  for (const float bad : {NAN, INFINITY, 3e38f, -INFINITY}) {
    Decoder decoder(Options(VATTN_INDEX_EXTERNAL));
    for (int step = 0; step < 3; ++step) {
      Call call(kShape, 1, 0);
      call.Fill(decoder.engine, 1);
      decoder.Predict(call, 2);
      for (size_t i = 300; i < decoder.scores.size(); i += 601) decoder.scores[i] = bad;
      vattn_attend_params params = call.Params();
      params.scores = decoder.scores.data();
      params.scores_stride = decoder.stride;
      decoder.batch.BeginStep(1);
      decoder.batch.Attend(params);
      call.AddTo(decoder.rows, 0);
      for (int h = 0; h < kShape.q_heads; ++h) {
        const Answer answer = test::Attend(kShape, decoder.rows, h / 3, call.Query(0, h));
        const double distance = Distance(answer, call.Out(0, h).data());
        if (call.verdict[h] == VATTN_VERDICT_VERIFIED) {
          EXPECT_LE(distance, 2 * .25 * std::max(answer.norm, .5 * answer.rms_value)) << bad;
        } else {
          EXPECT_LE(distance, Tolerance(answer, VATTN_F32)) << bad;
        }
      }
    }
  }
}

}  // namespace
}  // namespace vattn::test
