#include "bench/replay/match.h"

#include <cmath>
#include <limits>

#include "bench/cli/settings.h"
#include "bench/cli/text.h"
#include "bench/replay/report.h"

namespace vattn::bench {
namespace {

class Search {
 public:
  Search(const Trace& trace, const ReplayPlan& plan, const Reference& reference, double target_p95,
         Progress* progress)
      : trace_(trace),
        plan_(plan),
        reference_(reference),
        target_p95_(target_p95),
        progress_(progress) {
    plan_.seeds = 1;
    plan_.timed = false;
  }

  struct Result {
    bool reached;     // p95 of the error is at most the target
    double selected;  // mean share of the middle
  };

  Result Try(const vattn_options& options) {
    progress_->Begin("p95 error " + Number(target_p95_, 3) + " with " + DescribePolicy(options));
    const Observations seen = Replay(trace_, plan_, options, reference_, progress_);
    const Figures figures =
        Summarize(seen, {0, seen.layers, 0, seen.q_heads}, options.epsilon, options.delta);
    // A target of 0, where the verified policy read all, still has to allow for rounding.
    return {figures.error_p95 <= target_p95_ + 1e-6, figures.selected_mean};
  }

 private:
  const Trace& trace_;
  ReplayPlan plan_;
  const Reference& reference_;
  const double target_p95_;
  Progress* progress_;
};

// Sets epsilon to the largest that reaches the target and returns the mean selected share.
// Infinity, with epsilon of no meaning, once that is certain to be `best` or more.
double LargestEpsilon(Search* search, double best, vattn_options* options) {
  constexpr double kNone = std::numeric_limits<double>::infinity();
  constexpr float kTightest = .01f, kLoosest = 10;
  double share = kNone;
  float low = kTightest, high = kLoosest;
  for (float next = kLoosest; high / low > 1.03f; next = std::sqrt(low * high)) {
    options->epsilon = next;
    const Search::Result result = search->Try(*options);
    if (result.reached) {
      share = result.selected;
      low = next;
    } else {
      if (result.selected >= best) return kNone;  // a smaller epsilon reads more still
      high = next;
    }
  }
  options->epsilon = low;
  return share < best ? share : kNone;
}

}  // namespace

vattn_options MatchVerified(const Trace& trace, const ReplayPlan& plan,
                            const vattn_options& options, const Reference& reference,
                            double target_p95, Progress* progress) {
  Search search(trace, plan, reference, target_p95, progress);
  vattn_options matched = options;
  matched.policy = VATTN_POLICY_VERIFIED;
  LargestEpsilon(&search, std::numeric_limits<double>::infinity(), &matched);
  return matched;
}

vattn_options MatchTopK(const Trace& trace, const ReplayPlan& plan, const vattn_options& options,
                        const Reference& reference, double target_p95, Progress* progress) {
  Search search(trace, plan, reference, target_p95, progress);
  vattn_options matched = options;
  matched.policy = VATTN_POLICY_TOPK;
  float low = .0005f, high = 1;
  while (high / low > 1.02f) {
    matched.topk_share = std::sqrt(low * high);
    (search.Try(matched).reached ? high : low) = matched.topk_share;
  }
  matched.topk_share = high;
  return matched;
}

vattn_options MatchTopKUniform(const Trace& trace, const ReplayPlan& plan,
                               const vattn_options& options, const Reference& reference,
                               double target_p95, Progress* progress) {
  Search search(trace, plan, reference, target_p95, progress);
  vattn_options matched = options;
  matched.policy = VATTN_POLICY_TOPK_UNIFORM;
  matched.topk_share = 1;  // what remains if nothing on the grid reaches the target
  double best = 1;
  for (const float topk_share : {.01f, .02f, .05f, .1f}) {
    for (const float base_share : {.005f, .01f, .02f, .05f}) {
      if (topk_share + base_share >= best) continue;
      vattn_options tried = options;
      tried.policy = VATTN_POLICY_TOPK_UNIFORM;
      tried.topk_share = topk_share;
      tried.base_share = base_share;
      const double share = LargestEpsilon(&search, best, &tried);
      if (share >= best) continue;
      best = share;
      matched = tried;
    }
  }
  return matched;
}

}  // namespace vattn::bench
