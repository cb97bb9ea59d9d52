// Versioned structs of the C API: import with defaults, export to callers of any age.
#ifndef VATTN_API_STRUCTS_H_
#define VATTN_API_STRUCTS_H_

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "absl/status/status.h"
#include "runtime/status.h"

namespace vattn::api {

// Copies the caller's fields over `into`, which holds defaults. A short old struct leaves newer
// fields at their defaults; a longer new one is refused if it uses what this library does not know.
template <class T>
absl::Status Import(const char* name, const T* from, T& into) {
  if (from == nullptr) return InvalidArgumentError(name, " is NULL, must be given");
  const size_t size = from->struct_size;
  if (size < sizeof(size_t) || size > 4096) {
    return InvalidArgumentError(name, ".struct_size is ", size, ", must be ", sizeof(size_t),
                                " to 4096");
  }
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(from);
  for (size_t i = sizeof(T); i < size; ++i) {
    if (bytes[i] != 0) {
      return InvalidArgumentError(name, ".struct_size is ", size, " with byte ", i,
                                  " set, must be at most ", sizeof(T),
                                  ": the caller uses fields that this library does not know");
    }
  }
  std::memcpy(&into, from, std::min(size, sizeof(T)));
  into.struct_size = sizeof(T);
  return absl::OkStatus();
}

// Copies `from` into the caller's struct of `size` bytes; fields that are not ours become 0.
template <class T>
void Export(const T& from, T* into, size_t size) {
  std::memset(static_cast<void*>(into), 0, size);
  std::memcpy(static_cast<void*>(into), &from, std::min(size, sizeof(T)));
  if (size >= sizeof(size_t)) into->struct_size = size;
}

}  // namespace vattn::api

#endif  // VATTN_API_STRUCTS_H_
