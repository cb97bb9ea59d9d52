#include "bench/replay/certify.h"

#include <algorithm>

#include "bench/cli/statistics.h"
#include "bench/cli/text.h"
#include "bench/replay/report.h"

namespace vattn::bench {
namespace {

constexpr double kConfidence = .95, kAlarm = 1e-6;

const char* Name(Trials trials) {
  switch (trials) {
    case Trials::kFresh:
      return "fresh";
    case Trials::kKept:
      return "kept";
    case Trials::kCall:
      return "call";
    default:
      return "request";
  }
}

struct Bounds {
  double rate = 0, upper = 1, lower = 0;  // 95 %
  double alarm = 0;                       // the lower bound at confidence 1 - kAlarm
  int64_t failures = 0, verified = 0;
};

// Of one head, or of all of `part`, with every run a cluster.
Bounds ByRun(const Observations& seen, const Part& part, double epsilon, bool any) {
  Bounds bounds;
  double failed = 0;
  for (int64_t run = 0; run < seen.seeds; ++run) {
    int64_t failures = 0, verified = 0;
    for (int64_t layer = part.layer_begin; layer < part.layer_end; ++layer) {
      for (int64_t head = part.q_head_begin; head < part.q_head_end; ++head) {
        for (int64_t step = 0; step < seen.steps; ++step) {
          const int64_t index = seen.QHeadIndex(run, layer, head, step);
          if (seen.verdict[index] != VATTN_VERDICT_VERIFIED) continue;
          ++verified;
          failures += !(seen.error[index] <= epsilon);
        }
      }
    }
    bounds.failures += failures;
    bounds.verified += verified;
    if (any) failed += failures > 0;
    if (!any && verified > 0)
      failed += static_cast<double>(failures) / static_cast<double>(verified);
  }
  const auto runs = static_cast<double>(seen.seeds);
  bounds.rate = failed / runs;
  // Whether a run fails is one trial; a share of failures takes the bound for clusters.
  bounds.upper = any ? ClopperPearsonUpper(static_cast<int64_t>(failed), seen.seeds, kConfidence)
                     : ClusterUpper(failed, seen.seeds, kConfidence);
  const auto lower = [&](double confidence) {
    return 1 -
           (any ? ClopperPearsonUpper(static_cast<int64_t>(runs - failed), seen.seeds, confidence)
                : ClusterUpper(runs - failed, seen.seeds, confidence));
  };
  bounds.lower = lower(kConfidence);
  bounds.alarm = lower(1 - kAlarm);
  return bounds;
}

Bounds ByAnswer(int64_t failures, int64_t verified) {
  Bounds bounds;
  if (verified == 0) return {.upper = 0};  // nothing was promised
  bounds.failures = failures;
  bounds.verified = verified;
  bounds.rate = static_cast<double>(failures) / static_cast<double>(verified);
  bounds.upper = ClopperPearsonUpper(failures, verified, kConfidence);
  bounds.lower = 1 - ClopperPearsonUpper(verified - failures, verified, kConfidence);
  bounds.alarm = 1 - ClopperPearsonUpper(verified - failures, verified, 1 - kAlarm);
  return bounds;
}

// Of one (layer, query head, step) over the runs [begin, end).
Bounds ByCall(const Observations& seen, int64_t layer, int64_t head, int64_t step, int64_t begin,
              int64_t end, double epsilon) {
  int64_t failures = 0, verified = 0;
  for (int64_t run = begin; run < end; ++run) {
    const int64_t index = seen.QHeadIndex(run, layer, head, step);
    if (seen.verdict[index] != VATTN_VERDICT_VERIFIED) continue;
    ++verified;
    failures += !(seen.error[index] <= epsilon);
  }
  return ByAnswer(failures, verified);
}

}  // namespace

std::vector<Cell> CoverageGrid() {
  std::vector<Cell> cells;
  for (const Trials trials : {Trials::kFresh, Trials::kKept, Trials::kRequest}) {
    for (const float epsilon : {.05f, .1f, .2f}) {
      for (const float delta : {.05f, .1f}) cells.push_back({epsilon, delta, trials});
    }
  }
  return cells;
}

Coverage MeasureCoverage(const Trace& trace, const ReplayPlan& plan, const vattn_options& options,
                         const Reference& reference, const Cell& cell, Progress* progress) {
  vattn_options asked = options;
  asked.epsilon = cell.epsilon;
  asked.delta = cell.delta;
  if (cell.trials == Trials::kFresh || cell.trials == Trials::kCall) asked.refresh = 1;
  if (cell.trials == Trials::kRequest) {
    asked.delta /=
        static_cast<float>(static_cast<int64_t>(plan.layers.size()) * trace.q_heads * plan.steps);
  }
  const Observations seen = Replay(trace, plan, asked, reference, progress);
  const Figures all = Summarize(seen, {0, seen.layers, 0, seen.q_heads}, cell.epsilon, cell.delta);
  Coverage c;
  c.cell = cell;
  c.answer_delta = asked.delta;
  c.answers = all.heads;
  c.verified = all.verified;
  c.dense = all.dense;
  c.best_effort = all.best_effort;
  c.failures = all.failures;
  c.selected = all.selected_mean;
  c.fetched = all.fetched_mean;
  c.sharpness = all.sharpness;
  c.looks = all.looks_mean;
  c.worst_upper = -1;
  const auto note = [&](const std::string& name, const Bounds& bounds) {
    c.refuted = c.refuted || bounds.alarm > cell.delta;
    const bool more = bounds.lower > c.suspect.lower ||
                      (bounds.lower == c.suspect.lower && bounds.upper > c.suspect.upper);
    if (bounds.verified > 0 && more)
      c.suspect = {name, bounds.failures, bounds.verified, bounds.lower, bounds.upper};
    if (bounds.upper <= c.worst_upper) return;
    c.worst = name;
    c.worst_rate = bounds.rate;
    c.worst_upper = bounds.upper;
  };
  if (cell.trials == Trials::kCall) {
    const int64_t half = seen.seeds / 2;
    Bounds worst;
    int64_t at[3] = {0, 0, 0};
    for (int64_t layer = 0; layer < seen.layers; ++layer) {
      for (int64_t head = 0; head < seen.q_heads; ++head) {
        for (int64_t step = 0; step < seen.steps; ++step) {
          const Bounds b = ByCall(seen, layer, head, step, 0, half, cell.epsilon);
          if (b.lower <= worst.lower) continue;
          worst = b;
          at[0] = layer, at[1] = head, at[2] = step;
        }
      }
    }
    note(trace.layer_names[plan.layers[at[0]]] + "/" + std::to_string(at[1]) + " step " +
             std::to_string(at[2]),
         ByCall(seen, at[0], at[1], at[2], half, seen.seeds, cell.epsilon));
    return c;
  }
  if (cell.trials == Trials::kRequest) {
    note("all", ByRun(seen, {0, seen.layers, 0, seen.q_heads}, cell.epsilon, /*any=*/true));
    return c;
  }
  for (int64_t layer = 0; layer < seen.layers; ++layer) {
    for (int64_t head = 0; head < seen.q_heads; ++head) {
      const Part part = {layer, layer + 1, head, head + 1};
      const Figures f = Summarize(seen, part, cell.epsilon, cell.delta);
      note(trace.layer_names[plan.layers[layer]] + "/" + std::to_string(head),
           cell.trials == Trials::kFresh ? ByAnswer(f.failures, f.verified)
                                         : ByRun(seen, part, cell.epsilon, /*any=*/false));
    }
  }
  return c;
}

std::vector<std::vector<std::string>> CoverageRows(const std::string& name,
                                                   const std::vector<Coverage>& list) {
  std::vector<std::vector<std::string>> rows = {
      {"recording", "trials", "epsilon", "delta", "answers", "verified", "dense",
       "off, of verified", "worst layer/head", "its rate", "95 % upper", "holds",
       "highest lower bound", "of", "off / verified", "selected", "fetched", "sharpness", "looks"}};
  for (const Coverage& c : list) {
    const auto share = [&](int64_t count, int64_t of) {
      return of == 0 ? "-" : Percent(static_cast<double>(count) / static_cast<double>(of));
    };
    rows.push_back(
        {name, Name(c.cell.trials), Number(c.cell.epsilon, 2), Number(c.cell.delta, 2),
         std::to_string(c.answers), share(c.verified, c.answers), share(c.dense, c.answers),
         share(c.failures, c.verified), c.worst, Percent(c.worst_rate), Number(c.worst_upper, 3),
         c.refuted   ? "REFUTED"
         : c.holds() ? "yes"
                     : "not shown",
         Number(c.suspect.lower, 3), c.suspect.name,
         std::to_string(c.suspect.failures) + " / " + std::to_string(c.suspect.verified),
         Percent(c.selected), Percent(c.fetched), Fixed(c.sharpness, 2), Fixed(c.looks, 2)});
  }
  return rows;
}

Json CoverageJson(const Coverage& c) {
  return {{"trials", Name(c.cell.trials)},
          {"epsilon", Rounded(c.cell.epsilon)},
          {"delta", Rounded(c.cell.delta)},
          {"answer_delta", c.answer_delta},
          {"answers", c.answers},
          {"verified", c.verified},
          {"dense", c.dense},
          {"best_effort", c.best_effort},
          {"failures", c.failures},
          {"worst", {{"head", c.worst}, {"rate", c.worst_rate}, {"upper95", c.worst_upper}}},
          {"suspect",
           {{"head", c.suspect.name},
            {"off", c.suspect.failures},
            {"verified", c.suspect.verified},
            {"lower95", c.suspect.lower},
            {"upper95", c.suspect.upper}}},
          {"holds", c.holds()},
          {"refuted", c.refuted},
          {"selected_share", c.selected},
          {"fetched_share", c.fetched},
          {"sharpness", c.sharpness},
          {"looks", c.looks}};
}

}  // namespace vattn::bench
