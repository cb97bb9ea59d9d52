// Prompts that are answered as they are added (vattn_prefill), against float64.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "tests/api/attention_model.h"
#include "tests/api/backend.h"

namespace vattn::test {
namespace {

// A prompt of one layer with its queries, and what was answered.
struct Prompt {
  Prompt(const Shape& prompt_shape, int64_t tokens, int32_t dtype = VATTN_F32)
      : shape(prompt_shape), out_dtype(dtype) {
    std::mt19937_64 engine(9);
    rows.AddGaussian(shape, engine, tokens);
    q = Gaussian(engine, shape.dtype, tokens * shape.q_heads * shape.dim_k, 2);
    k_bytes = ToBytes(shape.dtype, rows.k);
    v_bytes = ToBytes(shape.dtype, rows.v);
    q_bytes = ToBytes(shape.dtype, q);
    out.assign(static_cast<size_t>(tokens) * shape.q_heads * shape.dim_v * Element(out_dtype),
               std::byte{0x7b});
    lse.assign(static_cast<size_t>(tokens) * shape.q_heads, -7);
  }
  static size_t Element(int32_t dtype) { return dtype == VATTN_F32 ? 4 : 2; }

  // Tokens [begin, end) of the prompt, as one chunk.
  vattn_prefill_params Params(int64_t begin, int64_t end) {
    const size_t in = Element(shape.dtype);
    vattn_prefill_params p = Init<vattn_prefill_params>();
    p.out_dtype = out_dtype;
    p.num_tokens = end - begin;
    p.q = q_bytes.data() + begin * shape.q_heads * shape.dim_k * in;
    p.k = k_bytes.data() + begin * shape.kv_heads * shape.dim_k * in;
    p.v = shape.shared_kv ? nullptr : v_bytes.data() + begin * shape.kv_heads * shape.dim_v * in;
    p.out = out.data() + begin * shape.q_heads * shape.dim_v * Element(out_dtype);
    p.lse = lse.data() + begin * shape.q_heads;
    return p;
  }
  std::vector<float> Out(int64_t token, int head) const {
    const size_t bytes = shape.dim_v * Element(out_dtype);
    const std::byte* at = out.data() + (token * shape.q_heads + head) * bytes;
    return ToFloats(out_dtype, {at, at + bytes});
  }
  // On CUDA weights are rounded to the type of rows before they meet the values.
  double Rounded(const Answer& answer) const {
    if (!OnCuda()) return 0;
    return answer.rms_value * (shape.dtype == VATTN_F16 ? 1. / 2048 : 1. / 256);
  }
  // Every `stride`-th token, and the last one.
  void ExpectExact(int64_t stride) const {
    const int group = shape.q_heads / shape.kv_heads;
    for (int64_t t = 0; t < rows.tokens;
         t = t + 1 == rows.tokens ? t + 1 : std::min(t + stride, rows.tokens - 1)) {
      for (int h = 0; h < shape.q_heads; ++h) {
        const float* query = q.data() + (t * shape.q_heads + h) * shape.dim_k;
        const Answer answer = Attend(shape, rows, t + 1, h / group, query);
        ASSERT_LE(Distance(answer, Out(t, h).data()),
                  Tolerance(answer, out_dtype) + Rounded(answer))
            << "token " << t << " head " << h;
        ASSERT_NEAR(lse[t * shape.q_heads + h], answer.lse, 5e-5 * (1 + std::abs(answer.lse)));
      }
    }
  }

  const Shape shape;
  const int32_t out_dtype;
  Rows rows;
  std::vector<float> q, lse;
  std::vector<std::byte> k_bytes, v_bytes, q_bytes, out;
};

struct Case {
  const char* name;
  Shape shape;
};

// What CUDA does not serve.
bool Refused(const Shape& shape) {
  return OnCuda() && (shape.dtype == VATTN_F32 || std::max(shape.dim_k, shape.dim_v) > 256);
}

class PrefillTest : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    if (Refused(GetParam().shape)) GTEST_SKIP() << "not a shape of the CUDA backend";
  }
};

TEST_P(PrefillTest, EveryTokenIsExact) {
  const Shape& shape = GetParam().shape;
  const Runtime runtime(OptionsFor(shape));
  for (const int32_t out_dtype : {static_cast<int32_t>(VATTN_F32), shape.dtype}) {
    Prompt prompt(shape, 700, out_dtype);
    Sequence sequence(runtime);
    sequence.Prefill(prompt.Params(0, 700));
    EXPECT_EQ(sequence.Length(0), 700);
    prompt.ExpectExact(13);
  }
}

