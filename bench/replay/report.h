// Observations boiled down to the figures that vattn is judged by, as JSON and as a
// markdown table.
#ifndef VATTN_BENCH_REPLAY_REPORT_H_
#define VATTN_BENCH_REPLAY_REPORT_H_

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "bench/cli/json.h"
#include "bench/replay/replay.h"

namespace vattn::bench {

inline constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();  // "-", in JSON null

struct Figures {
  int64_t heads = 0;  // results: (seed, layer, query head, step)
  int64_t exact = 0, verified = 0, dense = 0, best_effort = 0;  // of them, by verdict
  double error_mean = kUnknown, error_p50 = kUnknown, error_p95 = kUnknown, error_max = kUnknown;
  int64_t failures = 0;  // verified, and the error is over epsilon
  double upper95 = 1;    // 95 % upper bound on the probability of a failure
  double sharpness = kUnknown;
  // Shares are of the middle, over (seed, layer, KV head, step).
  double selected_mean = kUnknown, selected_p50 = kUnknown, selected_p90 = kUnknown;
  double fetched_mean = kUnknown, hot_hit_rate = kUnknown, looks_mean = kUnknown;
};

// A part of the observations; all seeds and steps. KV heads are those that the query heads read.
struct Part {
  int64_t layer_begin = 0, layer_end = 0;
  int64_t q_head_begin = 0, q_head_end = 0;
};
Figures Summarize(const Observations& seen, const Part& part, double epsilon, double delta);

// One configuration and what it did.
struct Run {
  std::string name;
  vattn_options options = {};
  int64_t num_kv_heads = 0;
  Figures all;
  struct Layer {
    std::string name;
    Figures all;
    std::vector<Figures> heads;  // [q_heads]
  };
  std::vector<Layer> layers;
  double bytes_per_step = 0;
  double vattn_us = kUnknown, dense_us = kUnknown;  // medians of a step; unknown if not timed
};
Run MakeRun(std::string name, const Trace& trace, const ReplayPlan& plan,
            const vattn_options& options, const Observations& seen);

Json RunJson(const Run& run);
// One column for each run.
std::string RunTable(const std::vector<const Run*>& runs);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_REPLAY_REPORT_H_
