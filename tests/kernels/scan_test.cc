#include "kernels/cpu/scan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/attend.h"
#include "kernels/cpu/workers.h"
#include "kernels/sampling.h"
#include "tests/kernels/group_fixture.h"

namespace vattn::cpu {
namespace {

// The int8 level of a packed query.
int QueryLevel(const GroupFixture& f, int head, int dim) {
  const uint32_t run =
      static_cast<uint32_t>(f.group.scratch.packed[head / 8].run[dim / 4][head % 8]);
  return static_cast<int8_t>(run >> (dim % 4 * 8));
}

double QueryScale(const GroupFixture& f, int head) {
  return f.group.scratch.packed[head / 8].scale[head % 8];
}

// y_j = project_j . q in float64.
double Projected(const GroupFixture& f, int head, int dim) {
  double sum = 0;
  for (int c = 0; c < f.shape.dim_k; ++c) {
    sum += static_cast<double>(f.group.index.project[dim * f.shape.dim_k + c]) * f.Query(head, c) *
           f.storage.scale;
  }
  return sum;
}

double CenterPart(const GroupFixture& f, int head) {
  double sum = 0;
  for (int c = 0; c < f.shape.dim_k; ++c)
    sum += f.group.index.center[c] * f.Query(head, c) * f.storage.scale;
  return sum;
}

// s^ of a token by the definition, from its codes and the packed query.
double Score(const GroupFixture& f, int head, int64_t token) {
  double sum = CenterPart(f, head);
  for (int j = 0; j < f.storage.code.dims(); ++j) {
    sum += QueryLevel(f, head, j) * QueryScale(f, head) *
           CodePoint(f.storage.code, j, CodeLevel(f, token, j));
  }
  return sum;
}

// A code of all zeros marks a token: its score is not told.
bool IsMarked(const GroupFixture& f, int64_t token) {
  for (int j = 0; j < f.storage.code.dims(); ++j) {
    if (CodeLevel(f, token, j) != 0) return false;
  }
  return true;
}

double ScoreSize(const GroupFixture& f, int head) {
  double size = 1 + std::abs(CenterPart(f, head));
  for (int j = 0; j < f.storage.code.dims(); ++j)
    size += std::abs(QueryLevel(f, head, j) * QueryScale(f, head)) * 8;
  return size;
}

class ScanTest : public testing::TestWithParam<Dims> {
 protected:
  void TearDown() override { UseSimdTarget(0); }
  GroupShape Shape(int heads, int index_bytes) const {
    const Dims dims = GetParam();
    return {.dtype = DType::kBF16,
            .dim_k = dims.k,
            .dim_v = dims.v,
            .shared_kv = dims.shared_kv,
            .group_heads = heads,
            .tokens = 700,
            .middle_begin = 32,
            .middle_end = 576,
            .index_bytes = index_bytes};
  }
};

TEST_P(ScanTest, PackedQueriesAreNearTheProjection) {
  GroupFixture f(Shape(11, 32));
  f.BuildIndex();
  f.Scan();
  for (int g = 0; g < 11; ++g) {
    double offset = CenterPart(f, g), size = std::abs(offset), most = 0;
    for (int j = 0; j < f.storage.code.dims(); ++j) {
      const double y = Projected(f, g, j), packed = QueryLevel(f, g, j) * QueryScale(f, g);
      most = std::max(most, std::abs(y));
      ASSERT_NEAR(packed, y, .501 * QueryScale(f, g));
      offset += packed * CodePoint(f.storage.code, j, 0);
      size += std::abs(packed * CodePoint(f.storage.code, j, 0));
    }
    EXPECT_NEAR(QueryScale(f, g), most / 127, 1e-4 * most);
    EXPECT_NEAR(f.group.scratch.packed[g / 8].offset[g % 8], offset, 1e-6 * size);
  }
}

TEST_P(ScanTest, ScoresEqualFloat64OfTheCodes) {
  for (const auto& [bytes, heads] : std::vector<std::pair<int, int>>{
           {32, 1}, {16, 3}, {32, 4}, {48, 6}, {64, 8}, {32, 9}, {32, 16}}) {
    GroupFixture f(Shape(heads, bytes), heads);
    f.BuildIndex();
    std::vector<float> scores(heads * kBlockTokens);
    for (const int64_t target : SimdTargets()) {
      UseSimdTarget(target);
      f.Scan();
      for (const int64_t block : {0, 256, 512}) {
        ScoreBlock(f.storage, IndexKind::kBalanced, f.group, block, scores.data());
        for (int g = 0; g < heads; ++g) {
          for (int64_t t = block; t < block + kBlockTokens; t += t % 11 + 1) {
            const float score = scores[g * kBlockTokens + t - block];
            if (t < 32 || t >= 576) {
              ASSERT_EQ(score, -INFINITY) << t;
            } else if (IsMarked(f, t)) {
              ASSERT_EQ(score, kOutlierScore) << t;
            } else {
              ASSERT_NEAR(score, Score(f, g, t), 2e-5 * ScoreSize(f, g))
                  << bytes << " " << heads << " " << t;
            }
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Rows, ScanTest, testing::ValuesIn(kDims));

void ExpectEstimates(const GroupFixture& f, IndexKind kind, double rounding = 6e-4) {
  const Scratch& w = f.group.scratch;
  const int heads = f.shape.group_heads;
  std::vector<float> scores(heads * kBlockTokens);
  for (int64_t b = 0; b < NumBlocks(f.group); ++b) {
    const int64_t first = (FirstBlock(f.group) + b) * kBlockTokens;
    ScoreBlock(f.storage, kind, f.group, first, scores.data());
    for (int g = 0; g < heads; ++g) {
      const float* row = scores.data() + g * kBlockTokens;
      const float most = *std::max_element(row, row + kBlockTokens);
      ASSERT_EQ(w.shift[b * heads + g], most);
      double mass = 0, largest = 0;
      int marked = 0;
      for (int i = 0; i < kBlockTokens; ++i) {
        const double got = EstimateOf(f.group, first + i, g);
        const bool inside = first + i >= f.group.middle_begin && first + i < f.group.middle_end;
        if (kind == IndexKind::kBalanced && inside && IsMarked(f, first + i)) {
          ASSERT_EQ(got, kOutlierEstimate) << first + i;
          ++marked;
          continue;
        }
        mass += got;
        largest = std::max(largest, got);
        if (!inside) {
          ASSERT_EQ(got, 0) << "outside the middle: " << first + i;
          continue;
        }
        const double e = std::exp(static_cast<double>(row[i]) - most);
        ASSERT_NEAR(got, e, e * rounding + 0x1p-24) << first + i;
        ASSERT_GT(got, 0) << "never drawn: " << first + i;
      }
      EXPECT_LE(marked, kBlockTokens / 32);
      EXPECT_EQ(largest, 1);
      EXPECT_NEAR(w.mass[b * heads + g], mass, 1e-5 * mass);
    }
  }
}

TEST(ScanEstimatesTest, EdgesOfTheMiddle) {
  for (const int64_t begin : {0, 16, 240, 256}) {
    for (const int64_t end : {320, 512, 576, 1024}) {
      for (const IndexKind kind : {IndexKind::kBalanced, IndexKind::kExact}) {
        GroupFixture f(
            {.group_heads = 3, .tokens = 1100, .middle_begin = begin, .middle_end = end});
        f.BuildIndex();
        f.Scan(kind);
        ExpectEstimates(f, kind);
      }
    }
  }
}

// Predictions 20 and more below the block's best keep a chance to be drawn.
TEST(ScanEstimatesTest, PeakedScores) {
  for (const double spread : {20., 200.}) {
    GroupFixture f({.group_heads = 4, .tokens = 1100, .middle_end = 1024, .logit_spread = spread});
    f.BuildIndex();
    for (const int64_t target : SimdTargets()) {
      UseSimdTarget(target);
      f.Scan();
      ExpectEstimates(f, IndexKind::kBalanced, 1.1e-3);  // targets without fp16 cut off
    }
    UseSimdTarget(0);
  }
}

TEST(ScanEstimatesTest, ManyHeadsOnTwoThreads) {
  for (const int heads : {16, 64, 65, 130}) {
    GroupFixture f({.group_heads = heads, .tokens = 4200, .middle_end = 4096});
    f.BuildIndex();
    f.Scan();
    ExpectEstimates(f, IndexKind::kBalanced);
    const int64_t floats = NumBlocks(f.group) * heads;
    const std::vector<float> shift(f.group.scratch.shift, f.group.scratch.shift + floats);
    const std::vector<float> mass(f.group.scratch.mass, f.group.scratch.mass + floats);
    Workers workers(2);
    ScanEstimates(f.storage, IndexKind::kBalanced, f.group, &workers);
    EXPECT_EQ(shift, std::vector<float>(f.group.scratch.shift, f.group.scratch.shift + floats));
    EXPECT_EQ(mass, std::vector<float>(f.group.scratch.mass, f.group.scratch.mass + floats));
  }
}

TEST(ScanScoresTest, ExactScoresOfTheMiddleInARow) {
  GroupFixture f({.dtype = DType::kF16,
                  .group_heads = 6,
                  .tokens = 1100,
                  .middle_begin = 48,
                  .middle_end = 960},
                 1, {.policy = Policy::kTopK});
  ScaleQueries(f.storage, f.group);
  ScanScores(f.storage, IndexKind::kExact, f.group, {});
  for (int g = 0; g < 6; ++g) {
    for (int64_t t = 48; t < 960; ++t) {
      ASSERT_NEAR(f.group.scratch.score[g * f.group.scratch.stride + t - 48], f.Logit(g, t), 1e-4);
    }
  }
}

}  // namespace
}  // namespace vattn::cpu
