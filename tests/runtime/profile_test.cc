#include "runtime/index/profile.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "memory/status.h"
#include "runtime/runtime.h"
#include "runtime/sequence.h"

namespace vattn {
namespace {

using nlohmann::json;

constexpr int kDim = 16, kLayers = 2, kHeads = 2, kMatrix = kDim * kDim;

// Two layers with two KV heads and one; softmax_scale is .25, a power of 2.
Options MakeOptions() {
  Options options;
  options.num_layers = kLayers, options.num_q_heads = 4, options.layer_kv_heads = {kHeads, 1};
  options.head_dim_k = kDim, options.head_dim_v = kDim, options.dtype = DType::kF32;
  options.window = 32, options.exact_below = 64;
  options.num_threads = 1;
  options.host_bytes = 8 << 20;
  EXPECT_TRUE(ResolveOptions(options).ok());
  return options;
}

// A file whose c_q counts up from 0, to be changed before it is written.
class ProfileTest : public testing::Test {
 protected:
  ProfileTest()
      : path_(std::filesystem::temp_directory_path() /
              ("vattn_profile_test." + std::to_string(getpid()))),
        values_(kLayers * kHeads * kMatrix) {
    for (size_t i = 0; i < values_.size(); ++i) values_[i] = static_cast<float>(i);
    header_["__metadata__"] = {{"format", "vattn-profile-1"}, {"softmax_scale", "0.25"}};
    header_["c_q"] = {{"dtype", "F32"},
                      {"shape", {kLayers, kHeads, kDim, kDim}},
                      {"data_offsets", {0, values_.size() * 4}}};
  }
  ~ProfileTest() override { std::filesystem::remove(path_); }

  static std::string Length(uint64_t length) {
    std::string bytes(8, '\0');
    for (int i = 0; i < 8; ++i) bytes[i] = static_cast<char>(length >> 8 * i);
    return bytes;
  }

  std::string Data() const {
    return {reinterpret_cast<const char*>(values_.data()), values_.size() * 4};
  }
  std::string File() const {
    const std::string header = header_.dump();
    return Length(header.size()) + header + Data();
  }
  void Write(const std::string& file) const { std::ofstream(path_, std::ios::binary) << file; }

  // The status of the file as it lies there.
  absl::Status ReadBack() const { return Profile::Read(path_, MakeOptions()).status(); }

  // Refused with `code`; the text has the path and every one of `parts`.
  void ExpectRefused(const std::string& file, Code code,
                     const std::vector<std::string>& parts) const {
    Write(file);
    const absl::Status status = ReadBack();
    EXPECT_EQ(CodeOf(status), code) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), path_)) << status;
    for (const std::string& part : parts) {
      EXPECT_TRUE(absl::StrContains(status.message(), part)) << status << " / " << part;
    }
  }
  void ExpectRefused(Code code, const std::vector<std::string>& parts) const {
    ExpectRefused(File(), code, parts);
  }

  const std::string path_;
  json header_;
  std::vector<float> values_;
};

TEST_F(ProfileTest, ReadsEveryMatrix) {
  Write(File());
  const absl::StatusOr<Profile> profile = Profile::Read(path_, MakeOptions());
  ASSERT_TRUE(profile.ok()) << profile.status();
  for (int layer = 0; layer < kLayers; ++layer) {
    for (int head = 0; head < kHeads; ++head) {
      const std::vector<double> mean = profile->Moment(layer, head).Mean();
      ASSERT_EQ(mean.size(), static_cast<size_t>(kMatrix));
      for (int i = 0; i < kMatrix; ++i) ASSERT_EQ(mean[i], (layer * kHeads + head) * kMatrix + i);
    }
  }
}

TEST_F(ProfileTest, ScalesToTheOptions) {
  header_["__metadata__"]["softmax_scale"] = "0.125";
  Write(File());
  const absl::StatusOr<Profile> profile = Profile::Read(path_, MakeOptions());
  ASSERT_TRUE(profile.ok()) << profile.status();
  EXPECT_EQ(profile->Moment(0, 0).Mean()[3], 4 * 3);
}

TEST_F(ProfileTest, RefusesPathsThatAreNoFile) {
  for (const auto& [path, code] :
       {std::pair<std::string, Code>{path_ + ".nowhere", Code::kNotFound},
        {"/dev/zero", Code::kIoError},
        {std::filesystem::temp_directory_path(), Code::kIoError}}) {
    const absl::Status status = Profile::Read(path, MakeOptions()).status();
    EXPECT_EQ(CodeOf(status), code) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), path)) << status;
  }
}

TEST_F(ProfileTest, RefusesEveryTruncation) {
  Write(File());
  for (size_t size = File().size(); size-- > 0;) {
    std::filesystem::resize_file(path_, size);
    ASSERT_EQ(CodeOf(ReadBack()), Code::kDataLoss) << size << " bytes: " << ReadBack();
  }
}

