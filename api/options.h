// The options of the C API in C++ clothes, and their JSON form.
#ifndef VATTN_API_OPTIONS_H_
#define VATTN_API_OPTIONS_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "api/vattn.h"
#include "runtime/options.h"

namespace vattn::api {

vattn_options DefaultOptions();
// INVALID_ARGUMENT for a boolean that is neither 0 nor 1; ResolveOptions checks the other fields.
absl::StatusOr<Options> ToOptions(const vattn_options& from);
// layer_kv_heads, profile and disk_path of the result point into `from`.
vattn_options FromOptions(const Options& from);

// Applies a JSON object. `heads` keeps an array that options then points to; the texts of profile
// and disk_path are kept until the thread's next call.
absl::Status ApplyJson(const std::string& json, vattn_options& options,
                       std::vector<int32_t>& heads);

}  // namespace vattn::api

#endif  // VATTN_API_OPTIONS_H_
