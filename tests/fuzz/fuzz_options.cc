// The JSON options: any text is refused with a reason and changes nothing, or gives options that
// mean the same when applied twice; a runtime is made of them or says why not.
#include <cstring>
#include <string>

#include "api/vattn.h"
#include "tests/fuzz/input.h"

using vattn::test::Require;

namespace {

// Every byte but those of pointers, which lead to memory of the thread that changes from call to
// call.
std::string PlainBytes(vattn_options options) {
  options.layer_kv_heads = nullptr;
  options.profile = nullptr;
  options.disk_path = nullptr;
  return std::string(reinterpret_cast<const char*>(&options), sizeof(options));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string json(reinterpret_cast<const char*>(data), size);
  vattn_options options;
  vattn_options_init(&options, sizeof(options));
  const std::string before = PlainBytes(options);
  if (vattn_options_from_json(json.c_str(), &options) != VATTN_OK) {
    Require(vattn_last_error()[0] != '\0', "a refusal without a text");
    Require(PlainBytes(options) == before, "a refused text changed the options");
    return 0;
  }
  const std::string once = PlainBytes(options);
  Require(vattn_options_from_json(json.c_str(), &options) == VATTN_OK, "refused the second time");
  Require(PlainBytes(options) == once, "applied twice it gives other options");

  // A runtime that touches nothing outside of the process and little in it.
  options.profile = nullptr;
  options.disk_path = nullptr;
  options.spill = 0;
  options.backend = VATTN_BACKEND_CPU;
  options.num_threads = 1;
  options.prefault = 0;
  vattn_runtime* runtime = nullptr;
  const vattn_code code = vattn_runtime_create(&options, &runtime);
  Require((runtime != nullptr) == (code == VATTN_OK), "a runtime and an error");
  if (code != VATTN_OK) {
    Require(code == VATTN_INVALID_ARGUMENT || code == VATTN_NOT_SUPPORTED ||
                code == VATTN_OUT_OF_MEMORY,
            vattn_last_error());
    return 0;
  }
  vattn_options in_force;
  vattn_options_init(&in_force, sizeof(in_force));
  Require(vattn_runtime_options(runtime, &in_force) == VATTN_OK, vattn_last_error());
  Require(in_force.num_layers == options.num_layers && in_force.epsilon == options.epsilon &&
              in_force.host_bytes == options.host_bytes,
          "other options in force than given");
  vattn_runtime_destroy(runtime);
  return 0;
}
