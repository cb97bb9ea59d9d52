// What the backend has done, for who asks with GGML_VATTN_STATS.
#ifndef VATTN_API_LLAMA_CPP_COUNTERS_H_
#define VATTN_API_LLAMA_CPP_COUNTERS_H_

#include <cstdint>
#include <string>

#include "vattn.h"

namespace vattn::llama_cpp {

// Calls are attentions of one layer and stream.
struct Counters {
  uint64_t verified_calls = 0;  // answered by policy verified
  uint64_t dense_calls = 0;     // answered by vattn from every row
  uint64_t chunk_calls = 0;     // of more query tokens than a step has, answered exactly by vattn
  uint64_t ggml_calls = 0;      // left to ggml's CPU backend; the next two say why
  uint64_t ggml_masks = 0;      // the mask is no run of cells: other sequences, holes, windows
  uint64_t ggml_failures = 0;   // vattn had an error, or a query or answer was not finite
  uint64_t tables_learnt = 0;
  uint64_t cells_coded = 0;
  uint64_t cells_recoded = 0;  // of cells_coded: their key had changed under the code
  uint64_t checks = 0;         // of all keys of a run against their codes
  uint64_t codes_dropped = 0;  // runs whose codes were thrown away: most keys had changed
  uint64_t verified_ns = 0, dense_ns = 0, chunk_ns = 0, ggml_ns = 0;  // time of those calls
  uint64_t upkeep_ns = 0;  // of verified calls: checks, codes and tables
  std::string failure;     // text of the last one of ggml_failures
};

// One line of JSON; stats: of policy verified.
std::string CountersJson(const Counters& c, const vattn_stats& stats);
// A few lines for people.
std::string CountersText(const Counters& c, const vattn_stats& stats);

}  // namespace vattn::llama_cpp

#endif  // VATTN_API_LLAMA_CPP_COUNTERS_H_
