// Coverage of the promise, by layer and query head: how often a result that is flagged VERIFIED is
// off by more than epsilon, with exact upper bounds on that probability.
#ifndef VATTN_BENCH_REPLAY_CERTIFY_H_
#define VATTN_BENCH_REPLAY_CERTIFY_H_

#include <cstdint>
#include <string>
#include <vector>

#include "api/vattn.h"
#include "bench/cli/json.h"
#include "bench/cli/progress.h"
#include "bench/replay/replay.h"
#include "bench/trace/reference.h"
#include "bench/trace/trace.h"

namespace vattn::bench {

// What a trial is.
enum class Trials {
  // An answer, all random numbers new: given the past, each is off with probability <= delta
  kFresh,
  kKept,     // an answer, random numbers kept from step to step as in production; runs are clusters
  kRequest,  // a whole request: delta is for any of its answers, each of which gets an equal part
  kCall,  // one (step, query head), all random numbers new: a trial is a run. Which is worst is seen in the
          // first half of the runs, and judged on the other
};

struct Cell {
  float epsilon = .1f, delta = .1f;
  Trials trials = Trials::kFresh;
};
// {.05, .1, .2} x {.05, .1} of each kind but calls.
std::vector<Cell> CoverageGrid();

struct Coverage {
  Cell cell;
  float answer_delta = 0;  // that each answer was given
  int64_t answers = 0;     // by verdict: verified, dense and the rest, exact included
  int64_t verified = 0, dense = 0, best_effort = 0;
  int64_t failures = 0;  // verified, and off by more than epsilon
  // Of the (layer, query head), or of the recording with kRequest, whose bound is highest.
  std::string worst;
  double worst_rate = 0;   // of its verified answers, or of its requests
  double worst_upper = 1;  // 95 % upper bound on the probability
  // The head or call that speaks most against the promise: whose 95 % lower bound is highest. With
  // kCall its numbers are of the second half of the runs.
  struct Suspect {
    std::string name = "-";
    int64_t failures = 0, verified = 0;
    double lower = 0, upper = 0;
  } suspect;
  bool refuted = false;              // some lower bound, at confidence 1 - 1e-6, lies above delta
  double selected = 0, fetched = 0;  // mean shares of the middle
  double sharpness = 0, looks = 0;
  bool holds() const { return worst_upper <= cell.delta; }
};

// Runs plan.seeds forks of the recording's prompt. options, shaped by SetShape for a plan with
// forks, say everything but epsilon, delta, refresh.
Coverage MeasureCoverage(const Trace& trace, const ReplayPlan& plan, const vattn_options& options,
                         const Reference& reference, const Cell& cell, Progress* progress);

// Rows for a table; the first line is the header.
std::vector<std::vector<std::string>> CoverageRows(const std::string& name,
                                                   const std::vector<Coverage>& list);
Json CoverageJson(const Coverage& coverage);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_REPLAY_CERTIFY_H_
