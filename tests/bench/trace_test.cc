#include "bench/trace/trace.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "api/vattn.h"
#include "bench/cli/dtype.h"
#include "bench/cli/failure.h"

namespace vattn::bench {
namespace {

using nlohmann::json;

class TraceTest : public testing::Test {
 protected:
  TraceTest() {
    path_ = testing::TempDir() + "vattn_trace_test_" +
            testing::UnitTest::GetInstance()->current_test_info()->name() + ".safetensors";
    header_["__metadata__"] = {{"format", "vattn-trace-1"}, {"prompt_tokens", "6"}};
    Add("k", {2, 1, 9, 4}, "F32");
    Add("v", {2, 1, 9, 4}, "F32");
    Add("q", {2, 3, 3, 4}, "F32");
    Add("q_prompt", {2, 3, 5, 4}, "F32");
  }
  ~TraceTest() override { std::filesystem::remove(path_); }

  // Appends a tensor whose elements count up from 0.
  void Add(const std::string& name, const std::vector<int64_t>& shape, const std::string& dtype) {
    size_t count = 1;
    for (const int64_t extent : shape) count *= extent;
    std::vector<float> values(count);
    for (size_t i = 0; i < count; ++i) values[i] = static_cast<float>(i);
    const int32_t type = dtype == "F32" ? VATTN_F32 : dtype == "F16" ? VATTN_F16 : VATTN_BF16;
    std::string bytes(count * ElementBytes(type), '\0');
    FromFloat(type, values.data(), count, bytes.data());
    header_[name] = {{"dtype", dtype},
                     {"shape", shape},
                     {"data_offsets", {data_.size(), data_.size() + bytes.size()}}};
    data_ += bytes;
  }

  static std::string Length(uint64_t length) {
    std::string bytes(8, '\0');
    for (int i = 0; i < 8; ++i) bytes[i] = static_cast<char>(length >> 8 * i);
    return bytes;
  }

  std::string File() const {
    const std::string header = header_.dump();
    return Length(header.size()) + header + data_;
  }

  void Write(const std::string& file) const { std::ofstream(path_, std::ios::binary) << file; }

  Trace Read(const std::string& file) const {
    Write(file);
    return ReadTrace(path_);
  }

  // The text of the failure, "" if the file as it is was accepted.
  std::string Complaint() const {
    try {
      ReadTrace(path_);
      return "";
    } catch (const Failure& failure) {
      return failure.what();
    }
  }
  std::string Complaint(const std::string& file) const {
    Write(file);
    return Complaint();
  }

  void ExpectComplaint(const std::string& about) const {
    const std::string text = Complaint(File());
    EXPECT_NE(text.find(about), std::string::npos) << "complaint: " << text;
    EXPECT_NE(text.find(path_), std::string::npos) << "complaint: " << text;
  }

