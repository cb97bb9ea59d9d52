#include "kernels/cpu/products.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "tests/kernels/group_fixture.h"

namespace vattn::cpu {
namespace {

std::vector<float> Random(int64_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (float& value : x) value = normal(random);
  return x;
}

class ProductsTest : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { UseSimdTarget(GetParam()); }
  void TearDown() override { UseSimdTarget(0); }
};

TEST_P(ProductsTest, OuterProductsAddUp) {
  for (const int dim : {16, 80, 128}) {
    for (const int count : {1, 5, 255, 600}) {
      const std::vector<float> rows = Random(int64_t{count} * dim, 1);
      std::vector<float> sum = Random(dim * dim, 2);
      std::vector<double> expected(sum.begin(), sum.end());
      for (int i = 0; i < count; ++i) {
        for (int a = 0; a < dim; ++a) {
          for (int b = 0; b < dim; ++b)
            expected[a * dim + b] += static_cast<double>(rows[i * dim + a]) * rows[i * dim + b];
        }
      }
      AddOuterProducts(rows.data(), count, dim, sum.data());
      for (int i = 0; i < dim * dim; ++i)
        ASSERT_NEAR(sum[i], expected[i], 1e-5 * (10 + count)) << dim << " " << count;
    }
  }
}

TEST_P(ProductsTest, RowsAreMapped) {
  for (const int dim : {16, 80, 576}) {
    for (const int columns : {16, 48, 256}) {
      const int count = 19;
      const std::vector<float> rows = Random(count * dim, 1), map = Random(dim * columns, 2);
      std::vector<float> out(count * columns, 7.f);
      MapRows(rows.data(), count, dim, map.data(), columns, out.data());
      for (int i = 0; i < count; ++i) {
        for (int j = 0; j < columns; ++j) {
          double expected = 0;
          for (int c = 0; c < dim; ++c)
            expected += static_cast<double>(rows[i * dim + c]) * map[c * columns + j];
          ASSERT_NEAR(out[i * columns + j], expected, 1e-3);
        }
      }
    }
  }
}

TEST_P(ProductsTest, ResidualsFollowTheCode) {
  const CodeLayout code = {.dims8 = 4, .dims4 = 8, .dims2 = 16};
  const int dim = 48, count = 50;
  std::vector<float> step(code.dims());
  for (int j = 0; j < code.dims(); ++j) step[j] = .1f + .02f * static_cast<float>(j);
  const std::vector<float> before = Random(count * dim, 3);
  std::vector<float> x = before;
  SquareResiduals(code, step.data(), count, dim, x.data());
  for (int i = 0; i < count; ++i) {
    for (int j = 0; j < dim; ++j) {
      double r = before[i * dim + j];
      if (j < code.dims()) {
        const double half = j < 4 ? 64 : j < 12 ? 8 : 2;
        r -= (std::min(std::max(std::floor(r / step[j]), -half), half - 1) + .5) * step[j];
      }
      // A coordinate at the edge of two levels may fall into either.
      ASSERT_NEAR(x[i * dim + j], r * r, 1e-4 * (1 + r * r)) << j;
    }
  }
}

TEST_P(ProductsTest, RowsAreWeighed) {
  const int dim = 80, count = 7;
  const std::vector<float> rows = Random(count * dim, 4), weight = Random(dim, 5);
  std::vector<float> out(count);
  WeighRows(rows.data(), count, dim, weight.data(), out.data());
  for (int i = 0; i < count; ++i) {
    double expected = 0;
    for (int j = 0; j < dim; ++j) expected += static_cast<double>(rows[i * dim + j]) * weight[j];
    EXPECT_NEAR(out[i], expected, 1e-4);
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, ProductsTest, testing::ValuesIn(SimdTargets()));

}  // namespace
}  // namespace vattn::cpu
