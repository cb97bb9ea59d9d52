#include "runtime/quantiles.h"

#include <gtest/gtest.h>

#include <cmath>

namespace vattn {
namespace {

TEST(QuantilesTest, NormalKnownValues) {
  EXPECT_NEAR(TwoSidedNormalQuantile(.05), 1.959963984540054, 1e-9);
  EXPECT_NEAR(TwoSidedNormalQuantile(.1), 1.644853626951473, 1e-9);
  EXPECT_NEAR(TwoSidedNormalQuantile(.01), 2.575829303548901, 1e-9);
  EXPECT_NEAR(TwoSidedNormalQuantile(1e-6), 4.891638475699, 1e-9);
  EXPECT_EQ(SafeQuantile(.9), 1);
  EXPECT_EQ(SafeQuantile(.05), TwoSidedNormalQuantile(.05));
}

// sqrt(chi2_r(1 - delta) / r); chi-square quantiles from published tables.
TEST(QuantilesTest, ChiSquareKnownValues) {
  EXPECT_NEAR(SharpQuantile(.05, 1), std::sqrt(3.841459), 1e-6);
  EXPECT_NEAR(SharpQuantile(.05, 2), std::sqrt(5.991465 / 2), 1e-6);
  EXPECT_NEAR(SharpQuantile(.1, 10), std::sqrt(15.987179 / 10), 1e-6);
  EXPECT_NEAR(SharpQuantile(.01, 100), std::sqrt(135.806723 / 100), 1e-6);
  for (const double delta : {.001, .05, .2})
    EXPECT_NEAR(SharpQuantile(delta, 1), TwoSidedNormalQuantile(delta), 1e-9);
}

TEST(QuantilesTest, LooksSpendDelta) {
  for (const double delta : {1e-4, .1, .215}) {
    for (int looks = 1; looks <= kMaxLooks; ++looks) {
      double sum = 0, with_pilot = 0;
      for (int look = 1; look <= looks; ++look) {
        for (const bool pilot : {false, true}) {
          const double now = LookDelta(delta, look, looks, pilot);
          EXPECT_GT(now, 0);
          EXPECT_TRUE(look <= 2 || now < LookDelta(delta, look - 1, looks, pilot));
          (pilot ? with_pilot : sum) += now;
        }
      }
      EXPECT_NEAR(sum, delta, 1e-12) << looks;
      EXPECT_NEAR(with_pilot, delta, 1e-12) << looks;
    }
  }
}

TEST(QuantilesTest, TableHoldsEveryLookAndRank) {
  float table[kMaxLooks][kQuantileBins + 1];
  for (const int looks : {1, 6, kMaxLooks}) {
    FillQuantiles(Bound::kSharp, .1, looks, false, table);
    for (int look = 1; look <= looks; ++look) {
      const double spent = LookDelta(.1, look, looks, false);
      EXPECT_NEAR(table[look - 1][kQuantileBins], SharpQuantile(spent, 1), 1e-6);
      EXPECT_NEAR(table[look - 1][64], SharpQuantile(spent, 4), 1e-6);
      EXPECT_NEAR(table[look - 1][0], SharpQuantile(spent, 1024), 1e-6);
      // A lower rank never lowers z, so that interpolation between bins is safe at either end.
      for (int bin = 1; bin <= kQuantileBins; ++bin)
        EXPECT_GE(table[look - 1][bin], table[look - 1][bin - 1]);
      EXPECT_GT(table[look - 1][0], 1);
    }
    FillQuantiles(Bound::kSafe, .1, looks, true, table);
    for (int look = 1; look <= looks; ++look) {
      for (const int bin : {0, 100, kQuantileBins}) {
        EXPECT_NEAR(table[look - 1][bin], SafeQuantile(LookDelta(.1, look, looks, true)), 1e-6);
      }
    }
  }
}

}  // namespace
}  // namespace vattn
