#include "bench/replay/follow.h"

#include <algorithm>
#include <numeric>

#include "bench/cli/environment.h"
#include "bench/cli/failure.h"
#include "bench/trace/reference.h"

namespace vattn::bench {
namespace {

constexpr uint64_t kFirstFork = 1000;

// Counts what a step gave. place: of the position in the reference.
class Judge {
 public:
  Judge(const Trace& trace, const FollowPlan& plan, const vattn_options& options,
        const Reference& reference)
      : trace_(trace), plan_(plan), options_(options), reference_(reference) {}

  void Count(const StepResult& result, int64_t place, Tally* tally) const {
    const auto layers = static_cast<int64_t>(plan_.layers.size());
    for (int64_t layer = 0; layer < layers; ++layer) {
      for (int64_t head = 0; head < trace_.q_heads; ++head) {
        const int64_t i = layer * trace_.q_heads + head,
                      exact = reference_.Index(layer, head, place);
        const double distance =
            DistanceToReference(reference_, exact, &result.out[i * reference_.head_dim_v]);
        const double ref = reference_.Ref(exact, options_.norm, options_.norm_floor);
        HeadTally& t = tally->heads[i];
        ++t.answers;
        t.exact += result.verdict[i] == VATTN_VERDICT_EXACT;
        t.verified += result.verdict[i] == VATTN_VERDICT_VERIFIED;
        t.dense += result.verdict[i] == VATTN_VERDICT_DENSE;
        t.best_effort += result.verdict[i] == VATTN_VERDICT_BEST_EFFORT;
        // Written so that an error that is no number counts as a failure.
        const bool within = distance == 0 || distance / ref <= options_.epsilon;
        t.failures += result.verdict[i] == VATTN_VERDICT_VERIFIED && !within;
      }
    }
    for (size_t i = 0; i < tally->rows.size(); ++i) {
      RowTally& t = tally->rows[i];
      ++t.steps;
      t.middle += static_cast<double>(result.middle[i]);
      t.selected += result.selected[i];
      t.fetched += result.fetched[i];
      t.looks += result.looks[i];
    }
  }

 private:
  const Trace& trace_;
  const FollowPlan& plan_;
  const vattn_options& options_;
  const Reference& reference_;
};

// One growing sequence, and what it is compared with.
class Run {
 public:
  Run(const Trace& trace, const FollowPlan& plan, const vattn_options& options, const Judge& judge,
      int32_t run, Progress* progress, Followed* followed)
      : trace_(trace),
        plan_(plan),
        options_(options),
        judge_(judge),
        run_(run),
        progress_(progress),
        followed_(followed) {
    options_.seed += static_cast<uint64_t>(run);
  }

  void Grow(const std::vector<Piece>& pieces) {
    Session session(trace_, plan_.layers, options_);
    size_t stretch = 0;
    double us = 0;
    int64_t steps = 0;
    for (const Piece& piece : pieces) {
      if (!piece.steps) {
        session.Append(piece.begin, piece.end - piece.begin, plan_.queries);
        if (plan_.build_each) session.BuildIndex();
        continue;
      }
      for (int64_t position = piece.begin; position < piece.end; ++position) {
        const bool judged = stretch < followed_->stretches.size() &&
                            position >= followed_->stretches[stretch].begin;
        if (judged) Forks(session, position, Place(stretch, position), At(kFreshGrown, stretch));
        us += session.StepAt(position);
        ++steps;
        if (!judged) continue;
        judge_.Count(session.result(), Place(stretch, position), At(kKeptGrown, stretch));
        if (position + 1 < followed_->stretches[stretch].end) continue;
        followed_->step_us[stretch * plan_.runs + run_] = us / static_cast<double>(steps);
        followed_->counters[stretch] = session.counters();
        us = 0, steps = 0;
        if (plan_.at_once) AtOnce(stretch);
        ++stretch;
        progress_->Count(run_ * static_cast<int64_t>(followed_->stretches.size()) +
                             static_cast<int64_t>(stretch),
                         plan_.runs * static_cast<int64_t>(followed_->stretches.size()));
      }
    }
  }

 private:
  Tally* At(int answers, size_t stretch) {
    return &followed_
                ->tallies[(answers * followed_->stretches.size() + stretch) * plan_.runs + run_];
  }

  // Of a judged position in the reference.
  int64_t Place(size_t stretch, int64_t position) const {
    int64_t place = position - followed_->stretches[stretch].begin;
    for (size_t i = 0; i < stretch; ++i)
      place += followed_->stretches[i].end - followed_->stretches[i].begin;
    return place;
  }

