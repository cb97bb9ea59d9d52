// Attention through the C API against float64: shapes, types, lengths, policies.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "tests/api/attention_model.h"

namespace vattn::test {
namespace {

// `lengths` tokens by sequence, one layer; one step with `new_tokens`. Lengths of -1: empty slots.
void CheckDense(const Shape& shape, const vattn_options& options,
                const std::vector<int64_t>& lengths, int new_tokens, int32_t out_dtype,
                int64_t chunk) {
  std::mt19937_64 engine(1);
  const int slots = static_cast<int>(lengths.size());
  const Runtime runtime(options);
  std::vector<Sequence> sequences;
  std::vector<Rows> rows(slots);
  Batch batch(runtime, slots);
  for (int s = 0; s < slots; ++s) {
    sequences.emplace_back(runtime);
    if (lengths[s] < 0) continue;
    rows[s].AddGaussian(shape, engine, lengths[s]);
    AppendRows(sequences[s], shape, 0, rows[s], 0, chunk);
    batch.Set(s, sequences[s]);
  }
  Call call(shape, slots, 0, out_dtype);
  call.Fill(engine, new_tokens);
  const std::vector<std::byte> untouched = call.out;
  batch.BeginStep(new_tokens);
  batch.Attend(call.Params());
  for (int s = 0; s < slots; ++s) {
    SCOPED_TRACE("slot " + std::to_string(s) + " of length " + std::to_string(lengths[s]));
    if (lengths[s] < 0) {
      const auto part = static_cast<ptrdiff_t>(call.out.size() / slots);
      EXPECT_TRUE(std::equal(call.out.begin() + s * part, call.out.begin() + (s + 1) * part,
                             untouched.begin()));
      EXPECT_EQ(call.verdict[s * shape.q_heads], -7);
      EXPECT_EQ(call.selected[s * shape.kv_heads], -7);
      continue;
    }
    if (new_tokens == 1) call.AddTo(rows[s], s);
    ExpectExact(call, s, rows[s]);
    EXPECT_EQ(sequences[s].Length(0), rows[s].tokens);
    for (int h = 0; h < shape.q_heads; ++h) {
      EXPECT_EQ(call.verdict[s * shape.q_heads + h], VATTN_VERDICT_EXACT);
      EXPECT_EQ(call.error[s * shape.q_heads + h], 0);
    }
    for (int h = 0; h < shape.kv_heads; ++h) {
      EXPECT_EQ(call.selected[s * shape.kv_heads + h], call.middle[s * shape.kv_heads + h]);
    }
  }
}

struct ShapeCase {
  const char* name;
  Shape shape;
};

class ShapeTest : public testing::TestWithParam<ShapeCase> {};

TEST_P(ShapeTest, DenseIsExact) {
  const Shape& shape = GetParam().shape;
  vattn_options options = OptionsFor(shape);
  options.policy = VATTN_POLICY_DENSE;
  for (const int32_t out_dtype : {VATTN_F32, VATTN_F16, VATTN_BF16}) {
    SCOPED_TRACE("out_dtype " + std::to_string(out_dtype));
    CheckDense(shape, options, {700}, 1, out_dtype, 97);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, ShapeTest,
    testing::Values(ShapeCase{"mha_64_f32", {4, 4, 64, 64, false, VATTN_F32}},
                    ShapeCase{"gqa_128_bf16", {12, 2, 128, 128, false, VATTN_BF16}},
                    ShapeCase{"gqa_96_f16", {6, 2, 96, 96, false, VATTN_F16}},
                    ShapeCase{"gqa_80_bf16", {10, 2, 80, 80, false, VATTN_BF16}},
                    ShapeCase{"gqa_16_f32", {6, 2, 16, 16, false, VATTN_F32}},
                    ShapeCase{"mqa_256_bf16", {9, 1, 256, 256, false, VATTN_BF16}},
                    ShapeCase{"uneven_192_128_f16", {4, 2, 192, 128, false, VATTN_F16}},
                    ShapeCase{"wider_v_64_160_f32", {4, 2, 64, 160, false, VATTN_F32}},
                    ShapeCase{"mla_576_512_bf16", {16, 1, 576, 512, true, VATTN_BF16}},
                    ShapeCase{"mla_576_512_f32", {3, 1, 576, 512, true, VATTN_F32}},
                    ShapeCase{"group_of_64", {64, 1, 32, 32, false, VATTN_F16}}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(ApiAttendTest, AnyChunkGivesTheSameAnswer) {
  const Shape shape;
  vattn_options options = OptionsFor(shape);
  options.policy = VATTN_POLICY_DENSE;
  for (const int64_t chunk : {1, 7, 64, 255, 256, 257, 600})
    CheckDense(shape, options, {600}, 1, VATTN_F32, chunk);
}

// Around every edge of the sets, with the policy that samples: exact wherever the middle is short.
TEST(ApiAttendTest, ShortSequencesAreExact) {
  const Shape shape;
  vattn_options options = OptionsFor(shape);
  options.sinks = 16;
  options.window = 64;
  options.exact_below = 128;
  const int64_t window = options.window,
                edge = options.sinks + options.window + options.exact_below;
  CheckDense(shape, options, {0, 1, -1, 15, 16, 17, window - 1, window, window + 1, -1}, 1,
             VATTN_F32, 100);
  CheckDense(shape, options, {edge - 2, edge - 1, edge, 253, 254}, 1, VATTN_F32, 100);
  CheckDense(shape, options, {1, 2, window, edge - 1, -1}, 0, VATTN_F32, 100);
  CheckDense(shape, options, {-1, -1}, 1, VATTN_F32, 100);
}

// The first length at which the middle is sampled: sinks + exact_below, rounded to 64 tokens, have
// left the window.
TEST(ApiAttendTest, SamplingStartsAtExactBelow) {
  const Shape shape;
  vattn_options options = OptionsFor(shape);
  options.sinks = 16;
  options.window = 64;
  options.exact_below = 128;
  const Runtime runtime(options);
  std::mt19937_64 engine(2);
  Rows rows;
  rows.AddGaussian(shape, engine, 180);
  Sequence sequence(runtime);
  AppendRows(sequence, shape, 0, rows);
  Batch batch(runtime, 1);
  batch.Set(0, sequence);
  for (int64_t tokens = rows.tokens + 1; tokens < 330; ++tokens) {
    Call call(shape, 1, 0);
    call.Fill(engine, 1);
    batch.BeginStep(1);
    batch.Attend(call.Params());
    const int64_t left = (tokens - 64) / 64 * 64 - 16;
    EXPECT_EQ(call.middle[0], left >= 128 ? left : 0) << tokens << " tokens";
    EXPECT_EQ(call.verdict[0] == VATTN_VERDICT_EXACT && call.middle[0] == 0, left < 128)
        << tokens << " tokens";
  }
}

// Rows laid out [head][token], queries too, as engines with [B, H, L, D] tensors have them.
TEST(ApiAttendTest, StridesReadAnyLayout) {
  const Shape shape = {4, 2, 64, 32, false, VATTN_F16};
  vattn_options options = OptionsFor(shape);
  options.policy = VATTN_POLICY_DENSE;
  const Runtime runtime(options);
  std::mt19937_64 engine(3);
  Rows rows;
  rows.AddGaussian(shape, engine, 300);
  const auto by_head = [&](const std::vector<float>& from, int dim) {
    std::vector<float> to(from.size());
    for (int64_t t = 0; t < rows.tokens; ++t) {
      for (int h = 0; h < shape.kv_heads; ++h) {
        for (int d = 0; d < dim; ++d)
          to[(h * rows.tokens + t) * dim + d] = from[(t * shape.kv_heads + h) * dim + d];
      }
    }
    return ToBytes(shape.dtype, to);
  };
  const std::vector<std::byte> k = by_head(rows.k, 64), v = by_head(rows.v, 32);
  vattn_append_params params = Init<vattn_append_params>();
  params.num_tokens = rows.tokens;
  params.k = k.data();
  params.v = v.data();
  params.k_token_stride = 64;
  params.k_head_stride = rows.tokens * 64;
  params.v_token_stride = 32;
  params.v_head_stride = rows.tokens * 32;
  Sequence sequence(runtime);
  sequence.Append(params);
  Batch batch(runtime, 1);
  batch.Set(0, sequence);
  Call call(shape, 1, 0);
  call.Fill(engine, 0);
  batch.BeginStep(0);
  batch.Attend(call.Params());
  ExpectExact(call, 0, rows);
}

// Broadcast rows: one for all tokens, or for all heads. 0 says "contiguous", so that a stride of 0
// has a name of its own.
TEST(ApiAttendTest, StridesOfZeroReadOneRow) {
  const Shape shape = {4, 2, 64, 64, false, VATTN_F32};
  vattn_options options = OptionsFor(shape);
  options.policy = VATTN_POLICY_DENSE;
  const Runtime runtime(options);
  constexpr int64_t kTokens = 300;
  std::mt19937_64 engine(3);
  for (const bool by_head : {false, true}) {
    SCOPED_TRACE(by_head ? "one row for the heads of a token" : "one row for all tokens");
    const int64_t rows_given = by_head ? kTokens : shape.kv_heads;
    const std::vector<float> k = Gaussian(engine, shape.dtype, rows_given * 64, 1);
    const std::vector<float> v = Gaussian(engine, shape.dtype, rows_given * 64, 1);
    Rows rows;
    std::vector<float> all_k, all_v;
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int64_t h = 0; h < shape.kv_heads; ++h) {
        const int64_t row = by_head ? t : h;
        all_k.insert(all_k.end(), k.begin() + row * 64, k.begin() + (row + 1) * 64);
        all_v.insert(all_v.end(), v.begin() + row * 64, v.begin() + (row + 1) * 64);
      }
    }
    rows.Add(shape, all_k, all_v);
    const std::vector<std::byte> k_bytes = ToBytes(shape.dtype, k),
                                 v_bytes = ToBytes(shape.dtype, v);
    const std::vector<std::byte> q_bytes =
        ToBytes(shape.dtype, Gaussian(engine, shape.dtype, 64, 1));
    vattn_append_params params = Init<vattn_append_params>();
    params.num_tokens = kTokens;
    params.num_queries = 50;
    params.k = k_bytes.data();
    params.v = v_bytes.data();
    params.q = q_bytes.data();  // one for all
    params.k_token_stride = params.v_token_stride = by_head ? 64 : VATTN_STRIDE_ZERO;
    params.k_head_stride = params.v_head_stride = by_head ? VATTN_STRIDE_ZERO : 64;
    params.q_token_stride = params.q_head_stride = VATTN_STRIDE_ZERO;
    Sequence sequence(runtime);
    sequence.Append(params);
    Batch batch(runtime, 1);
    batch.Set(0, sequence);
    Call call(shape, 1, 0);
    call.Fill(engine, 0);
    batch.BeginStep(0);
    batch.Attend(call.Params());
    ExpectExact(call, 0, rows);
  }
}

// Queries in either layout calibrate the same index: the answers are equal to the bit.
TEST(ApiAttendTest, QueryStridesCalibrateTheSame) {
  const Shape shape = {4, 2, 64, 64, false, VATTN_F32};
  constexpr int kQueries = 50;
  std::vector<std::vector<float>> outs;
  for (const bool by_head : {false, true}) {
    std::mt19937_64 engine(4);
    const Runtime runtime(OptionsFor(shape));
    Rows rows;
    rows.AddGaussian(shape, engine, 3000);
    const std::vector<float> q = Gaussian(engine, VATTN_F32, kQueries * 4 * 64, 1);
    std::vector<float> moved(q.size());
    for (int i = 0; i < kQueries * 4; ++i) {
      std::copy_n(q.begin() + i * 64, 64, moved.begin() + (i % 4 * kQueries + i / 4) * 64);
    }
    vattn_append_params params = Init<vattn_append_params>();
    params.num_tokens = rows.tokens;
    params.num_queries = kQueries;
    params.k = rows.k.data();
    params.v = rows.v.data();
    params.q = by_head ? moved.data() : q.data();
    params.q_token_stride = by_head ? 64 : 0;
    params.q_head_stride = by_head ? kQueries * 64 : 0;
    Sequence sequence(runtime, 5);
    sequence.Append(params);
    Batch batch(runtime, 1);
    batch.Set(0, sequence);
    Call call(shape, 1, 0);
    call.Fill(engine, 0);
    batch.BeginStep(0);
    batch.Attend(call.Params());
    EXPECT_GT(call.middle[0], 0);
    outs.push_back(call.Out(0, 3));
  }
  EXPECT_EQ(outs[0], outs[1]);
}

// Layers with their own number of KV heads, one left out.
TEST(ApiAttendTest, LayersMayDiffer) {
  const int32_t heads[] = {4, 0, 1, 2};
  Shape shape = {4, 4, 64, 64, false, VATTN_BF16};
  vattn_options options = OptionsFor(shape);
  options.num_layers = 4;
  options.layer_kv_heads = heads;
  options.policy = VATTN_POLICY_DENSE;
  const Runtime runtime(options);
  std::mt19937_64 engine(6);
  Sequence sequence(runtime);
  Batch batch(runtime, 1);
  std::vector<Rows> rows(4);
  for (int layer : {0, 2, 3}) {
    shape.kv_heads = heads[layer];
    rows[layer].AddGaussian(shape, engine, 400);
    AppendRows(sequence, shape, layer, rows[layer]);
  }
  batch.Set(0, sequence);
  for (int step = 0; step < 3; ++step) {
    batch.BeginStep(1);
    for (int layer : {3, 0, 2}) {
      shape.kv_heads = heads[layer];
      Call call(shape, 1, layer);
      call.Fill(engine, 1);
      batch.Attend(call.Params());
      call.AddTo(rows[layer], 0);
      ExpectExact(call, 0, rows[layer]);
    }
  }
  EXPECT_THROW(sequence.Length(1), Error);
}

// softmax_scale other than the default: scores scale with it.
TEST(ApiAttendTest, SoftmaxScaleIsUsed) {
  const Shape shape;
  vattn_options options = OptionsFor(shape);
  options.policy = VATTN_POLICY_DENSE;
  options.softmax_scale = .25f;  // twice the default of 64 dimensions
  const Runtime runtime(options);
  std::mt19937_64 engine(7);
  Rows rows;
  rows.AddGaussian(shape, engine, 300);
  Sequence sequence(runtime);
  AppendRows(sequence, shape, 0, rows);
  Batch batch(runtime, 1);
  batch.Set(0, sequence);
  Call call(shape, 1, 0);
  call.Fill(engine, 0);
  batch.BeginStep(0);
  batch.Attend(call.Params());
  for (float& x : call.q) x *= 2;
  ExpectExact(call, 0, rows);
}

}  // namespace
}  // namespace vattn::test