TEST_P(PrefillTest, SoItIsInChunks) {
  const Shape& shape = GetParam().shape;
  const Runtime runtime(OptionsFor(shape));
  for (const int64_t chunk : {1, 100, 256, 511}) {
    if (chunk == 1 && shape.dim_k > 128) continue;  // every key for every token: long
    SCOPED_TRACE(chunk);
    Prompt prompt(shape, 600);
    Sequence sequence(runtime);
    for (int64_t t = 0; t < 600; t += chunk)
      sequence.Prefill(prompt.Params(t, std::min<int64_t>(600, t + chunk)));
    prompt.ExpectExact(37);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, PrefillTest,
    testing::Values(Case{"mha_64_f32", {4, 4, 64, 64, false, VATTN_F32}},
                    Case{"gqa_128_bf16", {12, 2, 128, 128, false, VATTN_BF16}},
                    Case{"gqa_96_f16", {6, 2, 96, 96, false, VATTN_F16}},
                    Case{"mqa_256_bf16", {9, 1, 256, 256, false, VATTN_BF16}},
                    Case{"uneven_192_128_f16", {4, 2, 192, 128, false, VATTN_F16}},
                    Case{"mla_576_512_bf16", {16, 1, 576, 512, true, VATTN_BF16}},
                    Case{"group_of_64", {64, 1, 32, 32, false, VATTN_F16}}),
    [](const auto& info) { return std::string(info.param.name); });

// The type of rows where it is not what is tested.
int32_t AnyType() { return OnCuda() ? VATTN_BF16 : VATTN_F32; }

// Over more tokens than a device takes at a time, in blocks that lie apart: many new tokens, few, one.
TEST(LongPrefillTest, ChunksFollowEachOther) {
  const Shape shape = {4, 2, 64, 64, false, AnyType()};
  const Runtime runtime(OptionsFor(shape));
  Prompt prompt(shape, 5200), other(shape, 5200);
  Sequence sequence(runtime), between(runtime);
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 2900},
                                   {2900, 2901},
                                   {2901, 5000},
                                   {5000, 5040},
                                   {5040, 5200}}) {
    sequence.Prefill(prompt.Params(begin, end));
    between.Prefill(other.Params(begin, end));
  }
  prompt.ExpectExact(61);
  other.ExpectExact(997);
}

// What steps do after a prompt does not depend on how it was added: its queries calibrate the index.
TEST(AfterPrefillTest, StepsAreThoseAfterAnAppend) {
  const Shape shape{8, 2, 64, 64, false, AnyType()};
  const Runtime runtime(OptionsFor(shape));
  Prompt prompt(shape, 4000);
  Sequence added(runtime, 1), answered(runtime, 1);
  answered.Prefill(prompt.Params(0, 4000));
  vattn_append_params append = Init<vattn_append_params>();
  append.num_tokens = append.num_queries = 4000;
  append.q = prompt.q_bytes.data(), append.k = prompt.k_bytes.data(),
  append.v = prompt.v_bytes.data();
  added.Append(append);
  std::vector<Call> calls;
  for (const Sequence* sequence : {&added, &answered}) {
    Batch batch(runtime, 1);
    batch.Set(0, *sequence);
    std::mt19937_64 engine(2);
    for (int step = 0; step < 3; ++step) {
      calls.emplace_back(shape, 1, 0);
      calls.back().Fill(engine, 1, 2);
      batch.BeginStep(1);
      batch.Attend(calls.back().Params());
    }
  }
  for (int step = 0; step < 3; ++step) {
    EXPECT_EQ(calls[step].out, calls[step + 3].out);
    EXPECT_EQ(calls[step].verdict, calls[step + 3].verdict);
    EXPECT_EQ(calls[step].selected, calls[step + 3].selected);
  }
}

// A second turn: prompt, answer, prompt again.
TEST(AfterPrefillTest, ATurnSeesTheAnswerBefore) {
  const Shape shape{4, 2, 64, 64, false, VATTN_BF16};
  vattn_options options = OptionsFor(shape);
  options.policy = VATTN_POLICY_DENSE;
  const Runtime runtime(options);
  Prompt prompt(shape, 900);
  Sequence sequence(runtime);
  sequence.Prefill(prompt.Params(0, 500));
  {
    Batch batch(runtime, 1);
    batch.Set(0, sequence);
    for (int64_t t = 500; t < 520; ++t) {  // steps bring the prompt's own tokens
      Call call(shape, 1, 0);
      call.q.assign(prompt.q.begin() + t * 256, prompt.q.begin() + (t + 1) * 256);
      call.k_new.assign(prompt.rows.k.begin() + t * 128, prompt.rows.k.begin() + (t + 1) * 128);
      call.v_new.assign(prompt.rows.v.begin() + t * 128, prompt.rows.v.begin() + (t + 1) * 128);
      batch.BeginStep(1);
      batch.Attend(call.Params());
      const std::vector<std::byte> out = ToBytes(VATTN_F32, [&] {
        std::vector<float> all;
        for (int h = 0; h < 4; ++h) {
          const std::vector<float> one = call.Out(0, h);
          all.insert(all.end(), one.begin(), one.end());
        }
        return all;
      }());
      std::copy(out.begin(), out.end(),
                prompt.out.begin() + t * static_cast<int64_t>(4 * 64 * sizeof(float)));
      std::copy(call.lse.begin(), call.lse.end(), prompt.lse.begin() + t * 4);
    }
  }
  sequence.Prefill(prompt.Params(520, 900));
  prompt.ExpectExact(17);
}

