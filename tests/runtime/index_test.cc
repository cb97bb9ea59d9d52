#include "runtime/index/index.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "tests/kernels/group_fixture.h"

namespace vattn {
namespace {

Storage MakeStorage(int dim, int index_bytes, int value_bits = 0) {
  Storage s;
  s.row = MakeRowLayout(DType::kF32, dim, dim, false);
  s.code = MakeCodeLayout(index_bytes, dim);
  s.value_bits = value_bits;
  s.value_code_bytes = ValueCodeBytes(value_bits, dim);
  return s;
}

// [count][dim] normal numbers with a mean, of spreads that fall over the dimensions from `first`
// on.
std::vector<float> Rows(int count, int dim, int first, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows(count * dim);
  for (int i = 0; i < count; ++i) {
    for (int c = 0; c < dim; ++c) {
      rows[i * dim + c] =
          1 +
          normal(random) * static_cast<float>(std::exp(-((c + dim - first) % dim) / (.2 * dim)));
    }
  }
  return rows;
}

// y . x of a query and a key with all coded dimensions, unquantised.
double Score(const Storage& s, const IndexTables& t, const float* q, const float* k) {
  const int dim = s.row.dim_k;
  double sum = 0;
  for (int j = 0; j < s.code.dims(); ++j) {
    double x = 0, y = 0;
    for (int c = 0; c < dim; ++c) {
      x += (static_cast<double>(k[c]) - t.center[c]) * t.encode[c * s.code.padded_dims() + j];
      y += static_cast<double>(q[c]) * t.project[j * dim + c];
    }
    sum += x * y;
  }
  return sum;
}

double Exact(int dim, const IndexTables& t, const float* q, const float* k) {
  double sum = 0;
  for (int c = 0; c < dim; ++c)
    sum += static_cast<double>(q[c]) * (static_cast<double>(k[c]) - t.center[c]);
  return sum;
}

TEST(IndexTest, AllDimensionsGiveTheExactScore) {
  for (const int dim : {16, 64, 80, 128}) {
    Storage s = MakeStorage(dim, 64);
    s.code = {.dims8 = 0, .dims4 = dim, .dims2 = 0};
    const std::vector<float> keys = Rows(500, dim, 0, 1), queries = Rows(40, dim, dim / 2, 2);
    QueryMoment moment(dim);
    moment.Add(queries.data(), 40, 4);
    for (const QueryMoment& m : {QueryMoment(dim), moment}) {
      const auto index = Index::Make(s, keys.data(), keys.data(), 500, m);
      const IndexTables t = index->tables();
      for (int i = 0; i < 40; ++i) {
        for (int k = 0; k < 500; k += 37) {
          const double exact = Exact(dim, t, &queries[i * dim], &keys[k * dim]);
          ASSERT_NEAR(Score(s, t, &queries[i * dim], &keys[k * dim]), exact,
                      1e-4 * (1 + std::abs(exact)));
        }
      }
    }
  }
}

TEST(IndexTest, CenterIsTheMeanAndCoordinatesFillTheirLevels) {
  const int dim = 64;
  const Storage s = MakeStorage(dim, 32, 4);
  const std::vector<float> keys = Rows(2000, dim, 0, 1), values = Rows(2000, dim, 9, 5);
  const auto index = Index::Make(s, keys.data(), values.data(), 2000, QueryMoment(dim));
  const IndexTables t = index->tables();
  double norm2 = 0, spread = 0;
  for (int c = 0; c < dim; ++c) {
    double mean = 0, v_mean = 0, v2 = 0;
    for (int i = 0; i < 2000; ++i) {
      mean += keys[i * dim + c] / 2000.;
      v_mean += values[i * dim + c] / 2000.;
      v2 += values[i * dim + c] * values[i * dim + c] / 2000.;
    }
    EXPECT_NEAR(t.center[c], mean, 1e-5);
    EXPECT_NEAR(t.value_mean[c], v_mean, 1e-5);
    EXPECT_NEAR(t.value_step[c], .3352 * std::sqrt(v2 - v_mean * v_mean), 1e-4);
    norm2 += v2;
    spread += v2 - v_mean * v_mean;
  }
  EXPECT_NEAR(t.value_norm2, norm2, 1e-4 * norm2);
  EXPECT_NEAR(t.value_spread, spread, 1e-4 * spread);
  EXPECT_GT(t.value_residual, 0);
  EXPECT_LT(t.value_residual, .03 * spread);
  for (int j = 0; j < s.code.dims(); ++j) {
    const double half = j < s.code.dims8 ? 64 : j < s.code.dims8 + s.code.dims4 ? 8 : 2;
    int clipped = 0;
    for (int i = 0; i < 2000; ++i) {
      double x = 0;
      for (int c = 0; c < dim; ++c) {
        x += (keys[i * dim + c] - static_cast<double>(t.center[c])) *
             t.encode[c * s.code.padded_dims() + j];
      }
      clipped += std::abs(x) > half;
    }
    EXPECT_LT(clipped, half == 2 ? 200 : 5) << j;
  }
}

// Queries that look where keys vary little: an index that knows them keeps other dimensions.
TEST(IndexTest, KnownQueriesLowerTheScoreError) {
  const int dim = 128;
  const Storage s = MakeStorage(dim, 16);
  const std::vector<float> keys = Rows(1000, dim, 0, 1), queries = Rows(200, dim, dim / 2, 2);
  QueryMoment moment(dim);
  moment.Add(queries.data(), 200, 4);
  double error[2] = {};
  for (const bool known : {false, true}) {
    const auto index =
        Index::Make(s, keys.data(), keys.data(), 1000, known ? moment : QueryMoment(dim));
    for (int i = 0; i < 200; i += 5) {
      for (int k = 0; k < 1000; k += 13) {
        const double difference = Score(s, index->tables(), &queries[i * dim], &keys[k * dim]) -
                                  Exact(dim, index->tables(), &queries[i * dim], &keys[k * dim]);
        error[known] += difference * difference;
      }
    }
  }
  EXPECT_LT(error[1], .8 * error[0]);
}

// noise predicts the score error of what the sample was drawn from, weight the queries' parts, and
// no direction that they see is without either.
TEST(IndexTest, NoiseAndWeightsPredictScoreErrors) {
  const int dim = 64;
  for (const int bytes : {16, 32}) {
    const Storage s = MakeStorage(dim, bytes);
    const std::vector<float> keys = Rows(3000, dim, 0, 1), queries = Rows(400, dim, dim / 2, 2);
    QueryMoment moment(dim);
    moment.Add(queries.data(), 400, 100);
    const auto index = Index::Make(s, keys.data(), keys.data(), 1500, moment);
    const IndexTables t = index->tables();
    double measured = 0, predicted = 0, expected = 0;
    for (int i = 0; i < 400; i += 8) {
      const float* q = &queries[i * dim];
      const int dims = s.code.dims();
      for (int j = 0; j < dim; ++j) {
        const float* const row = j < dims ? t.project + j * dim : t.noise + (j - dims) * dim;
        double part = 0;
        for (int c = 0; c < dim; ++c) part += static_cast<double>(q[c]) * row[c];
        predicted += (j < dims ? t.level_noise2[j] : 1) * part * part;
        if (j < dims) {
          ASSERT_GT(t.level_noise2[j], 0);
        }
      }
      for (int k = 1500; k < 3000; ++k) {  // keys that the index has not seen
        double error = Exact(dim, t, q, &keys[k * dim]);
        for (int j = 0; j < s.code.dims(); ++j) {
          const double half = j < s.code.dims8 ? 64 : j < s.code.dims8 + s.code.dims4 ? 8 : 2;
          double x = 0, y = 0;
          for (int c = 0; c < dim; ++c) {
            x += (static_cast<double>(keys[k * dim + c]) - t.center[c]) *
                 t.encode[c * s.code.padded_dims() + j];
            y += static_cast<double>(q[c]) * t.project[j * dim + c];
          }
          error -= y * (std::clamp(std::floor(x), -half, half - 1) + .5);
        }
        measured += error * error / 1500;
      }
    }
    EXPECT_NEAR(predicted, measured, .1 * measured) << bytes;
    // The parts of queries add up to their mean square score.
    double score2 = 0;
    for (int i = 0; i < 400; ++i) {
      for (int k = 0; k < 1500; k += 7) {
        const double score = Exact(dim, t, &queries[i * dim], &keys[k * dim]);
        score2 += score * score / (400 * 215);
      }
    }
    for (int j = 0; j < dim; ++j) expected += t.weight[j];
    EXPECT_GT(expected, .9 * score2);
    for (int j = 1; j < dim; ++j) EXPECT_LE(t.weight[j], t.weight[j - 1]);
  }
}

TEST(IndexTest, DegenerateKeysGiveFiniteTables) {
  const int dim = 64;
  const Storage s = MakeStorage(dim, 32, 2);
  const std::vector<float> constant(100 * dim, 3.f), zero(100 * dim, 0.f);
  for (const std::vector<float>& keys : {constant, zero}) {
    for (const int count : {1, 2, 100}) {
      const auto index = Index::Make(s, keys.data(), keys.data(), count, QueryMoment(dim));
      for (const float x : index->floats()) ASSERT_TRUE(std::isfinite(x));
    }
  }
}

TEST(IndexTest, NanAndInfinityDoNotHang) {
  const int dim = 64;
  const Storage s = MakeStorage(dim, 32, 2);
  for (const float bad : {NAN, INFINITY, 3e38f}) {
    std::vector<float> keys = Rows(100, dim, 0, 1);
    keys[70] = bad;
    QueryMoment moment(dim);
    moment.Add(keys.data(), 100, 4);
    EXPECT_NE(Index::Make(s, keys.data(), keys.data(), 100, moment), nullptr);
  }
}

TEST(IndexTest, FloatsRestoreTheTables) {
  const int dim = 80;
  const Storage s = MakeStorage(dim, 48, 4);
  const std::vector<float> keys = Rows(100, dim, 0, 1);
  const auto index = Index::Make(s, keys.data(), keys.data(), 100, QueryMoment(dim));
  ASSERT_EQ(static_cast<int64_t>(index->floats().size()), Index::NumFloats(s));
  const auto again = Index::FromFloats(s, index->floats());
  EXPECT_EQ(again->tables().value_norm2, index->tables().value_norm2);
  EXPECT_EQ(again->tables().project[5], index->tables().project[5]);
}

// Rows of the unit vector of one dimension.
std::vector<float> UnitRows(int count, int dim, int at) {
  std::vector<float> rows(count * dim, 0.f);
  for (int i = 0; i < count; ++i) rows[i * dim + at] = 1;
  return rows;
}

TEST(QueryMomentTest, TokensCountAlikeThenOlderOnesFade) {
  QueryMoment moment(16);
  EXPECT_TRUE(moment.empty());
  moment.Add(UnitRows(10, 16, 0).data(), 10, 4000);
  moment.Add(UnitRows(20, 16, 1).data(), 20, 2000);
  const std::vector<double> mean = moment.Mean();
  EXPECT_NEAR(mean[0], 2 / 3., 1e-6);
  EXPECT_NEAR(mean[17], 1 / 3., 1e-6);
  EXPECT_EQ(mean[1], 0);
  EXPECT_EQ(QueryMoment::Load(16, moment.Save()).Mean(), mean);
  moment.Add(UnitRows(1, 16, 1).data(), 1, 100000);
  EXPECT_NEAR(moment.Mean()[0], 4 / 106., 1e-6);
  const double before = moment.Mean()[0];
  for (int i = 0; i < 8192; ++i) moment.Add(UnitRows(1, 16, 2).data(), 1, 1);
  EXPECT_NEAR(moment.Mean()[0], before / 2, 1e-4);
  EXPECT_NEAR(moment.Mean()[34], .5, 1e-4);
}

TEST(QueryMomentTest, QueriesThatAreNotFiniteAreLeftOut) {
  QueryMoment moment(16);
  std::vector<float> rows = UnitRows(4, 16, 3);
  moment.Add(rows.data(), 4, 4);
  rows[20] = NAN;
  moment.Add(rows.data(), 4, 4);
  EXPECT_EQ(moment.Mean()[3 * 17], 1);
}

// Different ones, of all heads alike, from the first token to the last.
TEST(QueryMomentTest, PicksAreSpreadEvenly) {
  for (const int64_t tokens : {1, 7, 100, 512, 1024, 100000}) {
    for (const int group : {1, 3, 6, 8, 128}) {
      const int64_t picks = QueryMoment::NumPicks(tokens, group);
      EXPECT_EQ(picks, std::min<int64_t>(512, tokens * group));
      std::set<std::pair<int64_t, int>> seen;
      std::vector<int64_t> of_head(group);
      for (int64_t i = 0; i < picks; ++i) {
        const QueryMoment::Pick pick = QueryMoment::PickAt(i, tokens, group);
        ASSERT_LT(pick.head, group);
        ASSERT_LE(
            std::abs(static_cast<double>(pick.token) - static_cast<double>(i) * tokens / picks), 1);
        seen.insert({pick.token, pick.head});
        ++of_head[pick.head];
      }
      EXPECT_EQ(static_cast<int64_t>(seen.size()), picks) << tokens << " " << group;
      EXPECT_LE(*std::max_element(of_head.begin(), of_head.end()), picks / group + 1);
    }
  }
}

}  // namespace
}  // namespace vattn
