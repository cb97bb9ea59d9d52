#include "runtime/index/sign_maps.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "memory/status.h"
#include "runtime/runtime.h"
#include "runtime/sequence.h"

namespace vattn {
namespace {

using nlohmann::json;

constexpr int kDim = 16, kBits = 32, kLayers = 2, kHeads = 2, kMap = kBits * kDim;

Options MakeOptions(const std::string& path) {
  Options options;
  options.num_layers = kLayers, options.num_q_heads = 4, options.layer_kv_heads = {kHeads, 1};
  options.head_dim_k = kDim, options.head_dim_v = kDim, options.dtype = DType::kF32;
  options.window = 32, options.exact_below = 64;
  options.num_threads = 1, options.backend = BackendKind::kCpu;
  options.host_bytes = 8 << 20;
  options.index = IndexKind::kSign, options.index_bytes = kBits / 8;
  options.sign_maps = path;
  return options;
}

// A file with maps of key 0, 1, 2, ... and of query the same negated.
class SignMapsTest : public testing::Test {
 protected:
  SignMapsTest()
      : path_(std::filesystem::temp_directory_path() /
              ("vattn_sign_maps_test." + std::to_string(getpid()))),
        values_(2 * kLayers * kHeads * kMap) {
    const size_t half = values_.size() / 2;
    for (size_t i = 0; i < half; ++i)
      values_[i] = static_cast<float>(i), values_[half + i] = -values_[i];
    const json shape = {kLayers, kHeads, kBits, kDim};
    header_["__metadata__"] = {{"format", "vattn-sign-1"}};
    header_["key"] = {{"dtype", "F32"}, {"shape", shape}, {"data_offsets", {0, half * 4}}};
    header_["query"] = {{"dtype", "F32"}, {"shape", shape}, {"data_offsets", {half * 4, half * 8}}};
  }
  ~SignMapsTest() override { std::filesystem::remove(path_); }

  void Write() const {
    const std::string header = header_.dump();
    std::ofstream file(path_, std::ios::binary);
    for (int i = 0; i < 8; ++i) file.put(static_cast<char>(header.size() >> 8 * i));
    file << header;
    file.write(reinterpret_cast<const char*>(values_.data()),
               static_cast<std::streamsize>(values_.size() * 4));
  }
  void ExpectRefused(Code code, const std::string& text) const {
    Write();
    const absl::Status status = Runtime::Create(MakeOptions(path_), nullptr).status();
    EXPECT_EQ(CodeOf(status), code) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), text)) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), path_)) << status;
  }

  const std::string path_;
  json header_;
  std::vector<float> values_;
};

TEST_F(SignMapsTest, EveryHeadHasItsMap) {
  Write();
  Options options = MakeOptions(path_);
  ASSERT_TRUE(ResolveOptions(options).ok());
  const absl::StatusOr<SignMaps> maps = SignMaps::Read(path_, options);
  ASSERT_TRUE(maps.ok()) << maps.status();
  for (int layer = 0; layer < kLayers; ++layer) {
    for (int head = 0; head < kHeads; ++head) {
      const SignMap map = maps->Map(layer, head);
      for (int i = 0; i < kMap; ++i) {
        ASSERT_EQ(map.key[i], (layer * kHeads + head) * kMap + i);
        ASSERT_EQ(map.query[i], -map.key[i]);
      }
    }
  }
}

// The index of a sequence has the maps of its layer and head.
TEST_F(SignMapsTest, SequencesUseThem) {
  Write();
  absl::StatusOr<std::shared_ptr<Runtime>> runtime = Runtime::Create(MakeOptions(path_), nullptr);
  ASSERT_TRUE(runtime.ok()) << runtime.status();
  absl::StatusOr<std::unique_ptr<Sequence>> sequence = Sequence::Create(*runtime, {.id = 1});
  std::vector<float> rows(400 * kHeads * kDim);
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<float>(i % 37) - 18;
  for (int l = 0; l < kLayers; ++l) {
    const int heads = l == 0 ? kHeads : 1;
    ASSERT_TRUE((*sequence)
                    ->Append({.layer = l,
                              .num_tokens = 400,
                              .k = rows.data(),
                              .v = rows.data(),
                              .k_token_stride = heads * kDim,
                              .k_head_stride = kDim,
                              .v_token_stride = heads * kDim,
                              .v_head_stride = kDim})
                    .ok());
  }
  ASSERT_TRUE((*sequence)->BuildIndex().ok());
  const IndexTables tables = (*sequence)->layer(1).kv_heads[0].tables[0].index->tables();
  EXPECT_EQ(tables.encode[3 * kBits + 5], 2 * kMap + 5 * kDim + 3);
  EXPECT_EQ(tables.project[5 * kDim + 3], -(2 * kMap + 5 * kDim + 3));
}

TEST_F(SignMapsTest, RefusesOtherFiles) {
  const json good = header_;
  header_["__metadata__"]["format"] = "vattn-sign-2";
  ExpectRefused(Code::kInvalidArgument,
                "__metadata__.format is \"vattn-sign-2\", must be \"vattn-sign-1\"");
  header_ = good;
  header_["query"]["shape"] = {kLayers, kHeads, kBits, 2 * kDim};
  ExpectRefused(Code::kInvalidArgument, "query.shape is [2,2,32,32], must be [2,2,32,16]");
  header_ = good;
  header_.erase("key");
  ExpectRefused(Code::kInvalidArgument, "tensor key is missing");
  header_ = good;
  values_.pop_back();
  ExpectRefused(Code::kDataLoss, "query.data_offsets is");
  const absl::Status missing = Runtime::Create(MakeOptions("/no/such/file"), nullptr).status();
  EXPECT_EQ(CodeOf(missing), Code::kNotFound);
}

}  // namespace
}  // namespace vattn
