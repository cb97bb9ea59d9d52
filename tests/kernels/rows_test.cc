#include "kernels/cpu/rows.h"

#include <gtest/gtest.h>
#include <hwy/highway.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <tuple>
#include <vector>

#include "tests/kernels/group_fixture.h"

namespace vattn::cpu {
namespace {

constexpr int kRowDims[] = {16, 64, 80, 96, 128, 192, 256, 512, 576};
constexpr int kCounts[] = {1, 2, 3, 7, 15, 16, 17, 63, 64};

// Rows in any order with gaps, each part at an offset that is no multiple of a vector.
struct Rows {
  Rows(DType dtype, int count, int dim, uint64_t seed)
      : bytes((count * 2) * Stride(dtype, dim)), values(count * dim) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    for (int i = 0; i < count; ++i) {
      uint8_t* at = bytes.data() + (i * 7 % count * 2 + 1) * Stride(dtype, dim);
      if (count % 7 == 0) at = bytes.data() + (2 * i + 1) * Stride(dtype, dim);
      rows.push_back(at);
      for (int c = 0; c < dim; ++c) {
        WriteElement(dtype, at + kOffset, c, normal(random));
        values[i * dim + c] = ReadElement(dtype, at + kOffset, c);
      }
    }
    list = {.rows = rows.data(), .count = count, .offset = kOffset, .dim = dim, .dtype = dtype};
  }

  static constexpr int kOffset = 12;
  static int Stride(DType dtype, int dim) { return kOffset + dim * ElementBytes(dtype) + 4; }

