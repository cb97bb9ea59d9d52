// A recording replayed as it grows: its tokens come in chunks and by decode steps, as an engine
// adds them, and chosen positions are judged against exact attention, beside sequences that got
// everything at once.
#ifndef VATTN_BENCH_REPLAY_FOLLOW_H_
#define VATTN_BENCH_REPLAY_FOLLOW_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "api/vattn.h"
#include "bench/cli/progress.h"
#include "bench/replay/session.h"
#include "bench/trace/trace.h"

namespace vattn::bench {

struct FollowPlan {
  std::vector<int32_t> layers;  // places in the trace
  // The first `prompt` tokens come in chunks of `chunk`, the first of `first`. The last `between`
  // tokens of every chunk but the last are decode steps. What follows up to `end` is decode steps.
  int64_t prompt = 0, chunk = 0, first = 0, between = 0, end = 0;
  bool build_each = false;  // the index is built after every chunk, as by vattn_prefix_save
  AppendedQueries queries = AppendedQueries::kOwn;
  // Judged are the last `judged` steps of every run of steps, and those before every multiple of
  // `every`.
  int64_t every = 1024, judged = 16;
  int32_t runs = 1;   // with seeds of their own
  int32_t forks = 8;  // at every judged position, each of which takes that step with fresh numbers
  bool at_once = true;    // compare with an index built on everything up to the judged positions
  int64_t settling = 16;  // steps that such a sequence takes first
};

// Judged steps that belong together: [begin, end) of the recording, all within one run of steps.
struct Stretch {
  int64_t begin = 0, end = 0;
};

// The tokens [begin, end) of the recording, appended or stepped through.
struct Piece {
  int64_t begin = 0, end = 0;
  bool steps = false;
};
// Throws UsageError if the recording has too few tokens, or no queries where there are steps.
std::vector<Piece> PiecesOf(const Trace& trace, const FollowPlan& plan);
std::vector<Stretch> StretchesOf(const std::vector<Piece>& pieces, const FollowPlan& plan);

// Which answers are counted.
enum Answers : int {
  kKeptGrown = 0,   // the growing sequence's own, with its random numbers kept from step to step
  kFreshGrown = 1,  // of its forks: all numbers are new
  kKeptAtOnce = 2,
  kFreshAtOnce = 3,
  kAnswers = 4,
};
const char* AnswersName(int answers);

// Of one (layer, query head) in one stretch and run.
struct HeadTally {
  int64_t answers = 0, exact = 0, verified = 0, dense = 0, best_effort = 0;
  int64_t failures = 0;  // verified, and off by more than epsilon
};
// Of one (layer, KV head).
struct RowTally {
  int64_t steps = 0;
  double middle = 0, selected = 0, fetched = 0, looks = 0;  // sums
};
struct Tally {
  std::vector<HeadTally> heads;  // [layers, q_heads]
  std::vector<RowTally> rows;    // [layers, kv_heads]
};

struct Followed {
  std::vector<Stretch> stretches;
  std::vector<Tally> tallies;  // [kAnswers, stretches, runs]
  // [stretches, runs] mean of the growing sequence's steps since the last one
  std::vector<double> step_us;
  // Every counter of the growing sequence's runtime after each stretch of the last run.
  std::vector<std::map<std::string, double>> counters;
  int32_t runs = 0;

  const Tally& At(int answers, size_t stretch, int32_t run) const {
    return tallies[(answers * stretches.size() + stretch) * runs + run];
  }
};

// REQUIRES options shaped by SetShape for a plan with forks.
Followed Follow(const Trace& trace, const FollowPlan& plan, const vattn_options& options,
                Progress* progress);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_REPLAY_FOLLOW_H_
