#include "kernels/cpu/encode.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "kernels/cpu/values.h"
#include "kernels/cpu/workers.h"
#include "tests/kernels/group_fixture.h"

namespace vattn::cpu {
namespace {

constexpr int kIndexBytes[] = {16, 32, 48, 64};

// x_j of a key by the definition: fused multiply-adds over the key's elements in order.
float Coordinate(const GroupFixture& f, int64_t token, int dim) {
  float x = 0;
  for (int c = 0; c < f.shape.dim_k; ++c) {
    const float key = static_cast<float>(f.Key(token, c)) - f.group.index.center[c];
    x = std::fma(key, f.group.index.encode[c * f.storage.code.padded_dims() + dim], x);
  }
  return x;
}

int Level(float x, int half) {
  return static_cast<int>(
      std::clamp(std::floor(x) + static_cast<float>(half), 0.f, static_cast<float>(2 * half - 1)));
}

bool IsMarked(const GroupFixture& f, int64_t token) {
  for (int j = 0; j < f.storage.code.dims(); ++j) {
    if (CodeLevel(f, token, j) != 0) return false;
  }
  return true;
}

// By the definition of IndexTables, of a token whose value is harmless.
bool CodeMisleads(const GroupFixture& f, int64_t token) {
  const CodeLayout& code = f.storage.code;
  const IndexTables& index = f.group.index;
  double residual2 = 0, noise2 = 0;
  for (int j = 0; j < f.shape.dim_k; ++j) {
    double r = 0;
    if (j < code.dims()) {
      const int half = j < code.dims8 ? 64 : j < code.dims8 + code.dims4 ? 8 : 2;
      const float x = Coordinate(f, token, j);
      r = (x - (Level(x, half) - half + .5)) * index.step[j];
    } else {
      for (int c = 0; c < f.shape.dim_k; ++c) {
        r += (f.Key(token, c) - index.center[c]) *
             index.rest[c * code.padded_rest(f.shape.dim_k) + j - code.dims()];
      }
    }
    residual2 += r * r;
    noise2 += index.weight[j] * r * r;
  }
  return residual2 > index.residual_limit || noise2 > index.noise_limit;
}

TEST(CodeLayoutTest, FitsItsBudgetAndIsTheLeastNoisy) {
  for (const int bytes : kIndexBytes) {
    for (const int dim : {16, 64, 80, 96, 128, 192, 256, 576, 1024}) {
      const CodeLayout code = MakeCodeLayout(bytes, dim);
      EXPECT_LE(code.bytes(), bytes);
      EXPECT_EQ(code.bytes(), code.dims8 + code.dims4 / 2 + code.dims2 / 4);
      EXPECT_LE(code.dims(), std::min(dim, kMaxCodeDims));
      EXPECT_EQ(code.dims8 % 4 + code.dims4 % 8 + code.dims2 % 16, 0);
      EXPECT_EQ(code.runs() * 4, code.dims());
      EXPECT_GE(code.padded_dims(), code.dims());
      EXPECT_EQ(code.padded_dims() % 16, 0);
      const int kept = std::min(dim, kMaxCodeDims);
      const auto noise = [&](int d8, int d4, int d2) {
        double sum = 0;
        for (int j = 0; j < kept; ++j) {
          const double share = j < d8 ? 4e-4 : j < d8 + d4 ? .0115 : j < d8 + d4 + d2 ? .119 : 1;
          sum += share * std::exp(-j / (.18 * kept));
        }
        return sum;
      };
      double least = 1e300;
      for (int d8 = 0; d8 <= kept; d8 += 4) {
        for (int d4 = 0; d8 + d4 <= kept; d4 += 8) {
          for (int d2 = 0; d8 + d4 + d2 <= kept; d2 += 16) {
            if (d8 + d4 / 2 + d2 / 4 <= bytes) least = std::min(least, noise(d8, d4, d2));
          }
        }
      }
      EXPECT_NEAR(noise(code.dims8, code.dims4, code.dims2), least, 1e-12) << bytes << " " << dim;
    }
  }
}

TEST(CodeLayoutTest, BlocksHoldRowsCodesAndValueCodes) {
  for (const Dims& dims : kDims) {
    for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      const RowLayout row = MakeRowLayout(dtype, dims.k, dims.v, dims.shared_kv);
      const int used = (dims.shared_kv ? dims.k : dims.k + dims.v) * ElementBytes(dtype);
      EXPECT_EQ(row.row_bytes % 128, 0);
      EXPECT_GE(row.row_bytes, used);
      EXPECT_LT(row.row_bytes, used + 128);
      EXPECT_EQ(row.v_offset, dims.shared_kv ? 0 : dims.k * ElementBytes(dtype));
      const BlockLayout block = MakeBlockLayout(row, 32, 48);
      EXPECT_EQ(block.codes, 256 * row.row_bytes);
      EXPECT_EQ(block.value_codes, block.codes + 256 * 32);
      EXPECT_EQ(block.bytes, block.value_codes + 256 * 48);
    }
  }
  EXPECT_EQ(ValueCodeBytes(0, 128), 0);
  EXPECT_EQ(ValueCodeBytes(2, 128), 32);
  EXPECT_EQ(ValueCodeBytes(4, 128), 64);
  EXPECT_EQ(ValueCodeBytes(2, 80), 32);  // whole chunks of 64
  EXPECT_EQ(ValueCodeBytes(4, 80), 48);  // of 32
}

class EncodeTest : public testing::TestWithParam<std::tuple<DType, Dims>> {
 protected:
  GroupShape Shape(int index_bytes, int value_bits) const {
    const auto& [dtype, dims] = GetParam();
    return {.dtype = dtype,
            .dim_k = dims.k,
            .dim_v = dims.v,
            .shared_kv = dims.shared_kv,
            .group_heads = 2,
            .tokens = 400,
            .middle_begin = 16,
            .middle_end = 336,
            .index_bytes = index_bytes,
            .value_bits = value_bits};
  }
};

TEST_P(EncodeTest, CodesFollowTheDefinition) {
  int clipped = 0;
  for (const int bytes : kIndexBytes) {
    GroupFixture f(Shape(bytes, 0), bytes);
    f.BuildIndex();
    const CodeLayout& code = f.storage.code;
    for (int64_t t = 16; t < 336; t += t % 11 + 1) {
      ASSERT_EQ(IsMarked(f, t), CodeMisleads(f, t)) << "bytes " << bytes << ", token " << t;
      if (IsMarked(f, t)) continue;
      for (int j = 0; j < code.dims(); ++j) {
        const int half = j < code.dims8 ? 64 : j < code.dims8 + code.dims4 ? 8 : 2;
        const int level = Level(Coordinate(f, t, j), half);
        clipped += level == 0;
        ASSERT_EQ(CodeLevel(f, t, j), level)
            << "bytes " << bytes << ", token " << t << ", dim " << j;
      }
    }
  }
  EXPECT_GT(clipped, 0);
}

// The sums of IndexTables, in order and without fused operations, as CUDA has them too: a limit that
// one backend's sum is over and the other's is not would make other outliers.
TEST_P(EncodeTest, ErrorsAreSumsInOrder) {
  for (const int bytes : kIndexBytes) {
    GroupFixture f(Shape(bytes, 0), bytes);
    f.BuildIndex();
    const CodeLayout& code = f.storage.code;
    const IndexTables& index = f.group.index;
    const int dim = f.shape.dim_k, padded_rest = code.padded_rest(dim);
    constexpr int64_t kTokens = 37;  // the last tile is not whole
    std::vector<float> keys;
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int c = 0; c < dim; ++c)
        keys.push_back(static_cast<float>(f.Key(16 + t, c)) - index.center[c]);
    }
    std::vector<CodeErrors> errors(kTokens);
    FindCodeErrors(f.storage, index, keys.data(), kTokens, errors.data());
    for (int64_t t = 0; t < kTokens; ++t) {
      // Volatile: the compiler may not fuse what is rounded here.
      volatile float residual2 = 0, noise2 = 0, product;
      for (int j = 0; j < dim; ++j) {
        float r = 0;
        if (j < code.dims()) {
          const float x = Coordinate(f, 16 + t, j);
          const int half = static_cast<int>(code.half(j));
          product = (x - (static_cast<float>(Level(x, half) - half) + .5f)) * index.step[j];
          r = product;
        } else {
          for (int c = 0; c < dim; ++c)
            r = std::fma(keys[t * dim + c], index.rest[c * padded_rest + j - code.dims()], r);
        }
        product = r * r;
        const float r2 = product;
        residual2 = residual2 + r2;
        product = index.weight[j] * r2;
        noise2 = noise2 + product;
      }
      ASSERT_EQ(errors[t].residual2, residual2) << "bytes " << bytes << ", token " << t;
      ASSERT_EQ(errors[t].noise2, noise2) << "bytes " << bytes << ", token " << t;
    }
  }
}