  void Forks(Session& session, int64_t position, int64_t place, Tally* tally) {
    for (int32_t fork = 0; fork < plan_.forks; ++fork) {
      session.StepAside(kFirstFork + next_fork_++, position);
      judge_.Count(session.result(), place, tally);
    }
  }

  // The same steps of a sequence that got all tokens before them at once.
  void AtOnce(size_t stretch) {
    const Stretch& part = followed_->stretches[stretch];
    const int64_t begin = std::max({part.begin - plan_.settling, FirstQuery(trace_), int64_t{1}});
    Session session(trace_, plan_.layers, options_);
    session.Append(0, begin, plan_.queries);
    session.BuildIndex();
    for (int64_t position = begin; position < part.end; ++position) {
      const bool judged = position >= part.begin;
      if (judged) Forks(session, position, Place(stretch, position), At(kFreshAtOnce, stretch));
      session.StepAt(position);
      if (judged)
        judge_.Count(session.result(), Place(stretch, position), At(kKeptAtOnce, stretch));
    }
  }

  const Trace& trace_;
  const FollowPlan& plan_;
  vattn_options options_;
  const Judge& judge_;
  const int32_t run_;
  Progress* const progress_;
  Followed* const followed_;
  uint64_t next_fork_ = 0;
};

}  // namespace

std::vector<Piece> PiecesOf(const Trace& trace, const FollowPlan& plan) {
  std::vector<Piece> pieces;
  for (int64_t begin = 0; begin < plan.prompt;) {
    const int64_t end = std::min(plan.prompt, begin + (begin == 0 ? plan.first : plan.chunk));
    const int64_t stepped = end < plan.prompt ? end - plan.between : end;
    if (stepped <= begin) {
      throw UsageError("--between: " + std::to_string(plan.between) +
                       ", must be below the chunk of " + std::to_string(end - begin) +
                       " tokens at " + std::to_string(begin));
    }
    pieces.push_back({begin, stepped, false});
    if (stepped < end) pieces.push_back({stepped, end, true});
    begin = end;
  }
  if (plan.prompt < plan.end) pieces.push_back({plan.prompt, plan.end, true});
  for (const Piece& piece : pieces) {
    const int64_t last =
        trace.prompt_tokens + (piece.steps ? trace.steps : trace.tokens - trace.prompt_tokens);
    if (piece.end > last || (piece.steps && piece.begin < FirstQuery(trace))) {
      throw UsageError(
          (piece.steps ? "steps over tokens " : "tokens ") + std::to_string(piece.begin) + " to " +
          std::to_string(piece.end - 1) + ": the recording has " +
          (piece.steps ? "queries of " + std::to_string(FirstQuery(trace)) : std::string("0")) +
          " to " + std::to_string(last - 1));
    }
  }
  return pieces;
}

std::vector<Stretch> StretchesOf(const std::vector<Piece>& pieces, const FollowPlan& plan) {
  std::vector<Stretch> stretches;
  for (const Piece& piece : pieces) {
    if (!piece.steps) continue;
    for (int64_t begin = piece.begin; begin < piece.end;) {
      const int64_t end = std::min(piece.end, (begin / plan.every + 1) * plan.every);
      stretches.push_back({std::max(begin, end - plan.judged), end});
      begin = end;
    }
  }
  return stretches;
}

const char* AnswersName(int answers) {
  constexpr const char* kNames[] = {"kept", "fresh", "kept, at once", "fresh, at once"};
  return kNames[answers];
}

Followed Follow(const Trace& trace, const FollowPlan& plan, const vattn_options& options,
                Progress* progress) {
  const std::vector<Piece> pieces = PiecesOf(trace, plan);
  Followed followed;
  followed.stretches = StretchesOf(pieces, plan);
  followed.runs = plan.runs;
  Tally empty;
  empty.heads.resize(plan.layers.size() * trace.q_heads);
  empty.rows.resize(plan.layers.size() * trace.kv_heads);
  followed.tallies.assign(kAnswers * followed.stretches.size() * plan.runs, empty);
  followed.step_us.resize(followed.stretches.size() * plan.runs);
  followed.counters.resize(followed.stretches.size());
  std::vector<int64_t> positions;
  for (const Stretch& stretch : followed.stretches) {
    for (int64_t position = stretch.begin; position < stretch.end; ++position)
      positions.push_back(position);
  }
  progress->Begin("exact attention in float64");
  const Reference reference =
      ComputeReferenceAt(trace, plan.layers, positions, ResolveThreads(options.num_threads));
  const Judge judge(trace, plan, options, reference);
  progress->Begin("stretches");
  for (int32_t run = 0; run < plan.runs; ++run) {
    Run(trace, plan, options, judge, run, progress, &followed).Grow(pieces);
  }
  return followed;
}

}  // namespace vattn::bench
