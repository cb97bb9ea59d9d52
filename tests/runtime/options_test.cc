#include "runtime/options.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace vattn {
namespace {

// Refused with INVALID_ARGUMENT; the text has every one of `parts`.
void ExpectRefused(const std::function<void(Options&)>& change,
                   const std::vector<std::string>& parts) {
  Options options;
  change(options);
  const absl::Status status = ResolveOptions(options);
  ASSERT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << parts[0];
  for (const std::string& part : parts)
    EXPECT_TRUE(absl::StrContains(status.message(), part)) << status << " / " << part;
}

void ExpectTaken(const std::function<void(Options&)>& change) {
  Options options;
  change(options);
  EXPECT_TRUE(ResolveOptions(options).ok()) << ResolveOptions(options);
}

struct IntRange {
  const char* name;
  int32_t Options::*field;
  int32_t low, high;
};

constexpr IntRange kInts[] = {
    {"num_layers", &Options::num_layers, 1, 1024},
    {"num_q_heads", &Options::num_q_heads, 1, 1024},
    {"num_kv_heads", &Options::num_kv_heads, 1, 1024},
    {"head_dim_k", &Options::head_dim_k, 16, 1024},
    {"head_dim_v", &Options::head_dim_v, 16, 1024},
    {"device", &Options::device, 0, 1023},
    {"num_threads", &Options::num_threads, 0, 4096},
    {"numa_node", &Options::numa_node, -1, 1023},
    {"sinks", &Options::sinks, 0, 256},
    {"window", &Options::window, 1, 65536},
    {"exact_below", &Options::exact_below, 64, 1 << 30},
    {"max_looks", &Options::max_looks, 1, 8},
    {"refresh", &Options::refresh, 1, 4096},
    {"min_selected", &Options::min_selected, 0, 65536},
};

TEST(OptionsTest, IntegersOutOfRange) {
  for (const IntRange& range : kInts) {
    SCOPED_TRACE(range.name);
    for (const int64_t value :
         {int64_t{range.low} - 1, int64_t{range.high} + 1, int64_t{1} << 31, int64_t{-1} << 31}) {
      const int32_t bad = static_cast<int32_t>(value);
      if (bad >= range.low && bad <= range.high) continue;
      ExpectRefused(
          [&](Options& o) { o.*range.field = bad; },
          {range.name, absl::StrCat(bad), absl::StrCat(range.low), absl::StrCat(range.high)});
    }
  }
}

TEST(OptionsTest, IntegersAtTheirEnds) {
  for (const IntRange& range : kInts) {
    SCOPED_TRACE(range.name);
    for (const int32_t value : {range.low, range.high}) {
      ExpectTaken([&](Options& o) {
        o.num_q_heads = 1024, o.num_kv_heads = 1;
        o.head_dim_k = 1024, o.head_dim_v = 16;
        o.*range.field = value;
        if (range.field == &Options::num_q_heads) o.num_kv_heads = 1;
        if (range.field == &Options::head_dim_k) o.head_dim_v = 16;
      });
    }
  }
}

// A number that is no enumerator of the field's type is refused; the last enumerator is taken.
template <class Enum>
void ExpectListed(const char* name, Enum Options::*field, Enum last) {
  SCOPED_TRACE(name);
  const int32_t high = static_cast<int32_t>(last);
  for (const int32_t bad : {-1, high + 1, std::numeric_limits<int32_t>::max()}) {
    ExpectRefused([&](Options& o) { o.*field = static_cast<Enum>(bad); },
                  {name, absl::StrCat(bad), "0", absl::StrCat(high)});
  }
  ExpectTaken([&](Options& o) { o.*field = last; });
}

TEST(OptionsTest, EnumerationsOutOfRange) {
  ExpectListed("dtype", &Options::dtype, DType::kBF16);
  ExpectListed("backend", &Options::backend, BackendKind::kCuda);
  ExpectListed("index", &Options::index, IndexKind::kExternal);
  ExpectListed("policy", &Options::policy, Policy::kDense);
  ExpectListed("norm", &Options::norm, Norm::kOutput);
  ExpectListed("on_unverified", &Options::on_unverified, OnUnverified::kBestEffort);
  ExpectListed("bound", &Options::bound, Bound::kSafe);
  ExpectListed("target", &Options::target, Target::kDenominator);
  ExpectListed("io_engine", &Options::io_engine, IoEngine::kPread);
  ExpectListed("admission", &Options::admission, Admission::kReserved);
}

struct FloatRange {
  const char* name;
  float Options::*field;
  float low, high;
  bool low_refused;
};

constexpr FloatRange kFloats[] = {
    {"epsilon", &Options::epsilon, 0, 10, true},
    {"delta", &Options::delta, 0, .215f, true},
    {"norm_floor", &Options::norm_floor, 0, 1, false},
    {"max_selected_share", &Options::max_selected_share, 0, 1, true},
    {"topk_share", &Options::topk_share, 0, 1, false},
    {"base_share", &Options::base_share, 0, 1, false},
    {"hot_share", &Options::hot_share, 0, 1, false},
};

TEST(OptionsTest, FloatsOutOfRange) {
  for (const FloatRange& range : kFloats) {
    SCOPED_TRACE(range.name);
    for (const float bad : {NAN, INFINITY, -INFINITY, -1.f, std::nextafter(range.high, 100.f)}) {
      ExpectRefused([&](Options& o) { o.*range.field = bad; },
                    {range.name, absl::StrCat(bad), absl::StrCat(range.high)});
    }
    ExpectTaken([&](Options& o) { o.*range.field = range.high; });
    if (range.low_refused) {
      ExpectRefused([&](Options& o) { o.*range.field = range.low; }, {range.name, "over 0"});
    } else {
      ExpectTaken([&](Options& o) { o.*range.field = range.low; });
    }
  }
}

TEST(OptionsTest, Multiples) {
  ExpectRefused([](Options& o) { o.head_dim_k = 72; }, {"head_dim_k", "72", "multiple of 16"});
  ExpectRefused([](Options& o) { o.head_dim_v = 100; }, {"head_dim_v", "100", "multiple of 16"});
  ExpectRefused([](Options& o) { o.sinks = 17; }, {"sinks", "17", "multiple of 16"});
}

TEST(OptionsTest, ListedValues) {
  for (const int bad : {-1, 8, 31, 33, 128}) {
    ExpectRefused([&](Options& o) { o.index_bytes = bad; },
                  {"index_bytes", absl::StrCat(bad), "16, 32, 48 or 64"});
  }
  for (const int bad : {-1, 1, 3, 8}) {
    ExpectRefused([&](Options& o) { o.value_bits = bad; },
                  {"value_bits", absl::StrCat(bad), "0, 2 or 4"});
  }
}

TEST(OptionsTest, HeadsOfLayers) {
  ExpectRefused([](Options& o) { o.num_kv_heads = 3; }, {"num_q_heads", "8", "3"});
  ExpectRefused([](Options& o) { o.num_layers = 2, o.layer_kv_heads = {2}; },
                {"layer_kv_heads", "1", "num_layers = 2"});
  ExpectRefused(
      [](Options& o) {
        o.num_layers = 2, o.layer_kv_heads = {2, 1025};
      },
      {"layer_kv_heads[1]", "1025", "1024"});
  ExpectRefused(
      [](Options& o) {
        o.num_layers = 2, o.layer_kv_heads = {-1, 2};
      },
      {"layer_kv_heads[0]", "-1", "0"});
  ExpectTaken([](Options& o) { o.num_layers = 3, o.layer_kv_heads = {0, 8, 2}; });
}

TEST(OptionsTest, SharedRowsHoldTheValueInTheKey) {
  ExpectRefused([](Options& o) { o.shared_kv = true, o.head_dim_k = 64, o.head_dim_v = 80; },
                {"head_dim_v", "80", "64"});
  ExpectTaken([](Options& o) { o.shared_kv = true, o.head_dim_k = 576, o.head_dim_v = 512; });
}

TEST(OptionsTest, ScaleIsFiniteAndHasADefault) {
  for (const float bad : {NAN, INFINITY, -.1f}) {
    ExpectRefused([&](Options& o) { o.softmax_scale = bad; },
                  {"softmax_scale", absl::StrCat(bad), "0 or more"});
  }
  Options options;
  options.head_dim_k = 64;
  ASSERT_TRUE(ResolveOptions(options).ok());
  EXPECT_EQ(options.softmax_scale, .125f);
  EXPECT_EQ(options.layer_kv_heads, std::vector<int32_t>{2});
}

TEST(OptionsTest, IndexBytesFollowHeadDim) {
  const std::vector<std::pair<int32_t, int32_t>> defaults = {{16, 32},  {64, 32},  {128, 32},
                                                             {192, 48}, {256, 64}, {576, 64}};
  for (const auto& [head_dim, bytes] : defaults) {
    Options options;
    options.index_bytes = 0;
    options.head_dim_k = options.head_dim_v = head_dim;
    ASSERT_TRUE(ResolveOptions(options).ok());
    EXPECT_EQ(options.index_bytes, bytes) << head_dim;
  }
}

TEST(OptionsTest, PoolHoldsABlockAtLeast) {
  Options options;
  ASSERT_TRUE(ResolveOptions(options).ok());
  const uint64_t block = MakeStorage(options).block.bytes;
  ExpectRefused([&](Options& o) { o.host_bytes = block - 1; },
                {"host_bytes", absl::StrCat(block - 1), absl::StrCat(block)});
  ExpectRefused([](Options& o) { o.host_bytes = ~uint64_t{0}; }, {"host_bytes", "64 TiB"});
  ExpectTaken([&](Options& o) { o.host_bytes = block; });
}

TEST(OptionsTest, StorageFollowsTheOptions) {
  Options options;
  options.value_bits = 2;
  options.index_bytes = 48;
  const Storage storage = MakeStorage(options);
  EXPECT_LE(storage.code.bytes(), 48);
  EXPECT_EQ(storage.value_code_bytes, 32);
  EXPECT_EQ(storage.block.bytes, 256 * (512 + storage.code.bytes() + 32));
  for (const IndexKind none : {IndexKind::kExact, IndexKind::kExternal}) {
    options.index = none;
    EXPECT_EQ(MakeStorage(options).code.bytes(), 0);
  }
}

// head_dim_k is 128.
TEST(OptionsTest, IndicesSayHowManyBytesTheyTake) {
  for (const auto& [index, bytes] :
       {std::pair{IndexKind::kHadamard2, 32}, {IndexKind::kPage, 32}, {IndexKind::kPooled, 16}}) {
    Options options;
    options.index = index;
    options.index_bytes = 7;  // not theirs to choose
    ASSERT_TRUE(ResolveOptions(options).ok());
    EXPECT_EQ(options.index_bytes, bytes);
    EXPECT_EQ(MakeStorage(options).code.bytes(), bytes);
  }
  for (const int32_t bytes : {4, 8, 16, 32}) {
    Options options;
    options.index = IndexKind::kSign;
    options.index_bytes = bytes;
    ASSERT_TRUE(ResolveOptions(options).ok());
    EXPECT_EQ(MakeStorage(options).code.bytes(), bytes);
  }
  Options clusters;
  clusters.index = IndexKind::kClusters;
  ASSERT_TRUE(ResolveOptions(clusters).ok());
  EXPECT_EQ(MakeStorage(clusters).code.bytes(), 2);
  EXPECT_EQ(MakeStorage(clusters).code.centroids, 1024);
  ExpectRefused([](Options& o) { o.index = IndexKind::kSign, o.index_bytes = 64; },
                {"index_bytes", "64", "4, 8, 16 or 32"});
  ExpectRefused([](Options& o) { o.index = IndexKind::kClusters, o.index_bytes = 8; },
                {"index_bytes", "8", "16, 32, 48 or 64"});
  ExpectRefused([](Options& o) { o.index = IndexKind::kHadamard2, o.head_dim_k = 272; },
                {"head_dim_k", "272", "256"});
  ExpectRefused([](Options& o) { o.index = IndexKind::kHadamard2, o.sign_maps = "maps"; },
                {"sign_maps", "index 3"});
}

}  // namespace
}  // namespace vattn
