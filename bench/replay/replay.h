// Runs one configuration over a recorded trace through the C API and writes down what came out.
#ifndef VATTN_BENCH_REPLAY_REPLAY_H_
#define VATTN_BENCH_REPLAY_REPLAY_H_

#include <cstdint>
#include <vector>

#include "api/vattn.h"
#include "bench/cli/progress.h"
#include "bench/trace/reference.h"
#include "bench/trace/trace.h"

namespace vattn::bench {

struct ReplayPlan {
  std::vector<int32_t> layers;  // places in the trace
  int64_t steps = 0;
  int32_t seeds = 1;           // runs with options.seed, options.seed + 1, ...
  bool forks = false;          // runs are forks of one prompt instead, which saves the index
  bool prompt_queries = true;  // recorded ones calibrate the index
  bool timed = false;          // in the first run, policy dense goes over the same steps in turns
};

// Everything seen, in the order (seed, layer, head, step).
struct Observations {
  int64_t seeds = 0, layers = 0, q_heads = 0, kv_heads = 0, steps = 0;
  // By query head.
  std::vector<double> error;     // relative to the reference
  std::vector<double> estimate;  // the library's bound on it
  std::vector<int32_t> verdict;  // vattn_verdict
  // By KV head.
  std::vector<int32_t> selected, fetched, looks;
  std::vector<int64_t> middle;
  uint64_t bytes_fetched = 0;  // over all runs
  // Microseconds of a step over all layers, opening the step included; empty if not timed.
  std::vector<double> policy_us, dense_us;

  int64_t QHeadIndex(int64_t seed, int64_t layer, int64_t head, int64_t step) const {
    return ((seed * layers + layer) * q_heads + head) * steps + step;
  }
  int64_t KvHeadIndex(int64_t seed, int64_t layer, int64_t head, int64_t step) const {
    return ((seed * layers + layer) * kv_heads + head) * steps + step;
  }
};

// Fills in what the trace decides: shape, type, room for its tokens.
void SetShape(const Trace& trace, const ReplayPlan& plan, vattn_options* options);

// REQUIRES options shaped by SetShape for the same trace and plan, and a reference of plan.layers
// and plan.steps.
Observations Replay(const Trace& trace, const ReplayPlan& plan, const vattn_options& options,
                    const Reference& reference, Progress* progress);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_REPLAY_REPLAY_H_