// Heads first, tokens first, and one row for all heads.
TEST(AfterPrefillTest, StridesAreHeard) {
  const Shape shape{4, 2, 64, 64, false, AnyType()};
  const Runtime runtime(OptionsFor(shape));
  constexpr int64_t kTokens = 300;
  Prompt tokens_first(shape, kTokens), heads_first(shape, kTokens);
  const auto swap = [](const std::vector<float>& from, int heads) {
    std::vector<float> to(from.size());
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int h = 0; h < heads; ++h)
        std::copy_n(from.begin() + (t * heads + h) * 64, 64, to.begin() + (h * kTokens + t) * 64);
    }
    return to;
  };
  heads_first.q_bytes = ToBytes(shape.dtype, swap(heads_first.q, 4));
  heads_first.k_bytes = ToBytes(shape.dtype, swap(heads_first.rows.k, 2));
  heads_first.v_bytes = ToBytes(shape.dtype, swap(heads_first.rows.v, 2));
  vattn_prefill_params params = heads_first.Params(0, kTokens);
  params.q_token_stride = params.k_token_stride = params.v_token_stride = 64;
  params.q_head_stride = params.k_head_stride = params.v_head_stride = kTokens * 64;
  Sequence a(runtime), b(runtime);
  a.Prefill(tokens_first.Params(0, kTokens));
  b.Prefill(params);
  EXPECT_EQ(tokens_first.out, heads_first.out);
  tokens_first.ExpectExact(29);
}

TEST(AfterPrefillTest, WhatDoesNotFitIsRefusedByName) {
  const Shape shape{4, 2, 64, 64, false, AnyType()};
  vattn_options options = OptionsFor(shape);
  options.host_bytes = 1 << 20;
  const Runtime runtime(options);
  Prompt prompt(shape, 2000);
  Sequence sequence(runtime);
  sequence.Prefill(prompt.Params(0, 100));
  const auto refused = [&](auto&& change, const char* text) {
    vattn_prefill_params params = prompt.Params(100, 200);
    change(params);
    try {
      sequence.Prefill(params);
      ADD_FAILURE() << "not refused: " << text;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
    }
    EXPECT_EQ(sequence.Length(0), 100);
  };
  refused([](auto& p) { p.num_tokens = 0; }, "num_tokens is 0, must be 1 to 65536");
  refused([](auto& p) { p.num_tokens = 65537; }, "num_tokens is 65537, must be 1 to 65536");
  refused([](auto& p) { p.out_dtype = 3; }, "out_dtype is 3");
  refused([](auto& p) { p.layer = 1; }, "layer is 1");
  refused([](auto& p) { p.q = nullptr; }, "q is NULL");
  refused([](auto& p) { p.k = nullptr; }, "k is NULL");
  refused([](auto& p) { p.v = nullptr; }, "v is NULL");
  refused([](auto& p) { p.out = nullptr; }, "out is NULL");
  refused([](auto& p) { p.q_token_stride = -2; }, "q_token_stride is -2");
  refused([&](auto& p) { p = prompt.Params(100, 2000); }, "host_bytes");
  sequence.Prefill(prompt.Params(100, 200));
  prompt.rows.Truncate(shape, 200);
  prompt.ExpectExact(7);
}

// Longer than a chunk of rows on the device, which is 4,096 tokens.
TEST(AfterPrefillTest, LongPromptsAreExact) {
  const Shape shape{4, 1, 64, 64, false, AnyType()};
  const Runtime runtime(OptionsFor(shape));
  Prompt prompt(shape, 9000);
  Sequence sequence(runtime);
  sequence.Prefill(prompt.Params(0, 4000));
  sequence.Prefill(prompt.Params(4000, 8990));
  sequence.Prefill(prompt.Params(8990, 9000));
  prompt.ExpectExact(331);
}

TEST(CudaPrefillTest, OtherShapesAreRefusedByName) {
  if (!OnCuda()) GTEST_SKIP() << "about the CUDA backend";
  for (const Shape& shape :
       {Shape{4, 4, 64, 64, false, VATTN_F32}, Shape{16, 1, 576, 512, true, VATTN_BF16}}) {
    const Runtime runtime(OptionsFor(shape));
    Prompt prompt(shape, 100);
    Sequence sequence(runtime);
    try {
      sequence.Prefill(prompt.Params(0, 100));
      ADD_FAILURE();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), VATTN_NOT_SUPPORTED) << error.what();
    }
    EXPECT_EQ(sequence.Length(0), 0);
  }
}

}  // namespace
}  // namespace vattn::test
