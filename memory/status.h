// Errors of the C++ side: absl::Status whose code stands for exactly one vattn_code.
//
// absl::Status carries absl's own codes, so each Code travels as one fixed absl::StatusCode. This
// table is the whole mapping, both ways; any other absl code (none is made here) reads as
// kInternal.
//
//   Code               absl::StatusCode      Code            absl::StatusCode
//   kOk                kOk                   kInternal       kInternal
//   kInvalidArgument   kInvalidArgument      kFull           kUnavailable (free something, retry)
//   kOutOfMemory       kResourceExhausted    kDeviceLost     kFailedPrecondition
//   kNotSupported      kUnimplemented        kDataLoss       kDataLoss
//   kDeviceError       kAborted              kNotFound       kNotFound
//   kIoError           kUnknown
//
// Make errors with the constructors below, not with absl's.
#ifndef VATTN_MEMORY_STATUS_H_
#define VATTN_MEMORY_STATUS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace vattn {

// The numbers of vattn_code.
enum class Code : int32_t {
  kOk = 0,
  kInvalidArgument = 1,
  kOutOfMemory = 2,
  kNotSupported = 3,
  kDeviceError = 4,
  kIoError = 5,
  kInternal = 6,
  kFull = 7,
  kDeviceLost = 8,
  kDataLoss = 9,
  kNotFound = 10,
};

Code CodeOf(const absl::Status& status);

// "OK", "INVALID_ARGUMENT", ... as in vattn_code without its prefix; "UNKNOWN" for other numbers.
const char* CodeName(Code code);

// code must not be kOk.
absl::Status MakeError(Code code, absl::string_view message);

// Each takes what absl::StrCat takes: numbers, const char*, std::string, absl::string_view (which
// in distributions' builds of Abseil is not std::string_view).

// The text names the argument, its value and the limit: "epsilon is 12, must be over 0 and at most
// 10".
template <class... Args>
absl::Status InvalidArgumentError(const Args&... args) {
  return MakeError(Code::kInvalidArgument, absl::StrCat(args...));
}

// The system refused memory. A full pool of our own is FullError.
template <class... Args>
absl::Status OutOfMemoryError(const Args&... args) {
  return MakeError(Code::kOutOfMemory, absl::StrCat(args...));
}

// Valid, but not by this build, backend or machine.
template <class... Args>
absl::Status NotSupportedError(const Args&... args) {
  return MakeError(Code::kNotSupported, absl::StrCat(args...));
}

template <class... Args>
absl::Status DeviceError(const Args&... args) {
  return MakeError(Code::kDeviceError, absl::StrCat(args...));
}

template <class... Args>
absl::Status IoError(const Args&... args) {
  return MakeError(Code::kIoError, absl::StrCat(args...));
}

// A bug of the library.
template <class... Args>
absl::Status InternalError(const Args&... args) {
  return MakeError(Code::kInternal, absl::StrCat(args...));
}

// A pool or quota of our own is full; the text names the need, the limit and the knob.
template <class... Args>
absl::Status FullError(const Args&... args) {
  return MakeError(Code::kFull, absl::StrCat(args...));
}

template <class... Args>
absl::Status DeviceLostError(const Args&... args) {
  return MakeError(Code::kDeviceLost, absl::StrCat(args...));
}

// A stored copy failed its check.
template <class... Args>
absl::Status DataLossError(const Args&... args) {
  return MakeError(Code::kDataLoss, absl::StrCat(args...));
}

template <class... Args>
absl::Status NotFoundError(const Args&... args) {
  return MakeError(Code::kNotFound, absl::StrCat(args...));
}

// INVALID_ARGUMENT "<name> is <value>, must be <low> to <high>", both ends allowed.
template <class Value, class Low, class High>
absl::Status OutOfRangeError(absl::string_view name, const Value& value, const Low& low,
                             const High& high) {
  return InvalidArgumentError(name, " is ", value, ", must be ", low, " to ", high);
}

}  // namespace vattn

// Returns the absl::Status of `expression` from the calling function unless it is OK.
#define VATTN_RETURN_IF_ERROR(expression)          \
  do {                                             \
    absl::Status vattn_status_ = (expression);     \
    if (!vattn_status_.ok()) return vattn_status_; \
  } while (false)

#endif  // VATTN_MEMORY_STATUS_H_