TEST_F(ProfileTest, RefusesBrokenHeaders) {
  const std::string file = File();
  for (const uint64_t length : {uint64_t{0}, uint64_t{1}, file.size() - 7, uint64_t{1} << 32,
                                uint64_t{1} << 63, UINT64_MAX, UINT64_MAX - 7}) {
    ExpectRefused(Length(length) + file.substr(8), Code::kDataLoss, {"header"});
  }
  for (const std::string header : {"[]", "3", "{", "{\"c_q\": }", "\xff\xfe"}) {
    ExpectRefused(Length(header.size()) + header + Data(), Code::kDataLoss,
                  {"header is no JSON object"});
  }
  const std::string deep(100000, '[');
  ExpectRefused(Length(deep.size()) + deep, Code::kDataLoss,
                {"header nests deeper than 64 levels"});
  // Well-formed ones, in entries that are looked at and in others.
  const std::string lists = std::string(500000, '[') + std::string(500000, ']');
  for (const std::string& header :
       {"{\"__metadata__\":{\"format\":" + lists + "}}",
        "{\"__metadata__\":{\"format\":\"vattn-profile-1\",\"x\":" + lists + "}}",
        "{\"c_q\":" + lists + "}", "{\"other\":" + lists + "}"}) {
    ExpectRefused(Length(header.size()) + header, Code::kDataLoss,
                  {"header nests deeper than 64 levels"});
  }
}

// Some of them are accepted: what counts is that nothing outside the file is read.
TEST_F(ProfileTest, SurvivesEveryChangedHeaderByte) {
  const std::string file = File();
  Write(file);
  std::fstream changed(path_, std::ios::binary | std::ios::in | std::ios::out);
  for (size_t i = 0; i < file.size() - Data().size(); ++i) {
    for (const char c : {'\0', '9', '"', '}', '\xff', file[i]}) {
      changed.seekp(static_cast<std::streamoff>(i)).put(c).flush();
      ReadBack().IgnoreError();
    }
  }
  EXPECT_TRUE(ReadBack().ok());
}

TEST_F(ProfileTest, RefusesOtherFormats) {
  const json good = header_;
  for (const json& format : {json("vattn-trace-1"), json("vattn-profile-2"), json(1), json()}) {
    header_["__metadata__"]["format"] = format;
    ExpectRefused(Code::kInvalidArgument,
                  {"__metadata__.format is " + format.dump(), "must be \"vattn-profile-1\""});
  }
  header_["__metadata__"] = 5;
  ExpectRefused(Code::kInvalidArgument, {"__metadata__ is 5"});
  header_.erase("__metadata__");
  ExpectRefused(Code::kInvalidArgument, {"__metadata__.format is null"});
  header_ = good;
  for (const json& scale : {json(""), json("x"), json("0"), json("-1"), json("nan"), json("inf"),
                            json("0.25 "), json(.25), json()}) {
    header_["__metadata__"]["softmax_scale"] = scale;
    ExpectRefused(Code::kInvalidArgument,
                  {"__metadata__.softmax_scale is " + scale.dump(), "over 0"});
  }
}

TEST_F(ProfileTest, RefusesOtherTensors) {
  const json good = header_;
  for (const json& dtype : {json("F16"), json(3), json()}) {
    header_["c_q"]["dtype"] = dtype;
    ExpectRefused(Code::kInvalidArgument, {"c_q.dtype is " + dtype.dump(), "must be \"F32\""});
  }
  header_ = good;
  for (const json& shape :
       {json("x"), json({2, 2, 16}), json({2, 2, 16, 16, 1}), json({1, 2, 16, 16}),
        json({2, 1, 16, 16}), json({2, 2, 32, 16}), json({2, 2, 16, 32}), json({2, 2, 16, -16}),
        json({uint64_t{1} << 63, 2, 16, 16}), json()}) {
    header_["c_q"]["shape"] = shape;
    ExpectRefused(Code::kInvalidArgument, {"c_q.shape is " + shape.dump(), "must be [2,2,16,16]"});
  }
  header_ = good;
  for (const json& offsets :
       {json("x"), json::array({0}), json({-8, 4088}), json({4096, 0}), json({4, 4100}),
        json({0, 4092}), json({UINT64_MAX - 4095, UINT64_MAX}), json()}) {
    header_["c_q"]["data_offsets"] = offsets;
    ExpectRefused(Code::kDataLoss, {"c_q.data_offsets is " + offsets.dump(), "must be"});
  }
  header_["c_q"] = 7;
  ExpectRefused(Code::kInvalidArgument, {"tensor c_q is missing"});
  header_.erase("c_q");
  ExpectRefused(Code::kInvalidArgument, {"tensor c_q is missing"});
}

