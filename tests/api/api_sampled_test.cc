// Sampled policies and selections through the C API against float64.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "tests/api/attention_model.h"

namespace vattn::test {
namespace {

constexpr int64_t kTokens = 6000;

// One sequence of kTokens whose attention is neither flat nor a spike, and a batch around it.
struct Decoder {
  Decoder(const Shape& with_shape, const vattn_options& options)
      : shape(with_shape), runtime(options) {
    rows.AddGaussian(shape, engine, kTokens);
    AppendRows(sequence, shape, 0, rows);
    batch.Set(0, sequence);
  }
  // The next step, its layer attended.
  Call Step(float query_sigma = 2) {
    Call call(shape, 1, 0);
    call.Fill(engine, 1, query_sigma);
    batch.BeginStep(1);
    batch.Attend(call.Params());
    call.AddTo(rows, 0);
    return call;
  }

  const Shape shape;
  std::mt19937_64 engine{11};
  Rows rows;
  const Runtime runtime;
  Sequence sequence{runtime, 3};
  Batch batch{runtime, 1};
};

double Ref(const vattn_options& options, const Answer& answer) {
  if (options.norm == VATTN_NORM_OUTPUT) return answer.norm;
  return std::max(answer.norm, double{options.norm_floor} * answer.rms_value);
}

struct Promised {
  const char* name;
  Shape shape;
  int32_t norm = VATTN_NORM_VALUE, bound = VATTN_BOUND_SHARP, value_bits = 0,
          index = VATTN_INDEX_BALANCED;
  // Of isotropic logits: where codes are too coarse for it, everything is read
  float query_sigma = 2;
};

class VerifiedTest : public testing::TestWithParam<Promised> {};

TEST_P(VerifiedTest, KeepsItsPromise) {
  const Promised& p = GetParam();
  vattn_options options = OptionsFor(p.shape);
  options.norm = p.norm;
  options.bound = p.bound;
  options.value_bits = p.value_bits;
  options.index = p.index;
  options.refresh = 1;
  options.epsilon = .2f;
  Decoder decoder(p.shape, options);
  int trials = 0, verified = 0, failures = 0;
  double lse_error = 0;
  const int group = p.shape.q_heads / p.shape.kv_heads;
  for (int step = 0; step < std::max(6, 72 / p.shape.q_heads); ++step) {
    const Call call = decoder.Step(p.query_sigma);
    for (int h = 0; h < p.shape.q_heads; ++h, ++trials) {
      const Answer answer = Attend(p.shape, decoder.rows, h / group, call.Query(0, h));
      const double distance = Distance(answer, call.Out(0, h).data());
      EXPECT_GT(call.middle[h / group], 5000);
      if (call.verdict[h] == VATTN_VERDICT_VERIFIED) {
        ++verified;
        failures += distance > options.epsilon * Ref(options, answer);
        EXPECT_LE(call.error[h], options.epsilon);
        EXPECT_GT(call.error[h], 0);
        EXPECT_GE(call.looks[h / group], 1);
        lse_error = std::max(lse_error, std::abs(double{call.lse[h]} - answer.lse));
      } else {
        EXPECT_EQ(call.verdict[h], VATTN_VERDICT_DENSE);
        EXPECT_EQ(call.error[h], 0);
        EXPECT_LE(distance, Tolerance(answer, VATTN_F32));
      }
      EXPECT_LE(call.fetched[h / group], call.selected[h / group]);
      EXPECT_LE(call.selected[h / group], call.middle[h / group]);
    }
  }
  EXPECT_LE(failures, options.delta * trials);
  // Answering everything densely would keep the promise, too.
  EXPECT_GE(verified, trials / 2);
  EXPECT_LE(lse_error, .5);
  RecordProperty("verified", verified);
}

INSTANTIATE_TEST_SUITE_P(
    Promises, VerifiedTest,
    testing::Values(Promised{"gqa_128_bf16",
                             {12, 2, 128, 128, false, VATTN_BF16},
                             VATTN_NORM_VALUE,
                             VATTN_BOUND_SHARP,
                             0,
                             VATTN_INDEX_BALANCED,
                             1},
                    Promised{"mha_80_f16", {2, 2, 80, 80, false, VATTN_F16}},
                    Promised{"mla_576_512",
                             {8, 1, 576, 512, true, VATTN_BF16},
                             VATTN_NORM_VALUE,
                             VATTN_BOUND_SHARP,
                             0,
                             VATTN_INDEX_BALANCED,
                             .5f},
                    Promised{"norm_output", {8, 2, 64, 64, false, VATTN_F32}, VATTN_NORM_OUTPUT},
                    Promised{"bound_safe",
                             {8, 2, 64, 64, false, VATTN_F32},
                             VATTN_NORM_VALUE,
                             VATTN_BOUND_SAFE},
                    Promised{"value_bits_2",
                             {8, 2, 64, 64, false, VATTN_F32},
                             VATTN_NORM_VALUE,
                             VATTN_BOUND_SHARP,
                             2},
                    Promised{"value_bits_4",
                             {8, 2, 96, 96, false, VATTN_BF16},
                             VATTN_NORM_VALUE,
                             VATTN_BOUND_SHARP,
                             4},
                    Promised{"index_exact",
                             {8, 2, 64, 64, false, VATTN_F32},
                             VATTN_NORM_VALUE,
                             VATTN_BOUND_SHARP,
                             0,
                             VATTN_INDEX_EXACT}),
    [](const auto& info) { return std::string(info.param.name); });

// Two kinds of tokens that take turns, with keys in directions of their own. An index made from
// every second token would know one kind, and tokens that it cannot tell are all read.
TEST(CalibrationTest, TextsWithAPeriodAreSeenWhole) {
  const Shape shape = {4, 1, 64, 64, false, VATTN_F32};
  const vattn_options options = OptionsFor(shape);
  std::mt19937_64 engine{12};
  Rows rows;
  rows.AddGaussian(shape, engine, 12000);
  for (int64_t t = 0; t < rows.tokens; ++t) {
    for (int64_t j = 0; j < 64; ++j) {
      if (j / 32 != t % 2) rows.k[t * 64 + j] = 0;
    }
  }
  const Runtime runtime(options);
  Sequence sequence{runtime, 4};
  AppendRows(sequence, shape, 0, rows);
  Batch batch{runtime, 1};
  batch.Set(0, sequence);
  Call call(shape, 1, 0);
  call.Fill(engine, 1, 2);
  batch.BeginStep(1);
  batch.Attend(call.Params());
  EXPECT_LT(call.selected[0], .2 * static_cast<double>(call.middle[0]));
}

struct Ranked {
  const char* name;
  int32_t policy, index, value_bits;
  double most;  // relative error in the mean
};

class RankedTest : public testing::TestWithParam<Ranked> {};

// Policies without a promise: bounded work, sensible answers, flagged best effort.
TEST_P(RankedTest, IsSensible) {
  const Shape shape = {8, 2, 64, 64, false, VATTN_BF16};
  vattn_options options = OptionsFor(shape);
  options.policy = GetParam().policy;
  options.index = GetParam().index;
  options.value_bits = GetParam().value_bits;
  options.topk_share = .2f;
  Decoder decoder(shape, options);
  double sum = 0;
  for (int step = 0; step < 4; ++step) {
    const Call call = decoder.Step();
    for (int h = 0; h < shape.q_heads; ++h) {
      const Answer answer = Attend(shape, decoder.rows, h / 4, call.Query(0, h));
      const double distance = Distance(answer, call.Out(0, h).data());
      ASSERT_TRUE(std::isfinite(distance) && std::isfinite(call.lse[h]));
      EXPECT_EQ(call.verdict[h], VATTN_VERDICT_BEST_EFFORT);
      sum += distance / Ref(options, answer);
      EXPECT_GE(call.selected[h / 4], .19 * static_cast<double>(call.middle[h / 4]));
      EXPECT_LT(call.selected[h / 4], call.middle[h / 4]);
    }
  }
  EXPECT_LT(sum / (4 * shape.q_heads), GetParam().most);
}

INSTANTIATE_TEST_SUITE_P(
    Policies, RankedTest,
    testing::Values(
        Ranked{"topk_balanced", VATTN_POLICY_TOPK, VATTN_INDEX_BALANCED, 0, .5},
        Ranked{"topk_exact", VATTN_POLICY_TOPK, VATTN_INDEX_EXACT, 0, .5},
        Ranked{"topk_uniform_balanced", VATTN_POLICY_TOPK_UNIFORM, VATTN_INDEX_BALANCED, 0, .2},
        Ranked{"topk_uniform_exact", VATTN_POLICY_TOPK_UNIFORM, VATTN_INDEX_EXACT, 0, .2}),
    [](const auto& info) { return std::string(info.param.name); });

vattn_selection SelectionOf(int64_t capacity, std::vector<int32_t>& tokens,
                            std::vector<float>& weights, std::vector<int32_t>& counts) {
  vattn_selection selection = Init<vattn_selection>();
  selection.capacity = capacity;
  selection.tokens = tokens.data();
  selection.log_weights = weights.empty() ? nullptr : weights.data();
  selection.counts = counts.data();
  return selection;
}

// vattn_select, then attention over its list: by this test and by vattn_attend_selected on a fork
// that has the same tokens.
TEST(SelectionTest, SelectThenAttendIsTheEstimate) {
  const Shape shape = {8, 2, 64, 64, false, VATTN_BF16};
  for (const int32_t index : {VATTN_INDEX_BALANCED, VATTN_INDEX_EXACT}) {
    vattn_options options = OptionsFor(shape);
    options.index = index;
    Decoder decoder(shape, options);
    decoder.Step();
    const Sequence fork = decoder.sequence.Fork();
    Batch other(decoder.runtime, 1);
    other.Set(0, fork);
    const int64_t capacity = decoder.rows.tokens + 1;
    std::vector<int32_t> tokens(2 * capacity), counts(2);
    std::vector<float> weights(2 * capacity);
    vattn_selection selection = SelectionOf(capacity, tokens, weights, counts);
    Call call(shape, 1, 0);
    call.Fill(decoder.engine, 1, 2);
    decoder.batch.BeginStep(1);
    decoder.batch.Select(call.Params(), selection);
    call.AddTo(decoder.rows, 0);
    other.BeginStep(1);
    other.AttendSelected(call.Params(), selection);
    for (int h = 0; h < shape.q_heads; ++h) {
      const int g = h / 4;
      const int32_t* list = tokens.data() + g * capacity;
      const float* log_weights = weights.data() + g * capacity;
      ASSERT_TRUE(std::adjacent_find(list, list + counts[g], std::greater_equal<>()) ==
                  list + counts[g]);
      EXPECT_EQ(counts[g], call.selected[g] + decoder.rows.tokens - call.middle[g]);
      for (int i = 0; i < 16; ++i) EXPECT_TRUE(list[i] == i && log_weights[i] == 0);
      EXPECT_EQ(list[counts[g] - 1], decoder.rows.tokens - 1);
      EXPECT_TRUE(
          std::all_of(log_weights, log_weights + counts[g], [](float w) { return w >= 0; }));
      const Answer own =
          Attend(shape, decoder.rows, g, call.Query(0, h), list, counts[g], log_weights);
      EXPECT_LE(Distance(own, call.Out(0, h).data()), Tolerance(own, VATTN_F32));
      EXPECT_NEAR(call.lse[h], own.lse, 1e-4);
      EXPECT_EQ(call.verdict[h], VATTN_VERDICT_BEST_EFFORT);
      const Answer exact = Attend(shape, decoder.rows, g, call.Query(0, h));
      EXPECT_LE(Distance(exact, call.Out(0, h).data()), .3 * Ref(options, exact));
    }
  }
}

// A list of all tokens is dense attention, whatever the policy; a fork answers densely beside it.
TEST(SelectionTest, AllTokensAreDense) {
  for (const int32_t policy :
       {VATTN_POLICY_VERIFIED, VATTN_POLICY_TOPK, VATTN_POLICY_TOPK_UNIFORM, VATTN_POLICY_DENSE}) {
    const Shape shape = {6, 2, 64, 64, false, VATTN_F16};
    vattn_options options = OptionsFor(shape);
    options.policy = policy;
    Decoder decoder(shape, options);
    const int64_t count = decoder.rows.tokens + 1;
    std::vector<int32_t> tokens(2 * count), counts(2, static_cast<int32_t>(count));
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i % count);
    std::vector<float> weights;
    Call call(shape, 1, 0);
    call.Fill(decoder.engine, 1, 2);
    decoder.batch.BeginStep(1);
    decoder.batch.AttendSelected(call.Params(), SelectionOf(count, tokens, weights, counts));
    call.AddTo(decoder.rows, 0);
    ExpectExact(call, 0, decoder.rows);
    EXPECT_EQ(call.selected[0], call.middle[0]);
  }
}

// Lists longer than any draw of the library's own are read whole.
TEST(SelectionTest, LongListsAreReadWhole) {
  const Shape shape = {2, 1, 16, 16, false, VATTN_F32};
  const Runtime runtime(OptionsFor(shape));
  std::mt19937_64 engine(13);
  Rows rows;
  rows.AddGaussian(shape, engine, 70000);
  Sequence sequence(runtime);
  AppendRows(sequence, shape, 0, rows);
  Batch batch(runtime, 1);
  batch.Set(0, sequence);
  for (const bool weighted : {false, true}) {
    const int64_t count = rows.tokens + 1;
    std::vector<int32_t> tokens(count), counts = {static_cast<int32_t>(count)};
    std::iota(tokens.begin(), tokens.end(), 0);
    std::vector<float> weights(weighted ? count : 0, 0.f);
    Call call(shape, 1, 0);
    call.Fill(engine, 1, 2);
    batch.BeginStep(1);
    batch.AttendSelected(call.Params(), SelectionOf(count, tokens, weights, counts));
    call.AddTo(rows, 0);
    ExpectExact(call, 0, rows);
    EXPECT_EQ(call.selected[0], call.middle[0]);
  }
}

// A promise that takes every row it may: the list holds all of the draw.
TEST(SelectionTest, LargeDrawsAreWhole) {
  const Shape shape = {2, 1, 16, 16, false, VATTN_F32};
  vattn_options options = OptionsFor(shape);
  options.epsilon = .002f;
  Decoder decoder(shape, options);
  decoder.rows.AddGaussian(shape, decoder.engine, 80000);
  AppendRows(decoder.sequence, shape, 0, decoder.rows, kTokens);
  const int64_t capacity = decoder.rows.tokens + 1;
  std::vector<int32_t> tokens(capacity), counts(1);
  std::vector<float> weights(capacity);
  vattn_selection selection = SelectionOf(capacity, tokens, weights, counts);
  Call call(shape, 1, 0);
  call.Fill(decoder.engine, 1, 2);
  decoder.batch.BeginStep(1);
  decoder.batch.Select(call.Params(), selection);
  EXPECT_EQ(counts[0], call.selected[0] + capacity - call.middle[0]);
  EXPECT_GT(static_cast<double>(call.selected[0]), .35 * static_cast<double>(call.middle[0]));
}

// Lists that differ by slot and head, with weights, around an empty slot.
TEST(SelectionTest, ListsBelongToTheirSlotAndHead) {
  const Shape shape = {4, 2, 32, 32, false, VATTN_F32};
  vattn_options options = OptionsFor(shape);
  const Runtime runtime(options);
  std::mt19937_64 engine(12);
  Sequence first(runtime), second(runtime);
  Rows rows[3];
  rows[0].AddGaussian(shape, engine, 50);
  rows[2].AddGaussian(shape, engine, 2000);
  AppendRows(first, shape, 0, rows[0]);
  AppendRows(second, shape, 0, rows[2]);
  Batch batch(runtime, 3);
  batch.Set(0, first);
  batch.Set(2, second);
  constexpr int kCapacity = 40;
  std::vector<int32_t> tokens(6 * kCapacity, -1), counts(6, -1);
  std::vector<float> weights = Gaussian(engine, VATTN_F32, 6 * kCapacity, 1);
  for (int slot : {0, 2}) {
    for (int g = 0; g < 2; ++g) {
      const int64_t stride = rows[slot].tokens / (kCapacity + g);
      counts[slot * 2 + g] = 30 + g + slot;
      for (int i = 0; i < counts[slot * 2 + g]; ++i) {
        tokens[(slot * 2 + g) * kCapacity + i] = static_cast<int32_t>(g + i * stride);
      }
    }
  }
  Call call(shape, 3, 0);
  call.Fill(engine, 1);
  batch.BeginStep(1);
  batch.AttendSelected(call.Params(), SelectionOf(kCapacity, tokens, weights, counts));
  for (int slot : {0, 2}) {
    call.AddTo(rows[slot], slot);
    for (int h = 0; h < 4; ++h) {
      const int at = slot * 2 + h / 2;
      const Answer own =
          Attend(shape, rows[slot], h / 2, call.Query(slot, h), tokens.data() + at * kCapacity,
                 counts[at], weights.data() + at * kCapacity);
      EXPECT_LE(Distance(own, call.Out(slot, h).data()), Tolerance(own, VATTN_F32))
          << slot << " " << h;
      EXPECT_NEAR(call.lse[slot * 4 + h], own.lse, 1e-4);
    }
  }
}

}  // namespace
}  // namespace vattn::test
