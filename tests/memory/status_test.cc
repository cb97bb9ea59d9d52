#include "memory/status.h"

#include <gtest/gtest.h>

#include <set>
#include <string>
#include <utility>
#include <vector>

#include "api/vattn.h"

namespace vattn {
namespace {

struct Case {
  Code code;
  vattn_code c_code;
  const char* name;
  absl::Status status;
};

std::vector<Case> AllErrors() {
  return {
      {Code::kInvalidArgument, VATTN_INVALID_ARGUMENT, "INVALID_ARGUMENT",
       InvalidArgumentError("value ", 1)},
      {Code::kOutOfMemory, VATTN_OUT_OF_MEMORY, "OUT_OF_MEMORY", OutOfMemoryError("value ", 1)},
      {Code::kNotSupported, VATTN_NOT_SUPPORTED, "NOT_SUPPORTED", NotSupportedError("value ", 1)},
      {Code::kDeviceError, VATTN_DEVICE_ERROR, "DEVICE_ERROR", DeviceError("value ", 1)},
      {Code::kIoError, VATTN_IO_ERROR, "IO_ERROR", IoError("value ", 1)},
      {Code::kInternal, VATTN_INTERNAL, "INTERNAL", InternalError("value ", 1)},
      {Code::kFull, VATTN_FULL, "FULL", FullError("value ", 1)},
      {Code::kDeviceLost, VATTN_DEVICE_LOST, "DEVICE_LOST", DeviceLostError("value ", 1)},
      {Code::kDataLoss, VATTN_DATA_LOSS, "DATA_LOSS", DataLossError("value ", 1)},
      {Code::kNotFound, VATTN_NOT_FOUND, "NOT_FOUND", NotFoundError("value ", 1)},
  };
}

TEST(StatusTest, EveryCodeSurvivesTheRoundTrip) {
  std::set<absl::StatusCode> carriers;
  for (const Case& c : AllErrors()) {
    SCOPED_TRACE(c.name);
    EXPECT_FALSE(c.status.ok());
    EXPECT_EQ(CodeOf(c.status), c.code);
    EXPECT_EQ(static_cast<int32_t>(c.code), static_cast<int32_t>(c.c_code));
    EXPECT_STREQ(CodeName(c.code), c.name);
    EXPECT_EQ(std::string(c.status.message()), "value 1");
    carriers.insert(c.status.code());
  }
  EXPECT_EQ(carriers.size(), AllErrors().size());
}

TEST(StatusTest, NumbersHaveNoGapAndNamesOnlyKnownNumbers) {
  const int32_t count = static_cast<int32_t>(AllErrors().size()) + 1;
  for (int32_t number = 0; number < count; ++number) {
    EXPECT_STRNE(CodeName(static_cast<Code>(number)), "UNKNOWN") << number;
  }
  EXPECT_STREQ(CodeName(static_cast<Code>(count)), "UNKNOWN");
  EXPECT_STREQ(CodeName(static_cast<Code>(-1)), "UNKNOWN");
}

TEST(StatusTest, OkIsOk) {
  EXPECT_EQ(CodeOf(absl::OkStatus()), Code::kOk);
  EXPECT_EQ(static_cast<int32_t>(Code::kOk), static_cast<int32_t>(VATTN_OK));
}

TEST(StatusTest, ForeignCodesReadAsInternal) {
  EXPECT_EQ(CodeOf(absl::DeadlineExceededError("")), Code::kInternal);
  EXPECT_EQ(CodeOf(absl::OutOfRangeError("")), Code::kInternal);
}

TEST(StatusTest, OutOfRangeNamesArgumentValueAndLimits) {
  const absl::Status status = OutOfRangeError("head_dim_k", 12, 16, 1024);
  EXPECT_EQ(CodeOf(status), Code::kInvalidArgument);
  EXPECT_EQ(std::string(status.message()), "head_dim_k is 12, must be 16 to 1024");
}

TEST(StatusTest, ReturnIfErrorReturnsErrorsOnly) {
  int evaluations = 0;
  const auto pass_on = [&](absl::Status status) -> absl::Status {
    VATTN_RETURN_IF_ERROR((++evaluations, std::move(status)));
    return FullError("went on");
  };
  EXPECT_EQ(CodeOf(pass_on(absl::OkStatus())), Code::kFull);
  EXPECT_EQ(CodeOf(pass_on(IoError("disk"))), Code::kIoError);
  EXPECT_EQ(evaluations, 2);
}

}  // namespace
}  // namespace vattn
