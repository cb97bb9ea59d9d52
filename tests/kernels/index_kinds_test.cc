// Codes and scores of the kinds of index beside the balanced one, against their definitions in
// float64.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/cpu/index.h"
#include "kernels/cpu/scan.h"
#include "tests/kernels/group_fixture.h"

namespace vattn::cpu {
namespace {

constexpr int64_t kBegin = 32, kEnd = 576;

GroupShape Shape(IndexKind index, const Dims& dims, int heads, int bytes = 32) {
  return {.dtype = DType::kBF16,
          .dim_k = dims.k,
          .dim_v = dims.v,
          .shared_kv = dims.shared_kv,
          .group_heads = heads,
          .tokens = 700,
          .middle_begin = kBegin,
          .middle_end = kEnd,
          .index_bytes = bytes,
          .index = index};
}

double Centred(const GroupFixture& f, int64_t token, int c) {
  return f.Key(token, c) - f.group.index.center[c];
}
double Scaled(const GroupFixture& f, int head, int c) { return f.Query(head, c) * f.storage.scale; }

double CenterPart(const GroupFixture& f, int head) {
  double sum = 0;
  for (int c = 0; c < f.shape.dim_k; ++c) sum += Scaled(f, head, c) * f.group.index.center[c];
  return sum;
}

double Norm(const GroupFixture& f, int head) {
  double sum = 0;
  for (int c = 0; c < f.shape.dim_k; ++c) sum += Scaled(f, head, c) * Scaled(f, head, c);
  return std::sqrt(sum);
}

// f(head, token, score) for tokens of the middle on every instruction set, from ScoreBlock.
template <class F>
void ForScores(GroupFixture& f, IndexKind kind, F&& each) {
  std::vector<float> scores(f.shape.group_heads * kBlockTokens);
  for (const int64_t target : SimdTargets()) {
    UseSimdTarget(target);
    f.Scan(kind);
    for (int64_t block = 0; block < kEnd; block += kBlockTokens) {
      ScoreBlock(f.storage, kind, f.group, block, scores.data());
      for (int g = 0; g < f.shape.group_heads; ++g) {
        for (int64_t t = block; t < block + kBlockTokens; t += t % 7 + 1) {
          const float score = scores[g * kBlockTokens + t - block];
          if (t < kBegin || t >= kEnd) {
            ASSERT_EQ(score, -INFINITY) << t;
          } else {
            each(g, t, score);
          }
        }
      }
    }
  }
  UseSimdTarget(0);
}

class IndexKindsTest : public testing::TestWithParam<Dims> {};

TEST_P(IndexKindsTest, SignsAreComparedByHammingDistance) {
  for (const int bytes : {4, 8, 16, 32}) {
    for (const int heads : {1, 3, 9}) {
      GroupFixture f(Shape(IndexKind::kSign, GetParam(), heads, bytes), heads);
      f.BuildIndex();
      const IndexTables& index = f.group.index;
      const int dims = f.storage.code.dims(), dim = f.shape.dim_k,
                padded = f.storage.code.padded_dims();
      ASSERT_EQ(dims, 8 * bytes);
      EXPECT_GT(index.slope, 0);
      for (int64_t t = kBegin; t < kEnd; t += 13) {
        for (int j = 0; j < dims; ++j) {
          double x = 0, size = 0;
          for (int c = 0; c < dim; ++c) {
            x += Centred(f, t, c) * index.encode[c * padded + j];
            size += std::abs(Centred(f, t, c) * index.encode[c * padded + j]);
          }
          if (std::abs(x) > 1e-5 * size) {
            ASSERT_EQ(CodeLevel(f, t, j), x >= 0 ? 1 : 0) << t << " " << j;
          }
        }
      }
      std::vector<std::vector<bool>> of_query(heads, std::vector<bool>(dims));
      for (int g = 0; g < heads; ++g) {
        for (int j = 0; j < dims; ++j) {
          double y = 0;
          for (int c = 0; c < dim; ++c) y += Scaled(f, g, c) * index.project[j * dim + c];
          of_query[g][j] = y >= 0;
        }
      }
      ForScores(f, IndexKind::kSign, [&](int g, int64_t t, float score) {
        int matches = 0;
        for (int j = 0; j < dims; ++j) matches += (CodeLevel(f, t, j) == 1) == of_query[g][j];
        const double raw = Norm(f, g) * (matches - .5 * dims);
        ASSERT_NEAR(score, CenterPart(f, g) + index.slope * raw + index.intercept * Norm(f, g),
                    1e-3)
            << bytes << " bytes, head " << g << ", token " << t;
      });
    }
  }
}

TEST_P(IndexKindsTest, HadamardLevelsAreARotationInTwoBits) {
  if (GetParam().k > kMaxCodeDims) GTEST_SKIP() << "hadamard2 has at most 256 dimensions";
  GroupFixture f(Shape(IndexKind::kHadamard2, GetParam(), 3));
  f.BuildIndex();
  const IndexTables& index = f.group.index;
  const int dims = f.storage.code.dims(), dim = f.shape.dim_k,
            padded = f.storage.code.padded_dims();
  ASSERT_GE(dims, dim);
  // encode, levels apart, is the rotation whose transpose project is: no part of a score is lost
  // but to rounding.
  for (int c = 0; c < dim; ++c) {
    for (int e = 0; e < dim; e += 7) {
      double sum = 0;
      for (int j = 0; j < dims; ++j)
        sum += double{index.encode[c * padded + j]} * index.project[j * dim + e];
      ASSERT_NEAR(sum, c == e ? 1 : 0, 1e-5);
    }
  }
  double error = 0, size = 0;
  ForScores(f, IndexKind::kHadamard2, [&](int g, int64_t t, float score) {
    double expected = CenterPart(f, g);
    for (int j = 0; j < dims; ++j) {
      const uint32_t run = static_cast<uint32_t>(f.group.scratch.packed[0].run[j / 4][g]);
      const int level = static_cast<int8_t>(run >> (j % 4 * 8));
      expected += level * f.group.scratch.packed[0].scale[g] * (CodeLevel(f, t, j) - 1.5);
    }
    ASSERT_NEAR(score, expected, 1e-3);
    const double exact = f.Logit(g, t) - CenterPart(f, g), predicted = score - CenterPart(f, g);
    error += (predicted - exact) * (predicted - exact), size += exact * exact;
  });
  EXPECT_LT(error, .2 * size);  // 2 bits lose 0.119 of a Gaussian's variance
}

TEST_P(IndexKindsTest, PagesAreBounds) {
  for (const int heads : {1, 9}) {
    GroupFixture f(Shape(IndexKind::kPage, GetParam(), heads), heads);
    f.BuildIndex();
    EXPECT_GT(f.group.index.slope, 0);
    EXPECT_LT(f.group.index.slope, 1);  // bounds lie above and spread wider than what they bound
    const float slope = f.group.index.slope, intercept = f.group.index.intercept;
    ForScores(f, IndexKind::kPage, [&](int g, int64_t t, float score) {
      double bound = 0, size = 0, above = -INFINITY;
      for (int64_t i = t / 16 * 16; i < t / 16 * 16 + 16; ++i) {
        above = std::max(above, f.Logit(g, i) - CenterPart(f, g));
      }
      for (int c = 0; c < f.shape.dim_k; ++c) {
        double best = -INFINITY;
        for (int64_t i = t / 16 * 16; i < t / 16 * 16 + 16; ++i) {
          best = std::max(best, Scaled(f, g, c) * Centred(f, i, c));
        }
        bound += best, size += std::abs(best);
      }
      // Bounds are rounded outwards, by up to one of 128 parts.
      const double raw = (score - CenterPart(f, g) - intercept * Norm(f, g)) / slope;
      ASSERT_GE(raw, bound - 1e-4 * (1 + size));
      ASSERT_LE(raw, bound + size / 128 + 1e-4);
      ASSERT_GE(raw, above - 1e-4 * (1 + size));
    });
  }
}

TEST_P(IndexKindsTest, PooledPagesHaveTheScoreOfTheirMean) {
  for (const int heads : {1, 9}) {
    GroupFixture f(Shape(IndexKind::kPooled, GetParam(), heads), heads);
    f.BuildIndex();
    ForScores(f, IndexKind::kPooled, [&](int g, int64_t t, float score) {
      double mean = 0, size = 0;
      for (int64_t i = t / 16 * 16; i < t / 16 * 16 + 16; ++i) {
        mean += f.Logit(g, i) / 16;
        for (int c = 0; c < f.shape.dim_k; ++c)
          size += std::abs(Scaled(f, g, c) * Centred(f, i, c)) / 16;
      }
      ASSERT_NEAR(score, mean, size / 256 + 1e-4);  // means in bf16
    });
  }
}

TEST_P(IndexKindsTest, TokensHaveTheScoreOfTheNearestCentroid) {
  for (const int heads : {1, 9}) {
    GroupFixture f(Shape(IndexKind::kClusters, GetParam(), heads, 16), heads);
    f.BuildIndex();
    const int dim = f.shape.dim_k, all = f.storage.code.centroids;
    ASSERT_EQ(all, 16 * 16384 / (4 * dim));
    const auto distance2 = [&](int64_t t, int i) {
      double sum = 0;
      for (int c = 0; c < dim; ++c)
        sum += std::pow(Centred(f, t, c) - f.group.index.centroids[i * dim + c], 2);
      return sum;
    };
    std::vector<int> nearest(kEnd);
    for (int64_t t = kBegin; t < kEnd; ++t) {
      uint16_t id;
      std::memcpy(&id, f.Block(t) + f.storage.block.codes + t % kBlockTokens * 2, 2);
      ASSERT_LT(id, all);
      nearest[t] = id;
      if (t % 71 > 0) continue;
      const double own = distance2(t, id);
      for (int i = 0; i < all; ++i)
        ASSERT_GE(distance2(t, i), own * (1 - 1e-3) - 1e-3) << t << " " << i;
    }
    ForScores(f, IndexKind::kClusters, [&](int g, int64_t t, float score) {
      double expected = CenterPart(f, g);
      for (int c = 0; c < dim; ++c)
        expected += Scaled(f, g, c) * f.group.index.centroids[nearest[t] * dim + c];
      ASSERT_NEAR(score, expected, 1e-3);
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Rows, IndexKindsTest, testing::ValuesIn(kDims));

// With as many centroids as there are groups of equal keys, k-means finds each group.
TEST(ClustersTest, FindsSeparateGroups) {
  GroupFixture f(Shape(IndexKind::kClusters, {64, 64, false}, 1, 16));
  for (int64_t t = 0; t < f.shape.tokens; ++t) {
    for (int c = 0; c < 64; ++c) f.SetKey(t, c, c == t * 5 % 64 ? 4.f : 0.f);
  }
  f.BuildIndex();
  f.Scan(IndexKind::kClusters);
  std::vector<float> scores(kBlockTokens);
  ScoreBlock(f.storage, IndexKind::kClusters, f.group, 256, scores.data());
  for (int t = 0; t < kBlockTokens; ++t) ASSERT_NEAR(scores[t], f.Logit(0, 256 + t), 1e-2);
}

TEST(ExternalTest, ScoresAreTakenAsTheyAre) {
  for (const bool apart : {false, true}) {
    GroupFixture f(Shape(IndexKind::kExternal, {64, 64, false}, 70));
    std::vector<float> given(70 * 700);
    for (size_t i = 0; i < given.size(); ++i) given[i] = std::sin(static_cast<float>(i));
    std::vector<const void*> rows(70, given.data());
    for (int g = 0; g < 70 && apart; ++g) rows[g] = given.data() + g * 700;
    f.group.external = rows.data();
    f.Scan(IndexKind::kExternal);
    for (int g = 0; g < 70; ++g) {
      for (int64_t b = 0; b < NumBlocks(f.group); ++b) {
        const float* row = given.data() + (apart ? g * 700 : 0);
        const float most =
            *std::max_element(row + std::max(kBegin, b * 256), row + std::min(kEnd, b * 256 + 256));
        ASSERT_EQ(f.group.scratch.shift[b * 70 + g], most);
      }
    }
  }
}

// Every token of the middle can be drawn, whatever is predicted for it.
TEST(ExternalTest, MinusInfinityIsALowScore) {
  GroupFixture f(Shape(IndexKind::kExternal, {64, 64, false}, 1));
  const std::vector<float> given(700, -INFINITY);
  const void* const row = given.data();
  f.group.external = &row;
  f.Scan(IndexKind::kExternal);
  for (int64_t t = 0; t < 768; ++t)
    ASSERT_EQ(EstimateOf(f.group, t, 0) > 0, t >= kBegin && t < kEnd) << t;
}

// The line through (raw, score) pairs: predictions are closer to the scores than any 5 % away from
// it.
TEST(FitTest, SlopesAreTheBestOnes) {
  for (const IndexKind kind : {IndexKind::kSign, IndexKind::kPage}) {
    GroupFixture f(Shape(kind, {128, 128, false}, 16));
    f.BuildIndex();
    const float slope = f.group.index.slope;
    double error[3] = {};
    for (int i = 0; i < 3; ++i) {
      f.group.index.slope = slope * (i == 0 ? .5f : i == 1 ? 1.f : 2.f);
      ForScores(f, kind, [&](int g, int64_t t, float score) {
        error[i] += std::pow(score - f.Logit(g, t), 2);
      });
    }
    EXPECT_LT(error[1], error[0]);
    EXPECT_LT(error[1], error[2]);
  }
}

TEST(FitTest, DegenerateKeysGiveFiniteScores) {
  for (const IndexKind kind : {IndexKind::kSign, IndexKind::kHadamard2, IndexKind::kPage,
                               IndexKind::kPooled, IndexKind::kClusters}) {
    for (const float value : {0.f, 3.f}) {
      GroupFixture f(Shape(kind, {64, 64, false}, 2));
      for (int64_t t = 0; t < f.shape.tokens; ++t) {
        for (int c = 0; c < 64; ++c) f.SetKey(t, c, value);
      }
      f.BuildIndex();
      ForScores(f, kind, [&](int g, int64_t t, float score) {
        ASSERT_NEAR(score, f.Logit(g, t), 1e-2) << t;
      });
    }
  }
}

}  // namespace
}  // namespace vattn::cpu