// A key far out in every direction, a huge value, and NaN in either: codes of all 0, and of no
// others.
TEST_P(EncodeTest, WhatNoCodeTellsIsMarked) {
  if (std::get<1>(GetParam()).shared_kv) GTEST_SKIP() << "keys and values are the same rows";
  for (const int bytes : kIndexBytes) {
    GroupFixture f(Shape(bytes, 0), 9);
    for (int c = 0; c < f.shape.dim_k; ++c) f.SetKey(100, c, c % 2 == 0 ? 60.f : -60.f);
    for (int j = 0; j < f.shape.dim_v; ++j) f.SetValue(200, j, 200);
    f.BuildIndex();
    const auto marked = [&](int64_t token) { return IsMarked(f, token); };
    int64_t count = 0;
    for (int64_t t = 16; t < 336; ++t) count += marked(t);
    EXPECT_EQ(count, 2) << bytes;
    EXPECT_TRUE(marked(100));
    EXPECT_TRUE(marked(200));
    // New tokens are judged by the index that there is.
    f.SetKey(96, 3, NAN);
    f.SetValue(97, 5, NAN);
    Encode({.storage = f.storage,
            .index = f.group.index,
            .blocks = f.group.blocks,
            .begin = 96,
            .end = 112},
           {});
    EXPECT_TRUE(marked(96));
    EXPECT_TRUE(marked(97));
    EXPECT_FALSE(marked(98));
  }
}

