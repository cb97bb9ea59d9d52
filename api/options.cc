#include "api/options.h"

#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <type_traits>

#include "runtime/json_text.h"
#include "runtime/status.h"

namespace vattn::api {
namespace {

using Json = nlohmann::json;

// Every scalar field that the C struct and Options share: X(name).
// clang-format off
#define VATTN_OPTION_FIELDS(X)                                                                      \
  X(num_layers) X(num_q_heads) X(num_kv_heads) X(head_dim_k) X(head_dim_v) X(dtype) X(shared_kv)    \
  X(softmax_scale) X(backend) X(device) X(num_threads) X(numa_node) X(huge_pages) X(prefault) X(zero_on_free)       \
  X(host_bytes) X(sinks) X(window) X(exact_below) X(index) X(index_bytes) X(value_bits) X(policy)   \
  X(norm) X(on_unverified) X(bound) X(epsilon) X(delta) X(norm_floor) X(max_looks) X(seed)          \
  X(refresh) X(min_selected) X(max_selected_share) X(topk_share) X(base_share) X(target) X(hot_share) \
  X(disk_bytes) X(spill) X(io_engine) X(io_depth) X(io_block_bytes) X(io_buffered) X(io_timeout_ms) \
  X(pilot) X(admission) X(tenant_bytes) X(first_kv_head)
// clang-format on

const std::map<std::string, std::vector<std::string>>& EnumNames() {
  static const auto* const names = new std::map<std::string, std::vector<std::string>>{
      {"dtype", {"f32", "f16", "bf16"}},
      {"backend", {"auto", "cpu", "cuda"}},
      {"policy", {"verified", "topk", "topk_uniform", "dense"}},
      {"index",
       {"balanced", "exact", "sign", "hadamard2", "page", "pooled", "clusters", "external"}},
      {"norm", {"value", "output"}},
      {"on_unverified", {"dense", "best_effort"}},
      {"bound", {"sharp", "safe"}},
      {"target", {"sdpa", "numerator", "denominator"}},
      {"io_engine", {"auto", "uring", "pread"}},
      {"admission", {"overcommit", "reserved"}}};
  return *names;
}

absl::Status Wrong(const std::string& key, const Json& value, const std::string& must) {
  return InvalidArgumentError(key, " is ", ShownJson(value), ", must be ", must);
}

absl::Status SetEnum(const std::string& key, const Json& value, int32_t& field) {
  const std::vector<std::string>& names = EnumNames().at(key);
  std::string list;
  for (size_t i = 0; i < names.size(); ++i) {
    if (value.is_string() && value.get<std::string>() == names[i]) {
      field = static_cast<int32_t>(i);
      return absl::OkStatus();
    }
    absl::StrAppend(&list,
                    i == 0                  ? ""
                    : i + 1 == names.size() ? " or "
                                            : ", ",
                    "\"", names[i], "\"");
  }
  return Wrong(key, value, list);
}

absl::Status SetField(const std::string& key, const Json& value, int32_t& field) {
  if (EnumNames().count(key) > 0) return SetEnum(key, value, field);
  if (value.is_boolean()) {
    field = value.get<bool>() ? 1 : 0;
    return absl::OkStatus();
  }
  const bool fits =
      value.is_number_integer() &&
      (value.is_number_unsigned() ? value.get<uint64_t>() <= std::numeric_limits<int32_t>::max()
                                  : value.get<int64_t>() >= std::numeric_limits<int32_t>::min());
  if (!fits) return Wrong(key, value, "a whole number of 32 bits");
  field = value.get<int32_t>();
  return absl::OkStatus();
}

absl::Status SetField(const std::string& key, const Json& value, uint64_t& field) {
  if (!value.is_number_unsigned()) return Wrong(key, value, "a whole number, 0 or more");
  field = value.get<uint64_t>();
  return absl::OkStatus();
}

absl::Status SetField(const std::string& key, const Json& value, float& field) {
  if (!value.is_number()) return Wrong(key, value, "a number");
  field = value.get<float>();
  return absl::OkStatus();
}

absl::Status SetPath(const std::string& key, const Json& value, std::string& path) {
  const bool text =
      value.is_string() && value.get_ref<const std::string&>().find('\0') == std::string::npos;
  if (!text) return Wrong(key, value, "a string without zero bytes");
  path = value.get<std::string>();
  return absl::OkStatus();
}

absl::Status SetHeads(const Json& value, vattn_options& options, std::vector<int32_t>& heads) {
  if (!value.is_array() || value.empty())
    return Wrong("layer_kv_heads", value, "an array of whole numbers");
  heads.clear();
  for (const Json& entry : value) {
    int32_t number;
    VATTN_RETURN_IF_ERROR(SetField("layer_kv_heads", entry, number));
    heads.push_back(number);
  }
  options.layer_kv_heads = heads.data();
  if (options.num_layers != static_cast<int32_t>(heads.size())) {
    return InvalidArgumentError("layer_kv_heads has ", heads.size(),
                                " entries, must have num_layers = ", options.num_layers);
  }
  return absl::OkStatus();
}

absl::Status SetPreset(const Json& value, vattn_options& options) {
  const std::string name = value.is_string() ? value.get<std::string>() : "";
  if (name != "strict" && name != "default" && name != "fast") {
    return Wrong("preset", value, "\"strict\", \"default\" or \"fast\"");
  }
  options.policy = VATTN_POLICY_VERIFIED;
  options.epsilon = name == "fast" ? .2f : .1f;
  options.norm = name == "strict" ? VATTN_NORM_OUTPUT : VATTN_NORM_VALUE;
  return absl::OkStatus();
}

// A field of the C struct in Options.
template <class From, class To>
absl::Status SetOption(const char* name, From from, To& to) {
  if constexpr (std::is_same_v<To, bool>) {
    if (from != 0 && from != 1) return OutOfRangeError(name, from, 0, 1);
  }
  to = static_cast<To>(from);
  return absl::OkStatus();
}

}  // namespace

vattn_options DefaultOptions() {
  Options defaults;
  vattn_options options = FromOptions(defaults);
  options.layer_kv_heads = nullptr;
  return options;
}

absl::StatusOr<Options> ToOptions(const vattn_options& from) {
  Options to;
#define VATTN_COPY(name) VATTN_RETURN_IF_ERROR(SetOption(#name, from.name, to.name));
  VATTN_OPTION_FIELDS(VATTN_COPY)
#undef VATTN_COPY
  if (from.profile != nullptr) to.profile = from.profile;
  if (from.disk_path != nullptr) to.disk_path = from.disk_path;
  if (from.sign_maps != nullptr) to.sign_maps = from.sign_maps;
  if (from.layer_kv_heads != nullptr && from.num_layers > 0 && from.num_layers <= 1024) {
    to.layer_kv_heads.assign(from.layer_kv_heads, from.layer_kv_heads + from.num_layers);
  }
  return to;
}

vattn_options FromOptions(const Options& from) {
  vattn_options to;
  std::memset(&to, 0, sizeof(to));
  to.struct_size = sizeof(to);
#define VATTN_COPY(name) to.name = static_cast<decltype(to.name)>(from.name);
  VATTN_OPTION_FIELDS(VATTN_COPY)
#undef VATTN_COPY
  to.layer_kv_heads = from.layer_kv_heads.data();
  to.profile = from.profile.empty() ? nullptr : from.profile.c_str();
  to.disk_path = from.disk_path.empty() ? nullptr : from.disk_path.c_str();
  to.sign_maps = from.sign_maps.empty() ? nullptr : from.sign_maps.c_str();
  return to;
}

absl::Status ApplyJson(const std::string& text, vattn_options& options,
                       std::vector<int32_t>& heads) {
  if (NestsTooDeep(text))
    return InvalidArgumentError("json nests deeper than ", kMaxJsonDepth, " levels");
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) return InvalidArgumentError("json is not valid JSON");
  if (!json.is_object())
    return InvalidArgumentError("json is ", json.type_name(), ", must be an object");
  // Outlive the call, as options points to them
  static thread_local std::string profile, disk_path, sign_maps;
  vattn_options changed = options;
  std::vector<int32_t> changed_heads;
  std::string changed_profile, changed_disk_path, changed_maps;
  if (json.contains("preset")) VATTN_RETURN_IF_ERROR(SetPreset(json["preset"], changed));
  std::map<std::string, std::function<absl::Status(const Json&)>> setters;
#define VATTN_SETTER(name) \
  setters[#name] = [&](const Json& value) { return SetField(#name, value, changed.name); };
  VATTN_OPTION_FIELDS(VATTN_SETTER)
#undef VATTN_SETTER
  setters["profile"] = [&](const Json& value) {
    return SetPath("profile", value, changed_profile);
  };
  setters["disk_path"] = [&](const Json& value) {
    return SetPath("disk_path", value, changed_disk_path);
  };
  setters["sign_maps"] = [&](const Json& value) {
    return SetPath("sign_maps", value, changed_maps);
  };
  for (const auto& [key, value] : json.items()) {
    if (key == "preset" || key == "layer_kv_heads") continue;
    const auto setter = setters.find(key);
    if (setter == setters.end())
      return InvalidArgumentError("json has the unknown key ", ShownJson(Json(key)));
    VATTN_RETURN_IF_ERROR(setter->second(value));
  }
  // After num_layers is known.
  if (json.contains("layer_kv_heads"))
    VATTN_RETURN_IF_ERROR(SetHeads(json["layer_kv_heads"], changed, changed_heads));
  if (!changed_heads.empty()) {
    heads.swap(changed_heads);
    changed.layer_kv_heads = heads.data();
  } else if (!heads.empty() && changed.layer_kv_heads == heads.data() &&
             changed.num_layers != static_cast<int32_t>(heads.size())) {
    return InvalidArgumentError("num_layers is ", changed.num_layers, ", must be ", heads.size(),
                                ", the entries of layer_kv_heads given before");
  }
  if (json.contains("profile")) {
    profile.swap(changed_profile);
    changed.profile = profile.empty() ? nullptr : profile.c_str();
  }
  if (json.contains("disk_path")) {
    disk_path.swap(changed_disk_path);
    changed.disk_path = disk_path.empty() ? nullptr : disk_path.c_str();
  }
  if (json.contains("sign_maps")) {
    sign_maps.swap(changed_maps);
    changed.sign_maps = sign_maps.empty() ? nullptr : sign_maps.c_str();
  }
  options = changed;
  return absl::OkStatus();
}

}  // namespace vattn::api
