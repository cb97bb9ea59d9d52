#include "kernels/cpu/attend.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/cpu/decode.h"
#include "kernels/cpu/softmax.h"
#include "kernels/cpu/workers.h"
#include "tests/kernels/group_fixture.h"

namespace vattn::cpu {
namespace {

std::vector<int64_t> Range(int64_t begin, int64_t end) {
  std::vector<int64_t> tokens(end - begin);
  std::iota(tokens.begin(), tokens.end(), begin);
  return tokens;
}

// Error that fp32 logits of this size may make, relative.
double LogitRounding(const GroupFixture& f) {
  double most = 0;
  for (int64_t t = 0; t < f.shape.tokens; ++t) {
    for (int g = 0; g < f.shape.group_heads; ++g) {
      double size = 0;
      for (int c = 0; c < f.shape.dim_k; ++c) size += std::abs(f.Query(g, c) * f.Key(t, c));
      most = std::max(most, size * f.storage.scale);
    }
  }
  return 2e-6 + 4e-7 * most;
}

void ExpectState(const GroupFixture& f, const float* floats, const Attention& exact,
                 double tolerance) {
  const SoftmaxState state(const_cast<float*>(floats), f.shape.dim_v);
  EXPECT_NEAR(std::log(state.denominator()) + state.max(), exact.lse,
              tolerance + 1e-6 * std::abs(exact.lse));
  const double rms = std::sqrt(exact.value_norm2);
  EXPECT_NEAR(state.value_norm2() / state.denominator(), exact.value_norm2,
              tolerance * exact.value_norm2 + 1e-37);
  for (int j = 0; j < f.shape.dim_v; ++j) {
    ASSERT_NEAR(state.numerator[j] / state.denominator(), exact.out[j], tolerance * rms + 1e-37)
        << j;
  }
}

void ExpectDense(GroupFixture& f, double tolerance) {
  ScaleQueries(f.storage, f.group);
  DecodeAllDense(f.storage, f.group, Verdict::kDense, {});
  for (int g = 0; g < f.shape.group_heads; ++g) {
    const Attention exact = f.AttendAll(g);
    EXPECT_LE(f.OutputError(g, exact), tolerance * std::sqrt(exact.value_norm2) + 1e-37);
    EXPECT_NEAR(f.lse[g], exact.lse, tolerance + 1e-6 * std::abs(exact.lse));
    EXPECT_EQ(f.verdict[g], Verdict::kDense);
    EXPECT_EQ(f.error[g], 0);
  }
}

class AttendTest : public testing::TestWithParam<std::tuple<DType, Dims>> {
 protected:
  GroupShape Shape(int group_heads, int64_t tokens) const {
    const auto& [dtype, dims] = GetParam();
    return {.dtype = dtype,
            .dim_k = dims.k,
            .dim_v = dims.v,
            .shared_kv = dims.shared_kv,
            .group_heads = group_heads,
            .tokens = tokens,
            .middle_begin = 0,
            .middle_end = 0};
  }
};

TEST_P(AttendTest, RangeEqualsFloat64) {
  for (const int heads : kGroupSizes) {
    GroupFixture f(Shape(heads, 100), heads);
    ScaleQueries(f.storage, f.group);
    for (const auto& [begin, end] :
         std::vector<std::pair<int64_t, int64_t>>{{0, 1}, {5, 70}, {93, 100}}) {
      const int64_t floats = StateFloats(f.shape.dim_v);
      std::vector<float> states(heads * floats);
      for (int g = 0; g < heads; ++g)
        ResetState({&states[g * floats], f.shape.dim_v}, f.shape.dim_v);
      AttendRange(f.storage, f.group, begin, end, f.group.scratch.query, heads, states.data(), {});
      for (int g = 0; g < heads; ++g) {
        ExpectState(f, &states[g * floats], f.Attend(g, Range(begin, end)), LogitRounding(f));
      }
    }
  }
}

TEST_P(AttendTest, OutputHasTheTypeAskedFor) {
  GroupFixture f(Shape(3, 200), 7);
  ScaleQueries(f.storage, f.group);
  for (const DType out : {DType::kF32, DType::kF16, DType::kBF16}) {
    f.group.out_dtype = static_cast<int32_t>(out);
    const double unit = out == DType::kF32 ? 0 : out == DType::kF16 ? 0x1p-11 : 0x1p-8;
    ScaleQueries(f.storage, f.group);
    DecodeAllDense(f.storage, f.group, Verdict::kExact, {});
    for (int g = 0; g < 3; ++g) {
      const Attention exact = f.AttendAll(g);
      const std::vector<double> got = f.Output(g);
      for (int j = 0; j < f.shape.dim_v; ++j) {
        ASSERT_NEAR(got[j], exact.out[j],
                    unit * std::abs(exact.out[j]) + 1e-5 * std::sqrt(exact.value_norm2));
      }
    }
  }
}

TEST_P(AttendTest, SelectedRowsWithWeights) {
  GroupFixture f(Shape(6, 400), 8);
  const std::vector<int32_t> list = {399, 0, 17, 256, 255, 3, 100, 101, 102, 17};
  std::vector<int32_t> tokens(list);
  for (int32_t t = 110; t < 200; ++t) tokens.push_back(t);
  const int32_t count = static_cast<int32_t>(tokens.size());
  std::vector<float> weights(tokens.size());
  for (size_t i = 0; i < weights.size(); ++i) weights[i] = .37f * static_cast<float>(i % 11) - 1;
  for (const bool weighted : {false, true}) {
    AttendSelected({.storage = f.storage,
                    .groups = &f.group,
                    .num_groups = 1,
                    .tokens = tokens.data(),
                    .log_weights = weighted ? weights.data() : nullptr,
                    .counts = &count,
                    .capacity = count},
                   {});
    for (int g = 0; g < 6; ++g) {
      const Attention exact = f.Attend(
          g, {tokens.begin(), tokens.end()},
          weighted ? std::vector<double>(weights.begin(), weights.end()) : std::vector<double>());
      EXPECT_LE(f.OutputError(g, exact), LogitRounding(f) * std::sqrt(exact.value_norm2));
      EXPECT_NEAR(f.lse[g], exact.lse, LogitRounding(f));
      EXPECT_EQ(f.verdict[g], Verdict::kBestEffort);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Rows, AttendTest,
                         testing::Combine(testing::Values(DType::kF32, DType::kF16, DType::kBF16),
                                          testing::ValuesIn(kDims)));

// Cut into segments whose states are merged: the same bits whatever the number of threads.
TEST(AttendRangeTest, LongRangesDoNotDependOnThreads) {
  for (const int64_t tokens : {2047, 2048, 2049, 4096, 6001}) {
    GroupFixture f({.group_heads = 3, .tokens = tokens, .middle_begin = 0, .middle_end = 0});
    ExpectDense(f, LogitRounding(f));
    const std::vector<double> alone = f.Output(2);
    for (const int threads : {1, 2}) {
      Workers workers(threads);
      ScaleQueries(f.storage, f.group);
      DecodeAllDense(f.storage, f.group, Verdict::kDense, &workers);
      EXPECT_EQ(f.Output(2), alone);
    }
  }
}

TEST(AttendRangeTest, ChosenHeadsOnly) {
  GroupFixture f({.group_heads = 6, .tokens = 500, .middle_begin = 0, .middle_end = 0});
  ScaleQueries(f.storage, f.group);
  std::fill(f.lse.begin(), f.lse.end(), 123.f);
  const int32_t heads[] = {1, 4, 5};
  DecodeDense(f.storage, f.group, heads, 3, Verdict::kDense, {});
  for (const int g : heads) EXPECT_LE(f.OutputError(g, f.AttendAll(g)), 1e-4);
  for (const int g : {0, 2, 3}) EXPECT_EQ(f.lse[g], 123.f);
}

class ExtremeLogitsTest : public testing::TestWithParam<DType> {};

TEST_P(ExtremeLogitsTest, Huge) {
  for (const double sign : {-1., 1.}) {
    GroupFixture f({.dtype = GetParam(),
                    .group_heads = 2,
                    .tokens = 2500,
                    .middle_begin = 0,
                    .middle_end = 0});
    // Logits sign * 1e4 + small: exact in fp32 because one dimension carries the large part.
    for (int g = 0; g < 2; ++g) f.SetQuery(g, 0, 128);
    for (int64_t t = 0; t < 2500; ++t) f.SetKey(t, 0, static_cast<float>(sign * 640));
    ExpectDense(f, 2e-2);
  }
}

TEST_P(ExtremeLogitsTest, OneTokenHasEverything) {
  GroupFixture f(
      {.dtype = GetParam(), .group_heads = 2, .tokens = 2500, .middle_begin = 0, .middle_end = 0});
  for (int g = 0; g < 2; ++g) f.SetQuery(g, 0, 128);
  f.SetKey(2200, 0, 640);
  ExpectDense(f, 1e-5);
  for (int j = 0; j < f.shape.dim_v; ++j) EXPECT_FLOAT_EQ(f.Output(1)[j], f.Value(2200, j));
}

TEST_P(ExtremeLogitsTest, AllEqual) {
  GroupFixture f(
      {.dtype = GetParam(), .group_heads = 2, .tokens = 2500, .middle_begin = 0, .middle_end = 0});
  for (int64_t t = 0; t < 2500; ++t) {
    for (int c = 0; c < 64; ++c) f.SetKey(t, c, static_cast<float>(f.Key(0, c)));
  }
  ExpectDense(f, 1e-5);
}

TEST_P(ExtremeLogitsTest, Subnormals) {
  GroupFixture f(
      {.dtype = GetParam(), .group_heads = 2, .tokens = 300, .middle_begin = 0, .middle_end = 0});
  const float least = GetParam() == DType::kF16 ? 0x1p-24f : 0x1p-133f;
  for (int64_t t = 0; t < 300; ++t) {
    for (int c = 0; c < 64; ++c) {
      f.SetKey(t, c, least * static_cast<float>(t % 5));
      f.SetValue(t, c, 4 * least * static_cast<float>((t + c) % 3));
    }
  }
  ExpectDense(f, 1e-5);
}

INSTANTIATE_TEST_SUITE_P(Types, ExtremeLogitsTest,
                         testing::Values(DType::kF32, DType::kF16, DType::kBF16));

TEST(AttendRangeTest, OneToken) {
  GroupFixture f({.group_heads = 3, .tokens = 1, .middle_begin = 0, .middle_end = 0});
  ExpectDense(f, 1e-6);
}

}  // namespace
}  // namespace vattn::cpu