// Targets without fused multiply-add round twice: a coordinate at the edge of a level may fall on
// either side.
TEST_P(EncodeTest, TargetsAgree) {
  GroupFixture f(Shape(32, 2), 3);
  f.BuildIndex();
  for (const int64_t target : SimdTargets()) {
    UseSimdTarget(target);
    Encode({.storage = f.storage,
            .index = f.group.index,
            .blocks = f.group.blocks,
            .begin = 16,
            .end = 336},
           {});
    int differ = 0, all = 0;
    for (int64_t t = 16; t < 336; t += 5) {
      if (IsMarked(f, t)) continue;
      for (int j = 0; j < f.storage.code.dims(); ++j, ++all) {
        const float x = Coordinate(f, t, j);
        const int half = j < f.storage.code.dims8                          ? 64
                         : j < f.storage.code.dims8 + f.storage.code.dims4 ? 8
                                                                           : 2;
        if (CodeLevel(f, t, j) == Level(x, half)) continue;
        ++differ;
        ASSERT_NEAR(x, std::round(x), 1e-3);
      }
    }
    EXPECT_LE(differ, all / 1000 + 1);
  }
  UseSimdTarget(0);
}

TEST_P(EncodeTest, ValueCodesRoundTripWithinHalfAStep) {
  for (const int bits : {2, 4}) {
    GroupFixture f(Shape(32, bits), bits);
    f.BuildIndex();
    const int half = 1 << (bits - 1);
    int inside = 0, all = 0;
    for (int64_t t = 16; t < 336; ++t) {
      std::vector<float> decoded(f.shape.dim_v);
      const uint8_t* codes = reinterpret_cast<const uint8_t*>(f.Block(t)) +
                             f.storage.block.value_codes +
                             t % kBlockTokens * f.storage.value_code_bytes;
      DecodeValues(f.storage, f.group.index, &codes, 1, decoded.data());
      for (int j = 0; j < f.shape.dim_v; ++j, ++all) {
        const float step = f.group.index.value_step[j], mean = f.group.index.value_mean[j];
        const float v = static_cast<float>(f.Value(t, j));
        ASSERT_EQ(ValueLevel(f, t, j), Level((v - mean) / step, half));
        ASSERT_NEAR(decoded[j], DecodedValue(f, t, j), 1e-5 * (std::abs(mean) + half * step));
        if (std::abs(v - mean) > half * step) continue;
        ++inside;
        ASSERT_NEAR(decoded[j], v, .5001 * step + 1e-6);
      }
    }
    EXPECT_GT(inside, all * 9 / 10);
  }
}

