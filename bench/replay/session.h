// One sequence of one runtime that is fed from a trace, a step at a time.
#ifndef VATTN_BENCH_REPLAY_SESSION_H_
#define VATTN_BENCH_REPLAY_SESSION_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "api/vattn.h"
#include "bench/cli/handles.h"
#include "bench/trace/reused_scores.h"
#include "bench/trace/trace.h"

namespace vattn::bench {

// What one step gave, by (chosen layer, head); overwritten by the next step.
struct StepResult {
  std::vector<float> out;    // [layers, q_heads, head_dim_v]
  std::vector<float> error;  // [layers, q_heads]
  std::vector<int32_t> verdict;
  std::vector<int32_t> selected, fetched, looks;  // [layers, kv_heads]
  std::vector<int64_t> middle;
};

class Session {
 public:
  // Appends the prompt, with its recorded queries if prompt_queries, and builds the index; an external
  // one gets ReusedScores. Keeps references to trace and layers.
  Session(const Trace& trace, std::span<const int32_t> layers, const vattn_options& options,
          bool prompt_queries);
  // Goes on from a saved sequence: the next step is the one after it was saved.
  Session(const Trace& trace, std::span<const int32_t> layers, const vattn_options& options,
          const std::string& path);

  void Save(const std::string& path) const;
  // Steps are taken in order from 0. Returns the microseconds spent in the library.
  double Step(int64_t step);

  // Starts over after the prompt, as another request: a fork with random numbers of its own, which `id`
  // keys. The runtime must have room for a fork.
  void Restart(uint64_t id);

  const StepResult& result() const { return result_; }
  uint64_t bytes_fetched() const;

 private:
  // With a sequence to come.
  Session(const Trace& trace, std::span<const int32_t> layers, const vattn_options& options);
  void AppendPrompt(bool prompt_queries);
  void Take(Sequence sequence);

  const Trace& trace_;
  std::span<const int32_t> layers_;
  Runtime runtime_;
  Sequence sequence_;  // of the prompt, and of the steps until a restart
  Sequence fork_;
  Batch batch_;
  std::vector<std::byte> q_, k_, v_;  // [layers, heads, head_dim] of the step
  std::optional<ReusedScores> scores_;
  StepResult result_;
};

}  // namespace vattn::bench

#endif  // VATTN_BENCH_REPLAY_SESSION_H_
