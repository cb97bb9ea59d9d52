// Strides of a caller's arrays.
#ifndef VATTN_API_STRIDES_H_
#define VATTN_API_STRIDES_H_

#include "absl/status/status.h"
#include "api/vattn.h"
#include "runtime/status.h"

namespace vattn::api {

inline constexpr int64_t kMostStride = int64_t{1} << 40;
// 64 TiB of floats: more than a process can address
inline constexpr int64_t kMostElements = int64_t{1} << 44;

// Strides of one array: those given, or those of a contiguous one.
inline absl::Status ToStrides(const char* name, int64_t tokens, int64_t heads, int64_t dim,
                              int64_t token_given, int64_t head_given, int64_t& token_stride,
                              int64_t& head_stride) {
  const auto resolve = [&](const char* which, int64_t given, int64_t contiguous,
                           int64_t& out) -> absl::Status {
    if (given < 0 && given != VATTN_STRIDE_ZERO) {
      return InvalidArgumentError(name, which, " is ", given, ", must be 0 (contiguous), 1 to ",
                                  kMostStride, ", or VATTN_STRIDE_ZERO");
    }
    if (given > kMostStride)
      return OutOfRangeError(absl::StrCat(name, which), given, 0, kMostStride);
    out = given == 0 ? contiguous : given == VATTN_STRIDE_ZERO ? 0 : given;
    return absl::OkStatus();
  };
  VATTN_RETURN_IF_ERROR(resolve("_token_stride", token_given, heads * dim, token_stride));
  VATTN_RETURN_IF_ERROR(resolve("_head_stride", head_given, dim, head_stride));
  // Neither factor is over 2^40 and 2^31: the products of 128 bits cannot wrap.
  const __int128 last = static_cast<__int128>(tokens - 1) * token_stride +
                        static_cast<__int128>(heads - 1) * head_stride + dim;
  if (last <= kMostElements) return absl::OkStatus();
  return InvalidArgumentError(name, "_token_stride is ", token_stride, " with ", tokens,
                              " tokens and ", name, "_head_stride ", head_stride, " with ", heads,
                              " heads, must reach at most ", kMostElements, " elements");
}

}  // namespace vattn::api

#endif  // VATTN_API_STRIDES_H_