TEST_P(EncodeTest, SumsOfValueCodes) {
  for (const int bits : {2, 4}) {
    GroupFixture f(Shape(32, bits), bits);
    f.BuildIndex();
    for (const int heads : {1, 11}) {
      for (const int count : {64, 256}) {
        std::vector<uint16_t> weights(heads * kBlockTokens, 0);
        std::vector<float> factors(2 * heads), sum(heads * (f.shape.dim_v + 3), 1.f);
        for (int g = 0; g < heads; ++g) {
          factors[2 * g] = .3f + static_cast<float>(g);
          double mass = 0;
          for (int i = 16; i < count; ++i) {
            const uint16_t bits16 = HalfBits(std::exp(-static_cast<float>((i * 7 + g) % 40) / 4));
            weights[g * kBlockTokens + i] = bits16;
            mass += HalfValue(bits16);
          }
          factors[2 * g + 1] = static_cast<float>(mass);
        }
        const uint8_t* codes =
            reinterpret_cast<const uint8_t*>(f.Block(0)) + f.storage.block.value_codes;
        AddValueCodes(f.storage, f.group.index, codes, weights.data(), kBlockTokens, count, heads,
                      factors.data(), sum.data(), f.shape.dim_v + 3);
        for (int g = 0; g < heads; ++g) {
          for (int j = 0; j < f.shape.dim_v + 3; ++j) {
            double expected = 1, size = 1;
            for (int i = 16; i < count && j < f.shape.dim_v; ++i) {
              const double w = factors[2 * g] * HalfValue(weights[g * kBlockTokens + i]);
              expected += w * DecodedValue(f, i, j);
              size += w * 4 *
                      (std::abs(f.group.index.value_mean[j]) + 16 * f.group.index.value_step[j]);
            }
            ASSERT_NEAR(sum[g * (f.shape.dim_v + 3) + j], expected, 2e-6 * size);
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Rows, EncodeTest,
                         testing::Combine(testing::Values(DType::kF32, DType::kF16, DType::kBF16),
                                          testing::ValuesIn(kDims)));

TEST(EncodeRangeTest, LeavesOtherTokensAndThreadsDoNotMatter) {
  GroupFixture f(
      {.group_heads = 1, .tokens = 3000, .middle_begin = 16, .middle_end = 2880, .value_bits = 4});
  f.BuildIndex();
  std::vector<std::byte> before(f.Block(600), f.Block(600) + f.storage.block.bytes);
  std::fill(f.Block(600) + f.storage.block.codes, f.Block(600) + f.storage.block.bytes,
            std::byte{0x5A});
  Workers workers(2);
  Encode({.storage = f.storage,
          .index = f.group.index,
          .blocks = f.group.blocks,
          .begin = 560,
          .end = 720},
         &workers);
  for (int64_t t = 512; t < 768; ++t) {
    const bool coded = t >= 560 && t < 720;
    const int64_t at =
        f.storage.block.codes + (t - 512) / 16 * 16 * f.storage.code.bytes() + (t - 512) % 16 * 4;
    ASSERT_EQ(f.Block(600)[at], coded ? before[at] : std::byte{0x5A}) << t;
    const int64_t value = f.storage.block.value_codes + (t - 512) * f.storage.value_code_bytes;
    ASSERT_EQ(f.Block(600)[value], coded ? before[value] : std::byte{0x5A}) << t;
  }
}

TEST(EncodeRangeTest, NanAndInfinityStayWithinTheirLevels) {
  GroupFixture f(
      {.group_heads = 1, .tokens = 500, .middle_begin = 16, .middle_end = 336, .value_bits = 2});
  f.BuildIndex();
  const std::vector<int> before = {CodeLevel(f, 21, 0), CodeLevel(f, 23, 5)};
  for (const float bad : {NAN, INFINITY, -INFINITY, 3e38f}) {
    for (int c = 0; c < 64; ++c) {
      f.SetKey(22, c, bad);
      f.SetValue(22, c, bad);
    }
    Encode({.storage = f.storage,
            .index = f.group.index,
            .blocks = f.group.blocks,
            .begin = 16,
            .end = 32},
           {});
    EXPECT_EQ(CodeLevel(f, 21, 0), before[0]);
    EXPECT_EQ(CodeLevel(f, 23, 5), before[1]);
    for (int j = 0; j < 64; ++j) {
      EXPECT_EQ(ValueLevel(f, 22, j), bad > 0 ? 3 : 0) << bad;
    }
  }
}

}  // namespace
}  // namespace vattn::cpu
