#include "tests/api/backend.h"

#include <gtest/gtest.h>

#include <cstdlib>

namespace vattn::test {
namespace {

// The code of creating a runtime, which is destroyed.
vattn_code TryOptions(const vattn_options& options) {
  vattn_runtime* runtime = nullptr;
  const vattn_code code = vattn_runtime_create(&options, &runtime);
  vattn_runtime_destroy(runtime);
  return code;
}

}  // namespace

bool OnCuda() {
  const char* chosen = std::getenv("VATTN_BACKEND");
  return chosen != nullptr && std::string(chosen) == "cuda";
}

std::string NoCuda() {
  vattn_options options;
  vattn_options_init(&options, sizeof(options));
  options.backend = VATTN_BACKEND_CUDA;
  options.host_bytes = 1 << 20;
  return TryOptions(options) == VATTN_OK ? "" : vattn_last_error();
}

std::string NotServed(const vattn_options& options) {
  const bool lacks = options.index == VATTN_INDEX_PAGE || options.index == VATTN_INDEX_POOLED ||
                     options.index == VATTN_INDEX_CLUSTERS;
  return OnCuda() && lacks && TryOptions(options) == VATTN_NOT_SUPPORTED ? vattn_last_error() : "";
}

}  // namespace vattn::test
