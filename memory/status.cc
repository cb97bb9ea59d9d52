#include "memory/status.h"

#include <cassert>

namespace vattn {
namespace {

struct CodeEntry {
  Code code;
  absl::StatusCode carrier;
  const char* name;
};

constexpr CodeEntry kCodes[] = {
    {Code::kOk, absl::StatusCode::kOk, "OK"},
    {Code::kInvalidArgument, absl::StatusCode::kInvalidArgument, "INVALID_ARGUMENT"},
    {Code::kOutOfMemory, absl::StatusCode::kResourceExhausted, "OUT_OF_MEMORY"},
    {Code::kNotSupported, absl::StatusCode::kUnimplemented, "NOT_SUPPORTED"},
    {Code::kDeviceError, absl::StatusCode::kAborted, "DEVICE_ERROR"},
    {Code::kIoError, absl::StatusCode::kUnknown, "IO_ERROR"},
    {Code::kInternal, absl::StatusCode::kInternal, "INTERNAL"},
    {Code::kFull, absl::StatusCode::kUnavailable, "FULL"},
    {Code::kDeviceLost, absl::StatusCode::kFailedPrecondition, "DEVICE_LOST"},
    {Code::kDataLoss, absl::StatusCode::kDataLoss, "DATA_LOSS"},
    {Code::kNotFound, absl::StatusCode::kNotFound, "NOT_FOUND"},
};

}  // namespace

Code CodeOf(const absl::Status& status) {
  for (const CodeEntry& entry : kCodes) {
    if (entry.carrier == status.code()) return entry.code;
  }
  return Code::kInternal;
}

const char* CodeName(Code code) {
  for (const CodeEntry& entry : kCodes) {
    if (entry.code == code) return entry.name;
  }
  return "UNKNOWN";
}

absl::Status MakeError(Code code, absl::string_view message) {
  assert(code != Code::kOk);
  for (const CodeEntry& entry : kCodes) {
    if (entry.code == code) return absl::Status(entry.carrier, message);
  }
  return absl::InternalError(message);
}

}  // namespace vattn
