#include "bench/replay/follow_report.h"

#include <string>
#include <tuple>
#include <vector>

#include "bench/cli/statistics.h"
#include "bench/cli/text.h"
#include "bench/replay/report.h"

namespace vattn::bench {
namespace {

constexpr double kConfidence = .95;

// Stretches and layers [begin, end) that figures are of.
struct Scope {
  size_t stretch_begin = 0, stretch_end = 0;
  int64_t layer_begin = 0, layer_end = 0;
};

struct Bounds {
  std::string head = "-";
  int64_t failures = 0, verified = 0;
  double lower = 0, upper = 0;
};

struct Sums {
  HeadTally heads;
  RowTally rows;
  Bounds worst;  // the (layer, query head) with the highest lower bound, then the highest upper one

  double Selected() const {
    return rows.steps > 0 ? rows.selected / static_cast<double>(rows.steps) : kUnknown;
  }
  double Fetched() const {
    return rows.steps > 0 ? rows.fetched / static_cast<double>(rows.steps) : kUnknown;
  }
  double Share() const { return rows.middle > 0 ? rows.selected / rows.middle : kUnknown; }
  double Of(int64_t count) const {
    return heads.answers > 0 ? static_cast<double>(count) / static_cast<double>(heads.answers)
                             : kUnknown;
  }
};

void Add(const HeadTally& from, HeadTally* to) {
  to->answers += from.answers;
  to->exact += from.exact;
  to->verified += from.verified;
  to->dense += from.dense;
  to->best_effort += from.best_effort;
  to->failures += from.failures;
}

void Add(const RowTally& from, RowTally* to) {
  to->steps += from.steps;
  to->middle += from.middle;
  to->selected += from.selected;
  to->fetched += from.fetched;
  to->looks += from.looks;
}

// Bounds on the probability that a verified answer of one head is off. With fresh numbers every
// answer is a trial; with kept ones a run is, and of the answers only the share that is off counts.
Bounds HeadBounds(const Followed& followed, int answers, const Scope& scope, size_t head) {
  Bounds b;
  double failed = 0;
  int64_t runs = 0;
  for (int32_t run = 0; run < followed.runs; ++run) {
    HeadTally sum;
    for (size_t s = scope.stretch_begin; s < scope.stretch_end; ++s) {
      Add(followed.At(answers, s, run).heads[head], &sum);
    }
    b.failures += sum.failures;
    b.verified += sum.verified;
    if (sum.verified == 0) continue;
    failed += static_cast<double>(sum.failures) / static_cast<double>(sum.verified);
    ++runs;
  }
  if (b.verified == 0) return b;  // nothing was promised
  if (answers == kFreshGrown || answers == kFreshAtOnce) {
    b.upper = ClopperPearsonUpper(b.failures, b.verified, kConfidence);
    b.lower = 1 - ClopperPearsonUpper(b.verified - b.failures, b.verified, kConfidence);
  } else {
    b.upper = ClusterUpper(failed, runs, kConfidence);
    b.lower = 1 - ClusterUpper(static_cast<double>(runs) - failed, runs, kConfidence);
  }
  return b;
}

Sums Sum(const Followed& followed, const Trace& trace, const FollowPlan& plan, int answers,
         const Scope& scope) {
  Sums sums;
  for (int32_t run = 0; run < followed.runs; ++run) {
    for (size_t s = scope.stretch_begin; s < scope.stretch_end; ++s) {
      const Tally& tally = followed.At(answers, s, run);
      for (int64_t i = scope.layer_begin * trace.q_heads; i < scope.layer_end * trace.q_heads;
           ++i) {
        Add(tally.heads[i], &sums.heads);
      }
      for (int64_t i = scope.layer_begin * trace.kv_heads; i < scope.layer_end * trace.kv_heads;
           ++i) {
        Add(tally.rows[i], &sums.rows);
      }
    }
  }
  for (int64_t i = scope.layer_begin * trace.q_heads; i < scope.layer_end * trace.q_heads; ++i) {
    Bounds b = HeadBounds(followed, answers, scope, i);
    const bool more =
        b.lower > sums.worst.lower || (b.lower == sums.worst.lower && b.upper > sums.worst.upper);
    if (b.verified == 0 || !more) continue;
    b.head =
        trace.layer_names[plan.layers[i / trace.q_heads]] + "/" + std::to_string(i % trace.q_heads);
    sums.worst = b;
  }
  return sums;
}

// Rows of a growing sequence over those of one that got everything at once.
double Ratio(const Sums& grown, const Sums& at_once) {
  return at_once.rows.selected > 0 ? grown.Selected() / at_once.Selected() : kUnknown;
}

Json SumsJson(const Sums& s) {
  return {{"rows", s.Selected()},
          {"share", s.Share()},
          {"fetched", s.Fetched()},
          {"looks", s.rows.steps > 0 ? s.rows.looks / static_cast<double>(s.rows.steps) : kUnknown},
          {"answers", s.heads.answers},
          {"verified", s.heads.verified},
          {"dense", s.heads.dense},
          {"exact", s.heads.exact},
          {"best_effort", s.heads.best_effort},
          {"off", s.heads.failures},
          {"worst",
           {{"head", s.worst.head},
            {"off", s.worst.failures},
            {"verified", s.worst.verified},
            {"lower95", s.worst.lower},
            {"upper95", s.worst.upper}}}};
}

// Of all four kinds of answers.
Json ScopeJson(const Followed& followed, const Trace& trace, const FollowPlan& plan,
               const Scope& scope) {
  Json json;
  constexpr const char* kKeys[] = {"kept", "fresh", "kept_at_once", "fresh_at_once"};
  std::vector<Sums> sums;
  for (int answers = 0; answers < kAnswers; ++answers) {
    sums.push_back(Sum(followed, trace, plan, answers, scope));
    if (sums.back().heads.answers > 0) json[kKeys[answers]] = SumsJson(sums.back());
  }
  if (plan.at_once) {
    json["ratio_kept"] = Ratio(sums[kKeptGrown], sums[kKeptAtOnce]);
    json["ratio_fresh"] = Ratio(sums[kFreshGrown], sums[kFreshAtOnce]);
  }
  return json;
}

Scope Everything(const Followed& followed, const FollowPlan& plan) {
  return {0, followed.stretches.size(), 0, static_cast<int64_t>(plan.layers.size())};
}

std::vector<std::string> Header(const std::string& first) {
  return {first,   "rows", "of the middle", "fetched",    "verified",   "dense",
          "exact", "off",  "worst",         "95 % lower", "95 % upper", "at once: rows",
          "dense", "off",  "worst",         "95 % upper", "ratio"};
}

std::vector<std::string> Row(const std::string& name, const Sums& grown, const Sums& once,
                             double delta) {
  const auto upper = [&](const Sums& s) {
    return s.worst.verified == 0 ? std::string("-")
                                 : Fixed(s.worst.upper, 4) + (s.worst.lower > delta ? " !" : "");
  };
  return {name,
          Fixed(grown.Selected(), 0),
          Percent(grown.Share()),
          Fixed(grown.Fetched(), 0),
          Percent(grown.Of(grown.heads.verified)),
          Percent(grown.Of(grown.heads.dense)),
          Percent(grown.Of(grown.heads.exact)),
          std::to_string(grown.heads.failures),
          grown.worst.head,
          Fixed(grown.worst.lower, 4),
          upper(grown),
          Fixed(once.Selected(), 0),
          Percent(once.Of(once.heads.dense)),
          std::to_string(once.heads.failures),
          once.worst.head,
          upper(once),
          Fixed(Ratio(grown, once), 2)};
}

}  // namespace

Json FollowJson(const Followed& followed, const Trace& trace, const FollowPlan& plan,
                double delta) {
  Json json;
  const auto layers = static_cast<int64_t>(plan.layers.size());
  json["delta"] = delta;
  json["all"] = ScopeJson(followed, trace, plan, Everything(followed, plan));
  json["layers"] = Json::array();
  for (int64_t layer = 0; layer < layers; ++layer) {
    Json entry = {{"layer", trace.layer_names[plan.layers[layer]]}};
    entry.update(
        ScopeJson(followed, trace, plan, {0, followed.stretches.size(), layer, layer + 1}));
    json["layers"].push_back(std::move(entry));
  }
  json["positions"] = Json::array();
  for (size_t s = 0; s < followed.stretches.size(); ++s) {
    Json entry = {{"begin", followed.stretches[s].begin}, {"end", followed.stretches[s].end}};
    entry.update(ScopeJson(followed, trace, plan, {s, s + 1, 0, layers}));
    double us = 0;
    for (int32_t run = 0; run < followed.runs; ++run)
      us += followed.step_us[s * followed.runs + run];
    entry["step_us"] = us / followed.runs;
    Json counters = Json::object();
    // Gauges and counters of the index by name, whichever the library has; all of them once, at the
    // end.
    for (const auto& [name, value] : followed.counters[s]) {
      const bool of_index =
          name.find("index") != std::string::npos || name.find("recoded") != std::string::npos ||
          name.find("outlier") != std::string::npos || name.find("segment") != std::string::npos;
      if (of_index) counters[name] = value;
    }
    if (!counters.empty()) entry["counters"] = std::move(counters);
    json["positions"].push_back(std::move(entry));
  }
  json["counters"] = followed.counters.empty() ? Json::object() : Json(followed.counters.back());
  return json;
}

std::string FollowTables(const Followed& followed, const Trace& trace, const FollowPlan& plan,
                         double delta) {
  const auto layers = static_cast<int64_t>(plan.layers.size());
  std::string text;
  for (const auto& [grown, once, title] :
       {std::tuple(kKeptGrown, kKeptAtOnce,
                   "random numbers kept from step to step (bounds: a run is a trial)"),
        std::tuple(kFreshGrown, kFreshAtOnce,
                   "fresh random numbers (bounds: an answer is a trial)")}) {
    if (grown == kFreshGrown && plan.forks == 0) continue;
    const auto row = [&, grown = grown, once = once](const std::string& name, const Scope& scope) {
      return Row(name, Sum(followed, trace, plan, grown, scope),
                 Sum(followed, trace, plan, once, scope), delta);
    };
    std::vector<std::vector<std::string>> rows = {Header("tokens")};
    for (size_t s = 0; s < followed.stretches.size(); ++s) {
      rows.push_back(row(std::to_string(followed.stretches[s].end), {s, s + 1, 0, layers}));
    }
    for (int64_t layer = 0; layer < layers; ++layer) {
      rows.push_back(row("layer " + trace.layer_names[plan.layers[layer]],
                         {0, followed.stretches.size(), layer, layer + 1}));
    }
    rows.push_back(row("all", Everything(followed, plan)));
    text += std::string(text.empty() ? "" : "\n") + title + "\n\n" + MarkdownTable(rows);
  }
  return text;
}

}  // namespace vattn::bench
