#include "kernels/rng.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <set>
#include <tuple>
#include <vector>

#include "kernels/cpu/sample.h"
#include "kernels/cpu/scan.h"
#include "tests/kernels/group_fixture.h"

namespace vattn {
namespace {

constexpr uint32_t kRefreshes[] = {1, 2, 3, 7, 64, 100, 4096};

void ExpectPhilox(std::array<uint32_t, 4> counter, uint32_t key0, uint32_t key1,
                  std::array<uint32_t, 4> expected) {
  const Philox4 r = Philox({{counter[0], counter[1], counter[2], counter[3]}}, key0, key1);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(r.word[i], expected[i]) << i;
}

// philox4x32-10 of the known-answer file of Random123.
TEST(RngTest, PhiloxKnownAnswers) {
  ExpectPhilox({0, 0, 0, 0}, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  ExpectPhilox({~0u, ~0u, ~0u, ~0u}, ~0u, ~0u, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  ExpectPhilox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0xa4093822, 0x299f31d0,
               {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST(RngTest, UnitFloatIsInsideTheUnitInterval) {
  EXPECT_GT(UnitFloat(0), 0);
  EXPECT_LT(UnitFloat(~0u), 1);
  // Symmetric, so the mean is one half and no value is favoured by rounding.
  for (uint32_t bits : {0u, 1u << 9, 1u << 20, 0x7FFFFFFFu, 0x12345678u}) {
    EXPECT_EQ(UnitFloat(bits), 1 - UnitFloat(~bits)) << bits;
  }
}

TEST(RngTest, TokensHaveWordsOfTheirOwn) {
  std::set<std::pair<uint32_t, uint32_t>> seen;
  for (uint32_t token = 0; token < 1 << 16; ++token) {
    EXPECT_TRUE(seen.emplace(TokenCounter(token), token >> 4 & 3).second) << token;
  }
}

TEST(RngTest, EachCounterIsRenewedOnceInRefreshSteps) {
  for (const uint32_t refresh : kRefreshes) {
    for (const uint64_t start : {uint64_t{0}, uint64_t{12345}, (uint64_t{1} << 40) + 7}) {
      for (uint32_t counter = 0; counter < 300; ++counter) {
        uint32_t renewed = 0;
        for (uint64_t step = start; step < start + refresh; ++step) {
          const uint32_t rise = Epoch(counter, step + 1, refresh) - Epoch(counter, step, refresh);
          ASSERT_LE(rise, 1u);
          renewed += rise;
        }
        ASSERT_EQ(renewed, 1u) << "counter " << counter << ", refresh " << refresh;
      }
    }
  }
}

TEST(RngTest, AnEvenShareIsRenewedInEachStep) {
  constexpr uint32_t kCounters = 1 << 16;
  for (const uint32_t refresh : kRefreshes) {
    for (uint64_t step = 0; step < std::min(refresh, 200u); ++step) {
      int renewed = 0;
      for (uint32_t c = 0; c < kCounters; ++c)
        renewed += Epoch(c, step + 1, refresh) != Epoch(c, step, refresh);
      ASSERT_NEAR(renewed, static_cast<double>(kCounters) / refresh, 4)
          << "refresh " << refresh << ", step " << step;
    }
  }
}

TEST(RngTest, KeysDifferBetweenSeedsSequencesLayersAndHeads) {
  std::set<std::tuple<uint32_t, uint32_t, uint32_t>> seen;
  size_t made = 0;
  for (uint64_t seed : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 32}) {
    for (uint64_t sequence = 0; sequence < 40; ++sequence) {
      for (uint64_t high : {uint64_t{0}, uint64_t{1} << 32}) {
        for (uint32_t layer : {0u, 1u, 2u, 63u, 1023u}) {
          for (uint32_t head : {0u, 1u, 2u, 1023u}) {
            const RandomKey key = MakeRandomKey(seed, sequence | high, layer, head);
            seen.emplace(key.key0, key.key1, key.stream);
            ++made;
          }
        }
      }
    }
  }
  EXPECT_EQ(seen.size(), made);
}

double ChiSquare(const std::vector<int64_t>& counts) {
  double total = 0, sum = 0;
  for (const int64_t n : counts) total += static_cast<double>(n);
  const double expected = total / static_cast<double>(counts.size());
  for (const int64_t n : counts) sum += (n - expected) * (n - expected) / expected;
  return sum;
}

// Six standard deviations of a chi-square variable with bins - 1 degrees of freedom.
void ExpectUniform(const std::vector<int64_t>& counts) {
  const double freedom = static_cast<double>(counts.size() - 1);
  EXPECT_NEAR(ChiSquare(counts), freedom, 6 * std::sqrt(2 * freedom));
}

TEST(RngTest, NumbersAreUniformOverTokensStepsAndHeads) {
  std::vector<int64_t> tokens(256), steps(256), heads(256), pairs(256);
  const RandomKey key = MakeRandomKey(3, 4, 5, 6);
  float previous = 0;
  for (uint32_t i = 0; i < 200000; ++i) {
    const float u = TokenUniform(key, i, 11, 64);
    ++tokens[static_cast<int>(u * 256)];
    ++pairs[static_cast<int>(u * 16) * 16 + static_cast<int>(previous * 16)];
    previous = u;
    ++steps[static_cast<int>(TokenUniform(key, 77, i, 1) * 256)];
    ++heads[static_cast<int>(TokenUniform(MakeRandomKey(3, 4, i >> 10, i & 1023), 77, 11, 64) *
                             256)];
  }
  ExpectUniform(tokens);
  ExpectUniform(steps);
  ExpectUniform(heads);
  ExpectUniform(pairs);
}

// u of a token by the definition; redraws have numbers of their own in every step.
float UniformOf(const Group& group, uint32_t token, uint32_t refresh, uint32_t redraw) {
  if (redraw == 0) return TokenUniform(group.key, token, group.step, refresh);
  const Philox4 r =
      Philox({{TokenCounter(token), static_cast<uint32_t>(group.step), group.key.stream, redraw}},
             group.key.key0, group.key.key1);
  return UnitFloat(r.word[token >> 4 & 3]);
}

TEST(RngTest, RedrawsStepsAndStreamsShareNoNumbers) {
  Group a;
  a.key = MakeRandomKey(1, 2, 3, 4);
  Group b = a;
  b.step = 1;
  Group c = a;
  c.key = MakeRandomKey(1, 2, 3, 5);
  const std::vector<std::pair<Group, uint32_t>> sources = {{a, 0}, {a, 1}, {a, 2}, {b, 0},
                                                           {b, 1}, {c, 0}, {c, 1}};
  for (size_t i = 0; i < sources.size(); ++i) {
    for (size_t k = 0; k < i; ++k) {
      int equal = 0;
      for (uint32_t t = 0; t < 4096; ++t) {
        equal += UniformOf(sources[i].first, t, 1, sources[i].second) ==
                 UniformOf(sources[k].first, t, 1, sources[k].second);
      }
      EXPECT_LE(equal, 1) << i << ", " << k;
    }
  }
}

// One head, e^ = 1 for the whole middle: a token is drawn iff u < scale, which shows every bit of
// u.
class DrawnNumbersTest : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { UseSimdTarget(GetParam()); }
  void TearDown() override { UseSimdTarget(0); }
};

TEST_P(DrawnNumbersTest, EqualTheScalarDefinition) {
  GroupFixture f({.group_heads = 1, .tokens = 6000, .middle_begin = 272, .middle_end = 5952});
  Group& group = f.group;
  const float zero = 0;
  for (int64_t b = 0; b < NumBlocks(group); ++b) {
    group.scratch.shift[b] = 0;
    for (int64_t i = 0; i < kBlockTokens; ++i) {
      const int64_t token = (FirstBlock(group) + b) * kBlockTokens + i;
      const bool inside = token >= group.middle_begin && token < group.middle_end;
      group.scratch.estimate[b * kBlockTokens + i] = HalfBits(inside ? 1 : 0);
    }
  }
  std::mt19937_64 random(1);
  for (const uint32_t refresh : kRefreshes) {
    for (const uint32_t redraw : {0u, 1u, 2u, 7u}) {
      for (const uint64_t step : {uint64_t{0}, uint64_t{1}, uint64_t{63}, uint64_t{64},
                                  uint64_t{1000003}, (uint64_t{1} << 33) + 5}) {
        group.step = step;
        const uint32_t at = static_cast<uint32_t>(
            group.middle_begin +
            static_cast<int64_t>(random() % (group.middle_end - group.middle_begin)));
        const float edge = UniformOf(group, at, refresh, redraw);
        for (const float scale : {edge, std::nextafter(edge, 2.f)}) {
          std::vector<uint32_t> expected;
          for (int64_t t = group.middle_begin; t < group.middle_end; ++t) {
            const uint32_t token = static_cast<uint32_t>(t);
            if (UniformOf(group, token, refresh, redraw) < scale) expected.push_back(token);
          }
          const int64_t count =
              cpu::DrawTokens(group, {.log_gain = &zero, .floor = &zero, .scale = scale}, 0,
                              {.refresh = refresh, .redraw = redraw}, 0, {});
          const std::vector<uint32_t> drawn(group.scratch.token, group.scratch.token + count);
          ASSERT_EQ(drawn, expected)
              << "refresh " << refresh << ", redraw " << redraw << ", step " << step;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, DrawnNumbersTest, testing::ValuesIn(SimdTargets()));

}  // namespace
}  // namespace vattn
