#include "bench/trace/calibrate.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "api/vattn.hpp"
#include "bench/cli/dtype.h"
#include "bench/cli/environment.h"

namespace vattn::bench {
namespace {

constexpr int kLayers = 3, kQHeads = 4, kKvHeads = 2, kQueries = 11, kDim = 16;

Tensor RandomQueries(int32_t dtype) {
  std::mt19937 engine(1);
  std::normal_distribution<float> normal(.5f, 1);
  std::vector<float> values(kLayers * kQHeads * kQueries * kDim);
  for (float& x : values) x = normal(engine);
  Tensor tensor = {dtype, {kLayers, kQHeads, kQueries, kDim}, {}};
  tensor.bytes.resize(values.size() * ElementBytes(dtype));
  FromFloat(dtype, values.data(), values.size(), tensor.bytes.data());
  return tensor;
}

TEST(CalibrateTest, MomentsAreMeansOverTheHeadsOfAGroup) {
  for (const int32_t dtype : {VATTN_F32, VATTN_BF16}) {
    const Tensor queries = RandomQueries(dtype);
    const std::vector<int32_t> layers = {2, 0};
    const std::vector<float> moments = QueryMoments(queries, kKvHeads, layers, .3);
    ASSERT_EQ(moments.size(), 2u * kKvHeads * kDim * kDim);
    for (size_t at = 0; at < moments.size(); ++at) {
      const size_t column = at % kDim, row = at / kDim % kDim;
      const size_t kv_head = at / (kDim * kDim) % kKvHeads, layer = at / (kDim * kDim) / kKvHeads;
      double sum = 0;
      for (const size_t head : {2 * kv_head, 2 * kv_head + 1}) {
        for (int i = 0; i < kQueries; ++i) {
          float q[kDim];
          ToFloat(dtype, queries.Row(layers[layer], static_cast<int64_t>(head), i), kDim, q);
          sum += .3 * .3 * static_cast<double>(q[row]) * static_cast<double>(q[column]);
        }
      }
      ASSERT_NEAR(moments[at], sum / (2 * kQueries), 1e-6) << at;
    }
  }
}

// What is written is what the library reads, for the chosen layers and for no other number of them.
TEST(CalibrateTest, TheLibraryTakesTheFile) {
  Trace trace;
  trace.layers = kLayers, trace.kv_heads = kKvHeads, trace.q_heads = kQHeads;
  trace.head_dim_k = trace.head_dim_v = kDim;
  trace.layer_names = {"4", "10", "\xc3"};  // the last one cut within a character
  trace.metadata = {{"model", "a \"model\""}};
  const std::vector<int32_t> layers = {2, 0};
  const float scale = 1 / std::sqrt(static_cast<float>(kDim));
  const std::string path =
      std::filesystem::temp_directory_path() / ("calibrate_test." + std::to_string(getpid()));
  WriteFile(path, ProfileFile(trace, layers, scale,
                              QueryMoments(RandomQueries(VATTN_F32), kKvHeads, layers, scale)));
  vattn_options options = Init<vattn_options>();
  options.num_layers = 2, options.num_q_heads = kQHeads, options.num_kv_heads = kKvHeads;
  options.head_dim_k = options.head_dim_v = kDim;
  options.host_bytes = 8 << 20, options.num_threads = 1;
  options.profile = path.c_str();
  EXPECT_NO_THROW(vattn::Runtime{options});
  options.num_layers = 3;
  try {
    vattn::Runtime{options};
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), VATTN_INVALID_ARGUMENT);
    EXPECT_NE(std::strstr(error.what(), "c_q.shape is [2,2,16,16], must be [3,2,16,16]"), nullptr)
        << error.what();
  }
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace vattn::bench