  std::string path_, data_;
  json header_;
};

TEST_F(TraceTest, ReadsEveryField) {
  const Trace trace = Read(File());
  EXPECT_EQ(trace.layers, 2);
  EXPECT_EQ(trace.kv_heads, 1);
  EXPECT_EQ(trace.q_heads, 3);
  EXPECT_EQ(trace.tokens, 9);
  EXPECT_EQ(trace.prompt_tokens, 6);
  EXPECT_EQ(trace.steps, 3);
  EXPECT_EQ(trace.prompt_queries, 5);
  EXPECT_EQ(trace.head_dim_k, 4);
  EXPECT_EQ(trace.head_dim_v, 4);
  EXPECT_EQ(trace.dtype, VATTN_F32);
  float row[4];
  ToFloat(trace.dtype, trace.q.Row(1, 2, 1), 4, row);
  EXPECT_EQ(row[3], ((1 * 3 + 2) * 3 + 1) * 4 + 3);
}

TEST_F(TraceTest, PromptQueriesAreOptional) {
  header_.erase("q_prompt");
  EXPECT_EQ(Read(File()).prompt_queries, 0);
}

TEST_F(TraceTest, KeepsHalfTypesAndWidensMixedOnes) {
  for (const char* dtype : {"F16", "BF16"}) {
    Add("k", {2, 1, 9, 4}, dtype);
    Add("v", {2, 1, 9, 4}, dtype);
    Add("q", {2, 3, 3, 4}, dtype);
    Add("q_prompt", {2, 3, 5, 4}, dtype);
    EXPECT_NE(Read(File()).dtype, VATTN_F32);
    Add("q", {2, 3, 3, 4}, "F32");
    const Trace mixed = Read(File());
    EXPECT_EQ(mixed.dtype, VATTN_F32);
    EXPECT_EQ(mixed.k.dtype, VATTN_F32);
    float row[4];
    std::memcpy(row, mixed.k.Row(1, 0, 8), sizeof(row));
    EXPECT_EQ(row[3], 71);
  }
}

TEST_F(TraceTest, ReadsTensorsAtOddOffsets) {
  header_["__metadata__"]["pad"] = header_.dump().size() % 2 ? "xx" : "x";
  EXPECT_EQ(Read(File()).steps, 3);
  header_["__metadata__"]["pad"] = header_.dump().size() % 2 ? "xx" : "x";
  EXPECT_EQ(Read(File()).steps, 3);
}

TEST_F(TraceTest, NamesLayersFromMetadata) {
  header_["__metadata__"]["layers"] = "3,17";
  EXPECT_EQ(Read(File()).layer_names, (std::vector<std::string>{"3", "17"}));
  header_["__metadata__"]["layers"] = "3";  // does not fit: places in the file
  EXPECT_EQ(Read(File()).layer_names, (std::vector<std::string>{"0", "1"}));
}

TEST_F(TraceTest, RefusesEveryTruncation) {
  // Cut in place: writing some thousand files anew takes seconds.
  Write(File());
  for (size_t size = File().size(); size-- > 0;) {
    std::filesystem::resize_file(path_, size);
    ASSERT_NE(Complaint(), "") << size << " bytes";
  }
}

TEST_F(TraceTest, RefusesDeepHeaders) {
  const std::string lists = std::string(500000, '[') + std::string(500000, ']');
  for (const std::string& header :
       {"{\"__metadata__\":{\"format\":" + lists + "}}", "{\"k\":" + lists + "}", lists}) {
    EXPECT_NE(Complaint(Length(header.size()) + header).find("nests deeper than 64 levels"),
              std::string::npos);
  }
}

TEST_F(TraceTest, RefusesHeaderLengths) {
  const std::string file = File();
  for (const uint64_t length : {uint64_t{0}, uint64_t{1}, file.size() - 7, file.size(),
                                uint64_t{1} << 32, uint64_t{1} << 63, UINT64_MAX, UINT64_MAX - 7}) {
    EXPECT_NE(Complaint(Length(length) + file.substr(8)), "") << length;
  }
}

// Some of them are accepted: what counts is that nothing outside the file is read.
TEST_F(TraceTest, SurvivesEveryChangedHeaderByte) {
  const std::string file = File();
  Write(file);
  std::fstream changed(path_, std::ios::binary | std::ios::in | std::ios::out);
  for (size_t i = 0; i < file.size() - data_.size(); ++i) {
    for (const char c : {'\0', '9', '"', '}', '\xff', file[i]}) {
      changed.seekp(static_cast<std::streamoff>(i)).put(c).flush();
      Complaint();
    }
  }
  EXPECT_EQ(Complaint(), "");
}

TEST_F(TraceTest, RefusesHeadersThatAreNoObject) {
  for (const std::string header : {"", "[]", "3", "{", "{\"k\": }", "\xff\xfe"}) {
    EXPECT_NE(Complaint(Length(header.size()) + header + data_), "") << header;
  }
  const std::string deep(100000, '[');
  EXPECT_NE(Complaint(Length(deep.size()) + deep), "");
}

TEST_F(TraceTest, RefusesMissingTensors) {
  for (const char* name : {"k", "v", "q"}) {
    const json removed = header_[name];
    header_.erase(name);
    ExpectComplaint(std::string("tensor ") + name + ": missing");
    header_[name] = 7;
    ExpectComplaint(std::string("tensor ") + name + ": not a JSON object");
    header_[name] = removed;
  }
}

TEST_F(TraceTest, RefusesDTypes) {
  for (const json& dtype : {json("F64"), json("I8"), json(""), json(4), json()}) {
    header_["v"]["dtype"] = dtype;
    ExpectComplaint("v.dtype");
  }
  header_["v"].erase("dtype");
  ExpectComplaint("v.dtype");
}

TEST_F(TraceTest, RefusesShapes) {
  const uint64_t large = uint64_t{1} << 62;
  for (const json& shape :
       {json("x"), json({2, 1, 9}), json({2, 1, 9, 4, 1}), json({2, 1, 9, 0}), json({2, 1, -9, 4}),
        json({2, 1, 9.5, 4}), json({2, 1, "9", 4}), json({large, large, large, large}),
        json({UINT64_MAX, 1, 1, 1}), json({uint64_t{1} << 32, uint64_t{1} << 32, 1, 1}),
        json({large, 2, 2, 1}), json()}) {
    header_["k"]["shape"] = shape;
    ExpectComplaint("k.shape");
  }
}

TEST_F(TraceTest, RefusesOffsets) {
  const uint64_t end = data_.size();
  for (const json& offsets :
       {json("x"), json::array({0}), json({0, 1, 2}), json({-8, 280}), json({288, 0}),
        json({end - 8, end + 280}), json({uint64_t{1} << 63, (uint64_t{1} << 63) + 288}),
        json({UINT64_MAX - 287, UINT64_MAX}), json({0, 284}), json({0, 292}), json({.5, 288.5}),
        json()}) {
    header_["k"]["data_offsets"] = offsets;
    ExpectComplaint("k.data_offsets");
  }
}

TEST_F(TraceTest, RefusesShapesThatDisagree) {
  const json good = header_;
  const auto expect = [&](const char* name, const std::vector<int64_t>& shape,
                          const char* complaint) {
    header_ = good;
    Add(name, shape, "F32");
    ExpectComplaint(complaint);
  };
  expect("v", {1, 1, 9, 4}, "v axis 0.shape");
  expect("v", {2, 3, 9, 4}, "v axis 1.shape");
  expect("v", {2, 1, 8, 4}, "v axis 2.shape");
  expect("q", {1, 3, 3, 4}, "q axis 0.shape");
  expect("q", {2, 3, 3, 5}, "q axis 3.shape");
  expect("q", {2, 3, 4, 4}, "k.shape");  // a step more than there are tokens
  expect("q_prompt", {2, 2, 5, 4}, "q_prompt axis 1.shape");
  expect("q_prompt", {2, 3, 7, 4}, "q_prompt.shape");  // longer than the prompt
  expect("k", {2, 1, 9, 5000}, "head_dim");
  header_ = good;
  Add("k", {2, 2, 9, 4}, "F32");
  Add("v", {2, 2, 9, 4}, "F32");
  ExpectComplaint("no multiple");
}

TEST_F(TraceTest, RefusesMetadata) {
  for (const char* text : {"", "x", "-1", "0", "6x", " 6", "7", "9", "9223372036854775807",
                           "99999999999999999999", "6.0"}) {
    header_["__metadata__"]["prompt_tokens"] = text;
    ExpectComplaint("prompt_tokens");
  }
  header_["__metadata__"]["prompt_tokens"] = 6;
  ExpectComplaint("__metadata__.prompt_tokens");
  header_["__metadata__"].erase("prompt_tokens");
  ExpectComplaint("__metadata__.prompt_tokens");
  header_["__metadata__"] = {{"format", "pt"}, {"prompt_tokens", "6"}};
  ExpectComplaint("__metadata__.format");
  header_.erase("__metadata__");
  ExpectComplaint("__metadata__");
}

TEST_F(TraceTest, RefusesValuesThatAreNotFinite) {
  for (const uint32_t bits : {0x7f800000u, 0xff800000u, 0x7fc00000u}) {
    const size_t element = 17 * sizeof(float);
    std::string good = data_;
    std::memcpy(&data_[element], &bits, sizeof(bits));
    ExpectComplaint("tensor k: element 17");
    data_ = good;
  }
}

TEST_F(TraceTest, RefusesPathsThatAreNoFile) {
  EXPECT_THROW(ReadTrace(testing::TempDir()), Failure);
  EXPECT_THROW(ReadTrace(path_ + ".nowhere"), Failure);
  EXPECT_THROW(ReadTrace("/dev/zero"), Failure);
}

TEST(DTypeTest, HalfRoundTripsEveryNumber) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    if ((half & 0x7c00) == 0x7c00 && (half & 0x3ff) != 0) continue;  // NaN
    float value;
    ToFloat(VATTN_F16, &half, 1, &value);
    uint16_t back;
    FromFloat(VATTN_F16, &value, 1, &back);
    ASSERT_EQ(back, half) << value;
  }
}

TEST(DTypeTest, RoundsToNearestEven) {
  const auto rounded = [](int32_t dtype, float value) {
    uint16_t bits;
    FromFloat(dtype, &value, 1, &bits);
    ToFloat(dtype, &bits, 1, &value);
    return value;
  };
  EXPECT_EQ(rounded(VATTN_F16, 1 + 0x1p-11f), 1);                // tie, down to even
  EXPECT_EQ(rounded(VATTN_F16, 1 + 3 * 0x1p-11f), 1 + 0x1p-9f);  // tie, up to even
  EXPECT_EQ(rounded(VATTN_F16, 0x1p-25f), 0);
  EXPECT_EQ(rounded(VATTN_F16, 1.5f * 0x1p-25f), 0x1p-24f);
  EXPECT_EQ(rounded(VATTN_F16, 65519), 65504);
  EXPECT_EQ(rounded(VATTN_F16, 65520), INFINITY);
  EXPECT_EQ(rounded(VATTN_BF16, 1 + 0x1p-8f), 1);
  EXPECT_EQ(rounded(VATTN_BF16, 1 + 3 * 0x1p-8f), 1 + 0x1p-6f);
}

}  // namespace
}  // namespace vattn::bench
