// What the calls that make a sequence share.
#ifndef VATTN_API_SEQUENCE_PARAMS_H_
#define VATTN_API_SEQUENCE_PARAMS_H_

#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "api/calls.h"

namespace vattn::api {

inline absl::Status CheckReserve(int64_t reserve_tokens) {
  const int64_t most = kAllTokens;
  if (reserve_tokens >= 0 && reserve_tokens <= most) return absl::OkStatus();
  return OutOfRangeError("reserve_tokens", reserve_tokens, 0, most);
}

inline absl::Status ToSequenceOptions(const vattn_sequence_options* options, SequenceOptions& out) {
  vattn_sequence_options o;
  vattn_sequence_options_init(&o, sizeof(o));
  if (options != nullptr) VATTN_RETURN_IF_ERROR(Import("options", options, o));
  out = {.id = o.id, .reserve_tokens = o.reserve_tokens, .tenant = o.tenant};
  return CheckReserve(o.reserve_tokens);
}

// Hands a new sequence to the caller.
inline absl::Status Give(absl::StatusOr<std::unique_ptr<Sequence>> made, vattn_sequence** out) {
  if (!made.ok()) return made.status();
  *out = new vattn_sequence{*std::move(made)};
  return absl::OkStatus();
}

}  // namespace vattn::api

#endif  // VATTN_API_SEQUENCE_PARAMS_H_
