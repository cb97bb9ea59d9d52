// One sequence of one runtime that is fed from a trace, a step at a time.
#ifndef VATTN_BENCH_REPLAY_SESSION_H_
#define VATTN_BENCH_REPLAY_SESSION_H_

#include <cstddef>
#include <cstdint>
#include <map>
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

// Where the queries come from that are passed with appended tokens.
enum class AppendedQueries {
  kNone,
  kOwn,     // of the appended tokens, as many of the last ones as were recorded
  kPrompt,  // the recording's q_prompt, whichever tokens are appended
};

class Session {
 public:
  // An empty sequence, to be filled by Append.
  Session(const Trace& trace, std::span<const int32_t> layers, const vattn_options& options);
  // Appends the prompt, with its recorded queries if prompt_queries, and builds the index; an
  // external one gets ReusedScores. Keeps references to trace and layers.
  Session(const Trace& trace, std::span<const int32_t> layers, const vattn_options& options,
          bool prompt_queries);
  // Goes on from a saved sequence: the next step is the one after it was saved.
  Session(const Trace& trace, std::span<const int32_t> layers, const vattn_options& options,
          const std::string& path);

  void Save(const std::string& path) const;
  // Steps are taken in order from 0. Returns the microseconds spent in the library.
  double Step(int64_t step) { return StepAt(trace_.prompt_tokens + step); }
  // The same with the recording's token at `position`, which is the one after those that the
  // sequence has and must have a query (FirstQuery).
  double StepAt(int64_t position);
  // Adds the recording's next `count` tokens, which start at `begin`, to every layer.
  void Append(int64_t begin, int64_t count, AppendedQueries queries);
  void BuildIndex();

  // Starts over after the prompt, as another request: a fork with random numbers of its own, which
  // `id` keys. The runtime must have room for a fork.
  void Restart(uint64_t id);
  // Takes the step at `position` in a fork of the sequence as it stands, which ends with it: the
  // sequence is left alone, and random numbers are the fork's own.
  void StepAside(uint64_t id, int64_t position);

  const StepResult& result() const { return result_; }
  uint64_t bytes_fetched() const;
  // Every counter of the runtime by name, without labels of a tenant.
  std::map<std::string, double> counters() const;

 private:
  struct NoSequence {};
  Session(const Trace& trace, std::span<const int32_t> layers, const vattn_options& options,
          NoSequence);
  void Take(Sequence sequence);
  double Attend(vattn_batch* batch, int64_t position);

  const Trace& trace_;
  std::span<const int32_t> layers_;
  Runtime runtime_;
  Sequence sequence_;  // of the prompt, and of the steps until a restart
  Sequence fork_;
  Batch batch_, aside_;                // aside_: for the forks of StepAside, once there was one
  std::vector<std::byte> q_, k_, v_;   // [layers, heads, head_dim] of the step
  std::vector<std::byte> appended_q_;  // [tokens, q_heads, head_dim] of one layer
  std::optional<ReusedScores> scores_;
  StepResult result_;
};

}  // namespace vattn::bench

#endif  // VATTN_BENCH_REPLAY_SESSION_H_