  std::vector<uint8_t> bytes;
  std::vector<const uint8_t*> rows;
  std::vector<double> values;  // [count][dim]
  RowList list;
};

class RowsTest : public testing::TestWithParam<std::tuple<DType, int64_t>> {
 protected:
  void SetUp() override { UseSimdTarget(std::get<1>(GetParam())); }
  void TearDown() override { UseSimdTarget(0); }
  DType dtype() const { return std::get<0>(GetParam()); }
  // Without instructions of the processor, conversions to fp16 cut off, and only normal numbers are
  // right.
  bool normal_only() const { return dtype() == DType::kF16 && std::get<1>(GetParam()) == HWY_SSE4; }
};

std::vector<float> Normals(int count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> out(count);
  for (float& x : out) x = normal(random);
  return out;
}

void ExpectDots(const Rows& rows, const std::vector<float>& queries, int heads, float unit) {
  constexpr int64_t kLd = 70;
  const int count = rows.list.count, dim = rows.list.dim;
  std::vector<float> out(heads * kLd, -7);
  DotRows(rows.list, queries.data(), heads, out.data(), kLd, unit);
  for (int g = 0; g < heads; ++g) {
    for (int i = 0; i < kLd; ++i) {
      if (i >= count) {
        ASSERT_EQ(out[g * kLd + i], -7) << "written past the last row";
        continue;
      }
      double sum = 0, size = 0;
      for (int c = 0; c < dim; ++c) {
        const double term = queries[g * dim + c] * rows.values[i * dim + c];
        sum += term, size += std::abs(term);
      }
      ASSERT_NEAR(out[g * kLd + i], sum, 4e-7 * size)
          << dim << " " << heads << " " << count << " " << i;
    }
  }
}

TEST_P(RowsTest, DotRows) {
  for (const int dim : kRowDims) {
    for (const int heads : kGroupSizes) {
      for (const int count : kCounts) {
        const Rows rows(dtype(), count, dim, dim + count);
        const std::vector<float> queries = Normals(heads * dim, heads);
        ExpectDots(rows, queries, heads, 0);
      }
    }
  }
}

// A unit is a hint: queries that are what it says and others give the same products.
TEST_P(RowsTest, DotRowsWithAUnit) {
  constexpr float kUnit = .0883883476f;
  for (const int dim : kRowDims) {
    for (const int heads : kGroupSizes) {
      for (const int count : kCounts) {
        const Rows rows(dtype(), count, dim, dim + count);
        std::vector<float> queries = Normals(heads * dim, heads);
        ExpectDots(rows, queries, heads, kUnit);
        for (int c = 0; c < heads * dim; ++c) {
          uint16_t narrow;
          WriteElement(DType::kBF16, reinterpret_cast<uint8_t*>(&narrow), 0, queries[c]);
          queries[c] = kUnit * static_cast<float>(ReadElement(DType::kBF16, &narrow, 0));
        }
        ExpectDots(rows, queries, heads, kUnit);
        queries[heads * dim - 1] *= 1 + 0x1p-20f;
        ExpectDots(rows, queries, heads, kUnit);
      }
    }
  }
}

TEST_P(RowsTest, DotRowsWithAUnitKeepsInfAndNan) {
  const Rows rows(dtype(), 16, 128, 3);
  for (const float bad : {INFINITY, -INFINITY, NAN}) {
    std::vector<float> queries(128, 1), out(16);
    queries[5] = bad;
    DotRows(rows.list, queries.data(), 1, out.data(), 16, 1);
    for (int i = 0; i < 16; ++i) EXPECT_FALSE(std::isfinite(out[i])) << i;
  }
}

TEST_P(RowsTest, AddRows) {
  for (const int dim : kRowDims) {
    for (const int heads : kGroupSizes) {
      for (const int count : {0, 1, 5, 16, 64}) {
        const Rows rows(dtype(), count, dim, dim + count);
        constexpr int64_t kLd = 66;
        const std::vector<float> weights = Normals(heads * kLd, heads);
        const int64_t sum_ld = dim + 3;
        const std::vector<float> before = Normals(static_cast<int>(heads * sum_ld), 9);
        std::vector<float> sum = before;
        AddRows(rows.list, weights.data(), kLd, heads, sum.data(), sum_ld);
        for (int g = 0; g < heads; ++g) {
          for (int c = 0; c < sum_ld; ++c) {
            double expected = before[g * sum_ld + c], size = std::abs(expected);
            for (int i = 0; i < count && c < dim; ++i) {
              const double term = weights[g * kLd + i] * rows.values[i * dim + c];
              expected += term, size += std::abs(term);
            }
            ASSERT_NEAR(sum[g * sum_ld + c], expected, 4e-7 * size)
                << dim << " " << heads << " " << count;
          }
        }
      }
    }
  }
}

TEST_P(RowsTest, NormRowsAndLoadRows) {
  for (const int dim : kRowDims) {
    for (const int count : kCounts) {
      const Rows rows(dtype(), count, dim, dim + count);
      std::vector<float> norm2(count + 1, -7), loaded(count * dim + 1, -7);
      NormRows(rows.list, norm2.data());
      LoadRows(rows.list, loaded.data());
      EXPECT_EQ(norm2[count], -7);
      EXPECT_EQ(loaded[count * dim], -7);
      for (int i = 0; i < count; ++i) {
        double sum = 0;
        for (int c = 0; c < dim; ++c) {
          sum += rows.values[i * dim + c] * rows.values[i * dim + c];
          ASSERT_EQ(loaded[i * dim + c], rows.values[i * dim + c]);
        }
        ASSERT_NEAR(norm2[i], sum, 4e-7 * sum);
      }
    }
  }
}

TEST_P(RowsTest, StoreRowRoundsToNearestEven) {
  std::vector<float> values = {0.f,
                               -0.f,
                               1.f,
                               1e-45f,
                               1e-40f,
                               3e-39f,
                               65504.f,
                               65519.f,
                               65520.f,
                               65536.f,
                               1e30f,
                               3.4e38f,
                               std::numeric_limits<float>::max(),
                               INFINITY,
                               -INFINITY,
                               NAN,
                               0x1p-24f,
                               0x1p-25f,
                               0x1.8p-25f,
                               0x1.8p-24f,
                               1 + 0x1p-11f,
                               1 + 0x1.8p-10f,
                               1 + 0x1p-8f,
                               1 + 0x1.8p-7f};
  std::mt19937_64 random(5);
  while (values.size() < 16000 || values.size() % 16 != 0) {
    const uint32_t bits = static_cast<uint32_t>(random());
    float x;
    std::memcpy(&x, &bits, 4);
    values.push_back(x);
    values.push_back(
        std::ldexp(static_cast<float>(bits >> 8), static_cast<int>(random() % 50) - 45));
  }
  std::vector<uint8_t> out(values.size() * 4);
  StoreRow(values.data(), static_cast<int>(values.size()), dtype(), out.data());
  for (size_t i = 0; i < values.size(); ++i) {
    uint8_t one[4];
    WriteElement(dtype(), one, 0, values[i]);
    const double expected = ReadElement(dtype(), one, 0), got = ReadElement(dtype(), out.data(), i);
    if (normal_only() && (std::abs(expected) < 0x1p-14 || !std::isfinite(expected))) continue;
    if (std::isnan(values[i])) {
      EXPECT_TRUE(std::isnan(got));
    } else if (normal_only()) {
      ASSERT_NEAR(got, expected, 0x1p-10 * std::abs(expected)) << values[i];
    } else {
      ASSERT_EQ(got, expected) << values[i];
      ASSERT_EQ(std::signbit(got), std::signbit(expected)) << values[i];
    }
  }
}

TEST_P(RowsTest, LoadRowsReadsEveryNarrowNumber) {
  if (dtype() == DType::kF32) GTEST_SKIP() << "narrow types only";
  std::vector<uint16_t> bits(1 << 16);
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint16_t>(i);
  const uint8_t* row = reinterpret_cast<const uint8_t*>(bits.data());
  std::vector<float> out(bits.size());
  LoadRows({.rows = &row, .count = 1, .offset = 0, .dim = 1 << 16, .dtype = dtype()}, out.data());
  for (size_t i = 0; i < bits.size(); ++i) {
    const double expected = ReadElement(dtype(), bits.data(), i);
    if (normal_only() && !std::isfinite(expected)) continue;
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(out[i])) << i;
    } else {
      ASSERT_EQ(out[i], expected) << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Types, RowsTest,
                         testing::Combine(testing::Values(DType::kF32, DType::kF16, DType::kBF16),
                                          testing::ValuesIn(SimdTargets())));

}  // namespace
}  // namespace vattn::cpu
