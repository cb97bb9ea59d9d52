#include "api/llama_cpp/counters.h"

#include <algorithm>
#include <cstdio>
#include <utility>
#include <vector>

namespace vattn::llama_cpp {
namespace {

std::vector<std::pair<const char*, uint64_t>> Fields(const Counters& c, const vattn_stats& s) {
  return {{"verified_calls", c.verified_calls},
          {"dense_calls", c.dense_calls},
          {"chunk_calls", c.chunk_calls},
          {"ggml_calls", c.ggml_calls},
          {"ggml_masks", c.ggml_masks},
          {"ggml_failures", c.ggml_failures},
          {"tables_learnt", c.tables_learnt},
          {"cells_coded", c.cells_coded},
          {"cells_recoded", c.cells_recoded},
          {"checks", c.checks},
          {"codes_dropped", c.codes_dropped},
          {"verified_ns", c.verified_ns},
          {"dense_ns", c.dense_ns},
          {"chunk_ns", c.chunk_ns},
          {"ggml_ns", c.ggml_ns},
          {"upkeep_ns", c.upkeep_ns},
          {"heads_exact", s.heads_exact},
          {"heads_verified", s.heads_verified},
          {"heads_dense", s.heads_dense},
          {"heads_noisy", s.heads_noisy},
          {"rows_middle", s.rows_middle},
          {"rows_selected", s.rows_selected},
          {"looks", s.looks},
          {"outliers", s.outliers}};
}

template <class... Values>
std::string Format(const char* format, Values... values) {
  char text[512];
  std::snprintf(text, sizeof(text), format, values...);
  return text;
}

}  // namespace

std::string CountersJson(const Counters& c, const vattn_stats& stats) {
  std::string json = "{";
  for (const auto& [name, value] : Fields(c, stats)) {
    if (json.size() > 1) json += ", ";
    json += "\"" + std::string(name) + "\": " + std::to_string(value);
  }
  return json + "}\n";
}

std::string CountersText(const Counters& c, const vattn_stats& s) {
  const auto ms = [](uint64_t ns) { return static_cast<double>(ns) * 1e-6; };
  const uint64_t vattn = c.verified_calls + c.dense_calls + c.chunk_calls;
  if (vattn + c.ggml_calls == 0)
    return "vattn: no attention came this way: is flash attention on (-fa on), and the cache f16 "
           "in host memory?\n";
  const auto count = [](uint64_t n) { return static_cast<unsigned long long>(n); };
  const uint64_t judged = s.heads_verified + s.heads_exact + s.heads_dense + s.heads_best_effort;
  std::string text = Format(
      "vattn: %llu calls verified (%.1f ms), %llu dense (%.1f ms), %llu chunks (%.1f ms), "
      "%llu by ggml (%.1f ms)\n",
      count(c.verified_calls), ms(c.verified_ns), count(c.dense_calls), ms(c.dense_ns),
      count(c.chunk_calls), ms(c.chunk_ns), count(c.ggml_calls), ms(c.ggml_ns));
  text +=
      Format("vattn: rows read %.1f %% of the middle; heads verified %.1f %%, read whole %.1f %%\n",
             100.0 * static_cast<double>(s.rows_selected) /
                 static_cast<double>(std::max<uint64_t>(1, s.rows_middle)),
             100.0 * static_cast<double>(s.heads_verified) /
                 static_cast<double>(std::max<uint64_t>(1, judged)),
             100.0 * static_cast<double>(s.heads_dense + s.heads_exact) /
                 static_cast<double>(std::max<uint64_t>(1, judged)));
  text += Format(
      "vattn: tables learnt %llu times, %llu cells coded (%llu again), %llu full checks, %llu runs "
      "dropped, upkeep %.1f ms\n",
      count(c.tables_learnt), count(c.cells_coded), count(c.cells_recoded), count(c.checks),
      count(c.codes_dropped), ms(c.upkeep_ns));
  text += Format("vattn: by ggml for the mask %llu, failures %llu\n", count(c.ggml_masks),
                 count(c.ggml_failures));
  if (!c.failure.empty()) text += "vattn: last failure: " + c.failure + "\n";
  return text;
}

}  // namespace vattn::llama_cpp
