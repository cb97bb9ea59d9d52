// Options from JSON: every key and enum name, presets, refusals, and how long arrays live.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "api/vattn.hpp"

namespace vattn::test {
namespace {

vattn_options Apply(const std::string& json) {
  vattn_options options = Init<vattn_options>();
  Check(vattn_options_from_json(json.c_str(), &options));
  return options;
}

// Expects a refusal whose text has `text`, and options as they were.
void ExpectRefused(const std::string& json, const std::string& text) {
  vattn_options options = Init<vattn_options>();
  options.window = 77;
  const vattn_options before = options;
  EXPECT_EQ(vattn_options_from_json(json.c_str(), &options), VATTN_INVALID_ARGUMENT) << json;
  EXPECT_NE(std::string(vattn_last_error()).find(text), std::string::npos) << vattn_last_error();
  EXPECT_EQ(std::memcmp(&options, &before, sizeof(options)), 0) << json;
}

template <class Field>
struct Key {
  const char* name;
  Field vattn_options::*field;
};

const Key<int32_t> kWhole[] = {{"num_layers", &vattn_options::num_layers},
                               {"num_q_heads", &vattn_options::num_q_heads},
                               {"num_kv_heads", &vattn_options::num_kv_heads},
                               {"head_dim_k", &vattn_options::head_dim_k},
                               {"head_dim_v", &vattn_options::head_dim_v},
                               {"shared_kv", &vattn_options::shared_kv},
                               {"device", &vattn_options::device},
                               {"num_threads", &vattn_options::num_threads},
                               {"numa_node", &vattn_options::numa_node},
                               {"huge_pages", &vattn_options::huge_pages},
                               {"prefault", &vattn_options::prefault},
                               {"zero_on_free", &vattn_options::zero_on_free},
                               {"sinks", &vattn_options::sinks},
                               {"window", &vattn_options::window},
                               {"exact_below", &vattn_options::exact_below},
                               {"index_bytes", &vattn_options::index_bytes},
                               {"value_bits", &vattn_options::value_bits},
                               {"max_looks", &vattn_options::max_looks},
                               {"refresh", &vattn_options::refresh},
                               {"min_selected", &vattn_options::min_selected},
                               {"pilot", &vattn_options::pilot},
                               {"spill", &vattn_options::spill},
                               {"io_depth", &vattn_options::io_depth},
                               {"io_block_bytes", &vattn_options::io_block_bytes},
                               {"io_buffered", &vattn_options::io_buffered},
                               {"io_timeout_ms", &vattn_options::io_timeout_ms}};
const Key<uint64_t> kLong[] = {{"host_bytes", &vattn_options::host_bytes},
                               {"disk_bytes", &vattn_options::disk_bytes},
                               {"tenant_bytes", &vattn_options::tenant_bytes},
                               {"first_kv_head", &vattn_options::first_kv_head},
                               {"seed", &vattn_options::seed}};
const Key<float> kReal[] = {{"softmax_scale", &vattn_options::softmax_scale},
                            {"epsilon", &vattn_options::epsilon},
                            {"delta", &vattn_options::delta},
                            {"norm_floor", &vattn_options::norm_floor},
                            {"max_selected_share", &vattn_options::max_selected_share},
                            {"topk_share", &vattn_options::topk_share},
                            {"base_share", &vattn_options::base_share},
                            {"hot_share", &vattn_options::hot_share}};
struct Names {
  Key<int32_t> key;
  std::vector<std::string> values;
};
const Names kEnums[] = {
    {{"dtype", &vattn_options::dtype}, {"f32", "f16", "bf16"}},
    {{"backend", &vattn_options::backend}, {"auto", "cpu", "cuda"}},
    {{"policy", &vattn_options::policy}, {"verified", "topk", "topk_uniform", "dense"}},
    {{"index", &vattn_options::index},
     {"balanced", "exact", "sign", "hadamard2", "page", "pooled", "clusters", "external"}},
    {{"norm", &vattn_options::norm}, {"value", "output"}},
    {{"on_unverified", &vattn_options::on_unverified}, {"dense", "best_effort"}},
    {{"bound", &vattn_options::bound}, {"sharp", "safe"}},
    {{"target", &vattn_options::target}, {"sdpa", "numerator", "denominator"}},
    {{"io_engine", &vattn_options::io_engine}, {"auto", "uring", "pread"}},
    {{"admission", &vattn_options::admission}, {"overcommit", "reserved"}}};

std::string Pair(const std::string& key, const std::string& value) {
  return "{\"" + key + "\": " + value + "}";
}

// One key changes its field and no other.
template <class Field>
void ExpectSets(const Key<Field>& key, const std::string& value, Field expected) {
  vattn_options wanted = Init<vattn_options>();
  wanted.*key.field = expected;
  const vattn_options options = Apply(Pair(key.name, value));
  EXPECT_EQ(std::memcmp(&options, &wanted, sizeof(options)), 0) << key.name;
}

TEST(ApiJsonTest, EveryKeySetsItsField) {
  for (const auto& key : kWhole) ExpectSets(key, "-12345", -12345);
  for (const auto& key : kLong) ExpectSets(key, "18446744073709551615", UINT64_MAX);
  for (const auto& key : kReal) ExpectSets(key, "0.375", .375f);
  for (const auto& key : kReal) ExpectSets(key, "3", 3.f);
  for (const Names& names : kEnums) {
    for (size_t i = 0; i < names.values.size(); ++i) {
      ExpectSets(names.key, "\"" + names.values[i] + "\"", static_cast<int32_t>(i));
    }
  }
  ExpectSets(Key<int32_t>{"prefault", &vattn_options::prefault}, "true", 1);
  ExpectSets(Key<int32_t>{"huge_pages", &vattn_options::huge_pages}, "false", 0);
}

// struct_size, layer_kv_heads, log, log_user, profile, disk_path and sign_maps are the fields
// without a key above.
TEST(ApiJsonTest, NoFieldIsForgotten) {
  size_t bytes = sizeof(size_t) + sizeof(int32_t*) + sizeof(vattn_log_function) + sizeof(void*);
  bytes += 3 * sizeof(const char*);
  bytes +=
      std::size(kWhole) * 4 + std::size(kLong) * 8 + std::size(kReal) * 4 + std::size(kEnums) * 4;
  EXPECT_EQ(bytes, sizeof(vattn_options));
}

TEST(ApiJsonTest, WrongTypesAreRefusedByName) {
  for (const auto& key : kWhole) {
    for (const char* value :
         {"\"1\"", "1.5", "null", "[1]", "{}", "2147483648", "-2147483649", "1e3"}) {
      ExpectRefused(Pair(key.name, value), std::string(key.name) + " is ");
    }
  }
  for (const auto& key : kLong) {
    for (const char* value : {"\"1\"", "-1", "1.5", "true", "18446744073709551616"}) {
      ExpectRefused(Pair(key.name, value), std::string(key.name) + " is ");
    }
  }
  for (const auto& key : kReal) {
    for (const char* value : {"\"1\"", "true", "null", "[]"}) {
      ExpectRefused(Pair(key.name, value), std::string(key.name) + " is ");
    }
  }
  for (const Names& names : kEnums) {
    for (const char* value : {"0", "\"\"", "\"no\"", "null", "[\"f32\"]"}) {
      ExpectRefused(Pair(names.key.name, value), std::string(names.key.name) + " is " + value +
                                                     ", must be \"" + names.values[0] + "\"");
    }
  }
  for (const char* value : {"[]", "3", "[1.5]", "[\"2\"]", "null"}) {
    ExpectRefused(Pair("layer_kv_heads", value), "layer_kv_heads is ");
  }
}

TEST(ApiJsonTest, UnknownKeysAndBrokenTextsAreRefused) {
  for (const char* key : {"struct_size", "log_user", "log", "Window", "window ", ""}) {
    ExpectRefused(Pair(key, "1"), "unknown key \"" + std::string(key) + "\"");
  }
  ExpectRefused("{\"sinks\": 32, \"windows\": 5}", "unknown key \"windows\"");
  for (const char* text :
       {"", "{", "{\"window\": }", "{\"window\": 5} x", "{'window': 5}", "{\"window\": NaN}"}) {
    ExpectRefused(text, "json is not valid JSON");
  }
  for (const char* text : {"[]", "3", "\"window\"", "null"})
    ExpectRefused(text, "must be an object");
  ExpectRefused(std::string(200000, '['), "json nests deeper than 64 levels");
}

// Deep values stand in any place; brackets in texts are none.
TEST(ApiJsonTest, DeepValuesAreRefused) {
  for (const int depth : {64, 1000, 1000000}) {
    const std::string lists = std::string(depth, '[') + std::string(depth, ']');
    std::string objects;
    for (int i = 0; i < depth; ++i) objects += "{\"a\":";
    objects += "1" + std::string(depth, '}');
    for (const char* key :
         {"num_layers", "dtype", "preset", "layer_kv_heads", "profile", "unknown"}) {
      for (const std::string& deep : {lists, objects})
        ExpectRefused(Pair(key, deep), "json nests deeper than 64 levels");
    }
  }
  ExpectRefused(Pair("num_layers", std::string(60, '[') + std::string(60, ']')),
                "num_layers is [[[[");
  EXPECT_NO_THROW(
      Apply(Pair("profile", "\"" + std::string(100, '[') + "\\\"" + std::string(100, '{') + "\"")));
}

// Texts of errors are short whatever the value is, and no zero byte ends one early.
TEST(ApiJsonTest, ErrorsShowValuesInShort) {
  vattn_options options = Init<vattn_options>();
  const auto text = [&](const std::string& json) {
    EXPECT_EQ(vattn_options_from_json(json.c_str(), &options), VATTN_INVALID_ARGUMENT);
    return std::string(vattn_last_error());
  };
  for (const char* key : {"num_layers", "dtype", "preset", "layer_kv_heads", "unknown"}) {
    EXPECT_LT(text(Pair(key, "\"" + std::string(1 << 20, 'x') + "\"")).size(), 250u) << key;
    EXPECT_LT(text(Pair(key, "[" + std::string(1 << 20, ' ') + "{\"x\": 1}]")).size(), 250u) << key;
  }
  EXPECT_LT(text(Pair(std::string(1 << 20, 'k').c_str(), "1")).size(), 250u);
  EXPECT_NE(text("{\"epsi\\u0000lon\": 1}").find("epsi\\u0000lon"), std::string::npos);
  EXPECT_NE(text("{\"dtype\": \"f32\\u0000\"}").find("f32\\u0000\", must be"), std::string::npos);
}

TEST(ApiJsonTest, PresetsComeFirst) {
  const auto expect = [](const std::string& json, float epsilon, int32_t norm) {
    const vattn_options options = Apply(json);
    EXPECT_EQ(options.epsilon, epsilon) << json;
    EXPECT_EQ(options.norm, norm) << json;
    EXPECT_EQ(options.policy, VATTN_POLICY_VERIFIED);
    EXPECT_EQ(options.delta, .1f);
  };
  expect("{\"preset\": \"strict\"}", .1f, VATTN_NORM_OUTPUT);
  expect("{\"preset\": \"default\"}", .1f, VATTN_NORM_VALUE);
  expect("{\"preset\": \"fast\"}", .2f, VATTN_NORM_VALUE);
  expect("{\"epsilon\": 0.3, \"preset\": \"strict\"}", .3f, VATTN_NORM_OUTPUT);
  expect("{\"norm\": \"output\", \"preset\": \"fast\"}", .2f, VATTN_NORM_OUTPUT);
  for (const char* value : {"\"slow\"", "1", "null", "\"\""}) {
    ExpectRefused(Pair("preset", value),
                  "preset is " + std::string(value) + ", must be \"strict\"");
  }
}

TEST(ApiJsonTest, LayerHeadsLiveUntilTheNextCall) {
  vattn_options options = Apply("{\"layer_kv_heads\": [4, 0, 2], \"num_layers\": 3}");
  EXPECT_EQ(std::vector<int32_t>(options.layer_kv_heads, options.layer_kv_heads + 3),
            (std::vector<int32_t>{4, 0, 2}));
  {
    // A runtime keeps its own copy, and lends it for as long as it lives.
    const Runtime runtime(options);
    Apply("{\"layer_kv_heads\": [1], \"num_layers\": 1}");
    const vattn_options in_force = runtime.Options();
    EXPECT_EQ(std::vector<int32_t>(in_force.layer_kv_heads, in_force.layer_kv_heads + 3),
              (std::vector<int32_t>{4, 0, 2}));
  }
  ExpectRefused("{\"layer_kv_heads\": [4, 0, 2]}",
                "layer_kv_heads has 3 entries, must have num_layers = 1");
  ExpectRefused("{\"layer_kv_heads\": [4], \"num_layers\": 2}",
                "layer_kv_heads has 1 entries, must have num_layers = 2");
  // An array given before goes on to hold, and its length does, too.
  options = Apply("{\"layer_kv_heads\": [4, 2], \"num_layers\": 2}");
  EXPECT_EQ(vattn_options_from_json("{\"num_layers\": 3}", &options), VATTN_INVALID_ARGUMENT);
  EXPECT_STREQ(vattn_last_error(),
               "num_layers is 3, must be 2, the entries of layer_kv_heads given before");
  EXPECT_EQ(vattn_options_from_json("{\"window\": 64}", &options), VATTN_OK);
  EXPECT_EQ(options.layer_kv_heads[1], 2);
}

void ExpectPathLivesUntilTheNextCall(const std::string& key, const char* vattn_options::*path) {
  const auto pair = [&](const std::string& value) { return "\"" + key + "\": \"" + value + "\""; };
  vattn_options options = Apply("{" + pair("/no/such/\\u00e9") + ", \"window\": 64}");
  EXPECT_STREQ(options.*path, "/no/such/\u00e9");
  EXPECT_EQ(options.window, 64);
  // One given before goes on to hold; "" takes it back.
  EXPECT_EQ(vattn_options_from_json("{\"window\": 32}", &options), VATTN_OK);
  EXPECT_STREQ(options.*path, "/no/such/\u00e9");
  EXPECT_EQ(vattn_options_from_json(("{" + pair("") + "}").c_str(), &options), VATTN_OK);
  EXPECT_EQ(options.*path, nullptr);
  for (const char* value : {"1", "null", "[\"a\"]", "true", "\"a\\u0000b\""}) {
    ExpectRefused(Pair(key.c_str(), value),
                  key + " is " + value + ", must be a string without zero bytes");
  }
  // A refused call takes nothing away.
  options = Apply("{" + pair("first") + "}");
  EXPECT_EQ(
      vattn_options_from_json(("{" + pair("second") + ", \"window\": \"x\"}").c_str(), &options),
      VATTN_INVALID_ARGUMENT);
  EXPECT_STREQ(options.*path, "first");
}

TEST(ApiJsonTest, PathsLiveUntilTheNextCall) {
  ExpectPathLivesUntilTheNextCall("profile", &vattn_options::profile);
  ExpectPathLivesUntilTheNextCall("disk_path", &vattn_options::disk_path);
}

TEST(ApiJsonTest, RuntimeTakesTheTextToo) {
  const Runtime runtime(
      "{\"dtype\": \"f16\", \"head_dim_k\": 64, \"preset\": \"strict\", \"num_threads\": 1}");
  const vattn_options in_force = runtime.Options();
  EXPECT_EQ(in_force.dtype, VATTN_F16);
  EXPECT_EQ(in_force.softmax_scale, .125f);
  EXPECT_EQ(in_force.norm, VATTN_NORM_OUTPUT);
  try {
    Runtime("{\"num_q_heads\": 7}");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), VATTN_INVALID_ARGUMENT);
    EXPECT_STREQ(
        error.what(),
        "INVALID_ARGUMENT: num_q_heads is 7, must be a multiple of the 2 KV heads of layer 0");
  }
}

}  // namespace
}  // namespace vattn::test
