// Ranking on CUDA, bit for bit: the best by score and the first by random number, exactly as many
// as asked for, ties to the lower token, whatever the number of thread blocks; and the lists made
// of them.
#include "tests/cuda/cuda_rank.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>

#include "tests/cuda/cuda_calls.h"

namespace vattn::test {
namespace {

// Marks the first `count` of `order` that `out` does not hold.
std::vector<uint8_t> First(const std::vector<int64_t>& order, const std::vector<uint8_t>& out,
                           int64_t count) {
  std::vector<uint8_t> marked(order.size());
  for (const int64_t t : order) {
    if (out[t] || count == 0) continue;
    marked[t] = 1, --count;
  }
  EXPECT_EQ(count, 0);
  return marked;
}

// As the policies choose, written plainly.
RankOutput Expected(const RankInput& in) {
  const int64_t n = in.end - in.begin;
  RankOutput out;
  std::vector<int64_t> by_score(n), by_u(n);
  std::iota(by_u.begin(), by_u.end(), 0);
  std::vector<float> u(n);
  for (int64_t t = 0; t < n; ++t) {
    u[t] = TokenUniform(in.key, static_cast<uint32_t>(in.begin + t), in.step, in.refresh);
  }
  std::stable_sort(by_u.begin(), by_u.end(), [&](int64_t a, int64_t b) { return u[a] < u[b]; });
  for (int h = 0; h < in.heads; ++h) {
    const float* score = in.score.data() + h * n;
    std::iota(by_score.begin(), by_score.end(), 0);
    std::stable_sort(by_score.begin(), by_score.end(),
                     [&](int64_t a, int64_t b) { return score[a] > score[b]; });
    const std::vector<uint8_t> top = First(by_score, std::vector<uint8_t>(n), in.k);
    const std::vector<uint8_t> base = First(by_u, top, in.base);
    std::vector<uint8_t> more = First(by_u, top, in.budget[h]);
    for (int64_t t = 0; t < n; ++t) more[t] = more[t] && !base[t];
    const std::vector<uint8_t>* const marked[] = {&top, &base, &more};
    for (int i = 0; i < RankOutput::kLists; ++i) {
      out.marked[i].insert(out.marked[i].end(), marked[i]->begin(), marked[i]->end());
    }
  }
  std::vector<uint8_t> seen(n);
  for (int i = 0; i < RankOutput::kLists; ++i) {
    for (int64_t t = 0; t < n; ++t) {
      bool any = false;
      for (int h = 0; h < in.heads; ++h) any = any || out.marked[i][h * n + t];
      if (any) out.list[i].push_back(static_cast<uint32_t>(in.begin + t));
      seen[t] = seen[t] || any;
    }
  }
  out.distinct = std::count(seen.begin(), seen.end(), 1);
  return out;
}

void ExpectRanks(const RankInput& in) {
  SCOPED_TRACE("heads " + std::to_string(in.heads) + ", team " + std::to_string(in.team) +
               ", middle " + std::to_string(in.begin) + " to " + std::to_string(in.end) + ", k " +
               std::to_string(in.k) + ", base " + std::to_string(in.base));
  const RankOutput expected = Expected(in), got = RankOnDevice(in);
  for (int i = 0; i < RankOutput::kLists; ++i) {
    EXPECT_TRUE(got.marked[i] == expected.marked[i]) << "masks of list " << i;
    EXPECT_EQ(got.list[i], expected.list[i]) << "list " << i;
  }
  EXPECT_EQ(got.distinct, expected.distinct);
}

// Shares of the middle that are ranked best, sampled first and sampled in all.
struct Shares {
  double k, base, budget;
};
constexpr Shares kShares[] = {{0, .01, .3}, {.05, .05, .05}, {.5, .2, 1}, {.999, 1, 1}};

// score(h, t) for every middle, number of heads and team.
template <class Score>
void ExpectAllRanks(Score&& score) {
  constexpr struct {
    int64_t begin, end;
  } kMiddles[] = {{16, 80}, {0, 256}, {16, 1088}, {240, 272}, {256, 20032}};
  uint32_t seed = 0;
  for (const auto& middle : kMiddles) {
    for (const int heads : {1, 3, 8, 12}) {
      for (const int team : {1, 3, 16}) {
        for (const Shares& shares : kShares) {
          ++seed;
          if (middle.end > 2000 && seed % 3 != 0) continue;  // the long ones take turns
          const int64_t n = middle.end - middle.begin;
          RankInput in{.heads = heads, .team = team, .begin = middle.begin, .end = middle.end};
          in.key = MakeRandomKey(seed, 1, 2, 3);
          in.step = seed;
          in.k = static_cast<uint32_t>(std::ceil(shares.k * static_cast<double>(n - 1)));
          const double residual = static_cast<double>(n - in.k);
          in.base = static_cast<uint32_t>(std::ceil(shares.base * residual));
          for (int h = 0; h < heads; ++h) {  // heads ask for different numbers
            const double part = shares.budget * (h + 1) / heads;
            in.budget.push_back(
                std::max(in.base, static_cast<uint32_t>(std::ceil(part * residual))));
          }
          for (int h = 0; h < heads; ++h) {
            for (int64_t t = 0; t < n; ++t) in.score.push_back(score(h, t));
          }
          ExpectRanks(in);
          if (testing::Test::HasFailure()) return;
        }
      }
    }
  }
}

TEST(CudaRankTest, GaussianScores) {
  SKIP_WITHOUT_DEVICE();
  std::mt19937_64 engine(1);
  std::normal_distribution<float> normal(0, 3);
  ExpectAllRanks([&](int, int64_t) { return normal(engine); });
}

// Few values, both zeros among them, which are the same.
TEST(CudaRankTest, ManyTies) {
  SKIP_WITHOUT_DEVICE();
  ExpectAllRanks([](int h, int64_t t) {
    constexpr float kValues[] = {1, -0.f, 0, 1e-40f, -2, 0, -0.f};
    return kValues[(t * 5 + t / 11 + h) % 7];
  });
}

TEST(CudaRankTest, AllScoresEqual) {
  SKIP_WITHOUT_DEVICE();
  ExpectAllRanks([](int h, int64_t) { return static_cast<float>(h) - 3; });
}

// Neighbours in the last bit, in falling and rising order, and infinities.
TEST(CudaRankTest, ScoresThatAreNearlyEqual) {
  SKIP_WITHOUT_DEVICE();
  ExpectAllRanks([](int h, int64_t t) {
    if (t % 97 == 5) return t % 2 == 0 ? HUGE_VALF : -HUGE_VALF;
    const float s = std::scalbn(static_cast<float>((1 << 23) + (h % 2 == 0 ? t : 30000 - t)), -23);
    return h % 3 == 0 ? -s : s;
  });
}

// Scores that are NaN rank last, the first of them before the others; none is counted twice.
TEST(CudaRankTest, NanIsWorst) {
  SKIP_WITHOUT_DEVICE();
  RankInput in{
      .heads = 2, .team = 2, .begin = 16, .end = 656, .k = 600, .base = 40, .budget = {40, 40}};
  RankInput finite = in;
  for (int i = 0; i < 2 * 640; ++i) {
    const bool nan = i % 3 == 0;
    in.score.push_back(nan ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(i % 50));
    finite.score.push_back(nan ? -HUGE_VALF : static_cast<float>(i % 50));
  }
  const RankOutput got = RankOnDevice(in), expected = Expected(finite);
  EXPECT_TRUE(got.marked[0] == expected.marked[0]);
  EXPECT_EQ(got.list[0], expected.list[0]);
}

}  // namespace
}  // namespace vattn::test
