// What the environment asks of the backend.
#ifndef VATTN_API_LLAMA_CPP_SETTINGS_H_
#define VATTN_API_LLAMA_CPP_SETTINGS_H_

#include <cstdint>
#include <string>

#include "vattn.h"

namespace vattn::llama_cpp {

struct Settings {
  // GGML_VATTN is set to something but "" and "0". Otherwise there is no device, so that a llama.cpp
  // that has the library beside it computes as without.
  bool asked = false;
  // Runs of fewer cells than GGML_VATTN_MIN_TOKENS are attended exactly.
  int64_t min_tokens = 4096;
  // Where GGML_VATTN_STATS wants the counters when a context ends: "" nowhere, "1" to stderr as
  // text, else the name of a file to which a line of JSON is added.
  std::string stats;
  // Options of vattn from GGML_VATTN, if that is a JSON object; model shape and threads are set by
  // the calls that come.
  vattn_options options;
  // Why the settings cannot be used, naming variable, value and limit; "" if they can.
  std::string error;
};

// Reads them anew.
Settings ReadSettings();

}  // namespace vattn::llama_cpp

#endif  // VATTN_API_LLAMA_CPP_SETTINGS_H_
