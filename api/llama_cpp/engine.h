// Attention of one llama.cpp context: which way each call is answered.
#ifndef VATTN_API_LLAMA_CPP_ENGINE_H_
#define VATTN_API_LLAMA_CPP_ENGINE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "api/llama_cpp/counters.h"
#include "api/llama_cpp/flash_attention.h"
#include "api/llama_cpp/range.h"
#include "api/llama_cpp/runtimes.h"
#include "api/llama_cpp/settings.h"

namespace vattn::llama_cpp {

class Engine {
 public:
  explicit Engine(const Settings& settings) : settings_(settings), runtimes_(settings.options) {}

  // Answers a stream of a node. False: ggml is to do it, and counters say why.
  bool Answer(const FlashAttention& f);

  void set_num_threads(int32_t threads) { threads_ = threads; }
  Counters& counters() { return counters_; }
  vattn_stats Stats() const { return runtimes_.Stats(); }
  const Settings& settings() const { return settings_; }

 private:
  // What a layer is told by. Layers that share a cache are apart: each is asked other questions.
  using Layer = std::tuple<const void*, const void*, int64_t, int64_t, Shape>;
  using Ranges = std::vector<std::unique_ptr<Range>>;  // of one layer, the latest used last

  Range& Find(Ranges& ranges, const FlashAttention& f, const Run& run);
  bool AnswerIn(Ranges& ranges, const FlashAttention& f);
  bool AnswerFrom(Range& range, const FlashAttention& f, bool is_step, int64_t length);

  const Settings settings_;
  Runtimes runtimes_;
  std::map<Layer, Ranges> layers_;
  int32_t threads_ = 1;
  Counters counters_;
};

}  // namespace vattn::llama_cpp

#endif  // VATTN_API_LLAMA_CPP_ENGINE_H_