TEST_F(ProfileTest, RefusesValuesThatAreNotFinite) {
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    values_[777] = bad;
    ExpectRefused(Code::kDataLoss, {"c_q element 777 is ", "must be finite"});
  }
}

// Tables of the index of every (layer, KV head) of a sequence of 600 random tokens, with queries or
// without.
std::vector<std::vector<float>> Tables(const std::string& profile,
                                       const std::vector<float>& queries) {
  Options options = MakeOptions();
  options.profile = profile;
  const absl::StatusOr<std::shared_ptr<Runtime>> runtime = Runtime::Create(options, nullptr);
  EXPECT_TRUE(runtime.ok()) << runtime.status();
  absl::StatusOr<std::unique_ptr<Sequence>> sequence = Sequence::Create(*runtime, {.id = 1});
  EXPECT_TRUE(sequence.ok()) << sequence.status();
  constexpr int64_t kTokens = 600;
  std::mt19937 engine(3);
  std::normal_distribution<float> normal;
  std::vector<float> rows(kTokens * kHeads * kDim);
  for (float& x : rows) x = normal(engine);
  std::vector<std::vector<float>> tables;
  for (int layer = 0; layer < kLayers; ++layer) {
    const int64_t heads = (*runtime)->kv_heads(layer);
    AppendRequest request;
    request.layer = layer;
    request.num_tokens = kTokens;
    request.k = request.v = rows.data();
    request.k_token_stride = request.v_token_stride = heads * kDim;
    request.k_head_stride = request.v_head_stride = kDim;
    request.num_queries = static_cast<int>(queries.size() / (4 * kDim));
    request.q = queries.data();
    request.q_token_stride = 4 * kDim, request.q_head_stride = kDim;
    EXPECT_TRUE((*sequence)->Append(request).ok());
  }
  EXPECT_TRUE((*sequence)->BuildIndex().ok());
  for (int layer = 0; layer < kLayers; ++layer) {
    for (const KvHead& kv_head : (*sequence)->layer(layer).kv_heads) {
      tables.push_back(kv_head.tables[0].index->floats());
    }
  }
  return tables;
}

// Queries of 64 tokens with 4 heads, small whole numbers: their moments are exact in fp32.
std::vector<float> WholeQueries(uint32_t seed) {
  std::mt19937 engine(seed);
  std::vector<float> queries(64 * 4 * kDim);
  for (size_t i = 0; i < queries.size(); ++i) {
    queries[i] = static_cast<float>(static_cast<int>(engine() % 5) - 2) * static_cast<float>(i % 7);
  }
  return queries;
}

// The mean of q q^T of query heads [begin, end), scaled by .25.
void FillMoment(const std::vector<float>& queries, int begin, int end, float* to) {
  for (int i = 0; i < kMatrix; ++i) {
    double sum = 0;
    for (int at = 0; at < 64 * 4; ++at) {
      if (at % 4 < begin || at % 4 >= end) continue;
      const float* q = &queries[at * kDim];
      sum += .0625 * static_cast<double>(q[i / kDim]) * static_cast<double>(q[i % kDim]);
    }
    to[i] = static_cast<float>(sum / (64 * (end - begin)));
  }
}

TEST_F(ProfileTest, AnIndexFromAProfileIsThatFromTheSameQueries) {
  const std::vector<float> queries = WholeQueries(1), others = WholeQueries(2);
  FillMoment(queries, 0, 2, &values_[0]);
  FillMoment(queries, 2, 4, &values_[kMatrix]);
  FillMoment(queries, 0, 4, &values_[2 * kMatrix]);
  Write(File());
  const auto prompt = Tables("", queries), profile = Tables(path_, {}), identity = Tables("", {});
  ASSERT_EQ(prompt.size(), 3u);
  EXPECT_EQ(profile, prompt);
  for (size_t i = 0; i < prompt.size(); ++i) EXPECT_NE(profile[i], identity[i]) << i;
  // Queries of the sequence's own come first.
  EXPECT_EQ(Tables(path_, others), Tables("", others));
  EXPECT_NE(Tables(path_, others), profile);
}

TEST_F(ProfileTest, ARuntimeWithoutItsProfileIsNotMade) {
  Options options = MakeOptions();
  options.profile = path_;
  EXPECT_EQ(CodeOf(Runtime::Create(options, nullptr).status()), Code::kNotFound);
  Write(File());
  EXPECT_TRUE(Runtime::Create(options, nullptr).ok());
  options.num_layers = 1, options.layer_kv_heads = {2};
  EXPECT_EQ(CodeOf(Runtime::Create(options, nullptr).status()), Code::kInvalidArgument);
}

}  // namespace
}  // namespace vattn
