#include "api/llama_cpp/settings.h"

#include <charconv>
#include <cstdlib>

namespace vattn::llama_cpp {
namespace {

std::string Environment(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

}  // namespace

Settings ReadSettings() {
  Settings s;
  vattn_options_init(&s.options, sizeof(s.options));
  const std::string asked = Environment("GGML_VATTN");
  s.asked = !asked.empty() && asked != "0";
  s.stats = Environment("GGML_VATTN_STATS");
  if (s.stats == "0") s.stats.clear();
  if (!s.asked) return s;
  if (asked[0] == '{') {
    if (vattn_options_from_json(asked.c_str(), &s.options) != VATTN_OK)
      s.error = "GGML_VATTN: " + std::string(vattn_last_error());
  } else if (asked != "1") {
    s.error = "GGML_VATTN is " + asked + ", must be 0, 1 or a JSON object of options of vattn";
  }
  if (s.options.policy != VATTN_POLICY_VERIFIED && s.options.policy != VATTN_POLICY_DENSE)
    s.error = "GGML_VATTN: policy must be verified or dense";
  if (s.options.index != VATTN_INDEX_BALANCED) s.error = "GGML_VATTN: index must be balanced";
  if (s.options.profile != nullptr || s.options.sign_maps != nullptr ||
      s.options.disk_path != nullptr)
    s.error = "GGML_VATTN: profile, sign_maps and disk_path are of no use here";
  if (s.options.value_bits != 0) s.error = "GGML_VATTN: value_bits must be 0";
  const std::string least = Environment("GGML_VATTN_MIN_TOKENS");
  if (!least.empty()) {
    const char* const end = least.data() + least.size();
    const std::from_chars_result read = std::from_chars(least.data(), end, s.min_tokens);
    if (read.ec != std::errc() || read.ptr != end || s.min_tokens < 1)
      s.error = "GGML_VATTN_MIN_TOKENS is " + least + ", must be a number of 1 or more";
  }
  return s;
}

}  // namespace vattn::llama_cpp
