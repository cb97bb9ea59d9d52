#include "bench/replay/report.h"

#include <algorithm>

#include "bench/cli/settings.h"
#include "bench/cli/statistics.h"
#include "bench/cli/text.h"

namespace vattn::bench {
namespace {

void AddVerdict(int32_t verdict, Figures* figures) {
  switch (verdict) {
    case VATTN_VERDICT_EXACT:
      ++figures->exact;
      break;
    case VATTN_VERDICT_VERIFIED:
      ++figures->verified;
      break;
    case VATTN_VERDICT_DENSE:
      ++figures->dense;
      break;
    default:
      ++figures->best_effort;
  }
}

// The error of the head that decided how much its group had to read: of the verified ones the one
// with the largest estimate. Counted only if that head lies in the part.
void AddDecidingError(const Observations& seen, const Part& part, int64_t seed, int64_t layer,
                      int64_t kv_head, int64_t step, std::vector<double>* errors) {
  const int64_t group = seen.q_heads / seen.kv_heads;
  int64_t deciding = -1;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const int64_t index = seen.QHeadIndex(seed, layer, head, step);
    if (seen.verdict[index] != VATTN_VERDICT_VERIFIED) continue;
    if (deciding < 0 ||
        seen.estimate[index] > seen.estimate[seen.QHeadIndex(seed, layer, deciding, step)]) {
      deciding = head;
    }
  }
  if (deciding < part.q_head_begin || deciding >= part.q_head_end) return;
  errors->push_back(seen.error[seen.QHeadIndex(seed, layer, deciding, step)]);
}

void SummarizeSelection(const Observations& seen, const Part& part, Figures* figures) {
  const int64_t group = seen.q_heads / seen.kv_heads;
  std::vector<double> selected, fetched, looks;
  double selected_rows = 0, fetched_rows = 0;
  for (int64_t seed = 0; seed < seen.seeds; ++seed) {
    for (int64_t layer = part.layer_begin; layer < part.layer_end; ++layer) {
      for (int64_t head = part.q_head_begin / group; head * group < part.q_head_end; ++head) {
        for (int64_t step = 0; step < seen.steps; ++step) {
          const int64_t index = seen.KvHeadIndex(seed, layer, head, step);
          looks.push_back(seen.looks[index]);
          if (seen.middle[index] == 0) continue;
          const auto middle = static_cast<double>(seen.middle[index]);
          selected.push_back(seen.selected[index] / middle);
          fetched.push_back(seen.fetched[index] / middle);
          selected_rows += seen.selected[index];
          fetched_rows += seen.fetched[index];
        }
      }
    }
  }
  figures->selected_mean = Mean(selected);
  figures->selected_p50 = Quantile(selected, .5);
  figures->selected_p90 = Quantile(selected, .9);
  figures->fetched_mean = Mean(fetched);
  figures->hot_hit_rate = selected_rows > 0 ? 1 - fetched_rows / selected_rows : kUnknown;
  figures->looks_mean = Mean(looks);
}

Json FiguresJson(const Figures& figures) {
  const auto share = [&](int64_t count) {
    return figures.heads > 0 ? static_cast<double>(count) / static_cast<double>(figures.heads)
                             : kUnknown;
  };
  return {{"heads", figures.heads},
          {"verdicts",
           {{"verified", figures.verified},
            {"exact", figures.exact},
            {"dense", figures.dense},
            {"best_effort", figures.best_effort}}},
          {"verdict_shares",
           {{"verified", share(figures.verified)},
            {"exact", share(figures.exact)},
            {"dense", share(figures.dense)},
            {"best_effort", share(figures.best_effort)}}},
          {"error",
           {{"mean", figures.error_mean},
            {"p50", figures.error_p50},
            {"p95", figures.error_p95},
            {"max", figures.error_max}}},
          {"coverage",
           {{"failures", figures.failures},
            {"trials", figures.verified},
            {"upper95", figures.upper95}}},
          {"sharpness", figures.sharpness},
          {"selected_share",
           {{"mean", figures.selected_mean},
            {"p50", figures.selected_p50},
            {"p90", figures.selected_p90}}},
          {"fetched_share", {{"mean", figures.fetched_mean}}},
          {"hot_hit_rate", figures.hot_hit_rate},
          {"looks", {{"mean", figures.looks_mean}}}};
}

std::string CountAndShare(int64_t count, int64_t heads) {
  return std::to_string(count) + " (" +
         Percent(static_cast<double>(count) / static_cast<double>(heads)) + ")";
}

std::string Coverage(const Figures& figures) {
  if (figures.verified == 0) return "-";
  return std::to_string(figures.failures) + " of " + std::to_string(figures.verified) + " (" +
         Number(figures.upper95, 2) + ")";
}

}  // namespace

Figures Summarize(const Observations& seen, const Part& part, double epsilon, double delta) {
  const int64_t group = seen.q_heads / seen.kv_heads;
  Figures figures;
  std::vector<double> errors, deciding;
  for (int64_t seed = 0; seed < seen.seeds; ++seed) {
    for (int64_t layer = part.layer_begin; layer < part.layer_end; ++layer) {
      for (int64_t step = 0; step < seen.steps; ++step) {
        for (int64_t head = part.q_head_begin; head < part.q_head_end; ++head) {
          const int64_t index = seen.QHeadIndex(seed, layer, head, step);
          errors.push_back(seen.error[index]);
          AddVerdict(seen.verdict[index], &figures);
          // Written so that an error that is no number counts as a failure.
          const bool within = seen.error[index] <= epsilon;
          figures.failures += seen.verdict[index] == VATTN_VERDICT_VERIFIED && !within;
        }
        for (int64_t head = part.q_head_begin / group; head * group < part.q_head_end; ++head) {
          AddDecidingError(seen, part, seed, layer, head, step, &deciding);
        }
      }
    }
  }
  figures.heads = static_cast<int64_t>(errors.size());
  figures.error_mean = Mean(errors);
  figures.error_p50 = Quantile(errors, .5);
  figures.error_p95 = Quantile(errors, .95);
  figures.error_max = Quantile(errors, 1);
  figures.upper95 = ClopperPearsonUpper(figures.failures, figures.verified, .95);
  figures.sharpness = Sharpness(deciding, epsilon, delta);
  SummarizeSelection(seen, part, &figures);
  return figures;
}

Run MakeRun(std::string name, const Trace& trace, const ReplayPlan& plan,
            const vattn_options& options, const Observations& seen) {
  Run run;
  run.name = std::move(name);
  run.options = options;
  run.num_kv_heads = seen.kv_heads;
  const double epsilon = options.epsilon, delta = options.delta;
  run.all = Summarize(seen, {0, seen.layers, 0, seen.q_heads}, epsilon, delta);
  for (int64_t layer = 0; layer < seen.layers; ++layer) {
    Run::Layer part;
    part.name = trace.layer_names[plan.layers[layer]];
    part.all = Summarize(seen, {layer, layer + 1, 0, seen.q_heads}, epsilon, delta);
    for (int64_t head = 0; head < seen.q_heads; ++head) {
      part.heads.push_back(Summarize(seen, {layer, layer + 1, head, head + 1}, epsilon, delta));
    }
    run.layers.push_back(std::move(part));
  }
  run.bytes_per_step = static_cast<double>(seen.bytes_fetched) /
                       static_cast<double>(std::max<int64_t>(1, seen.seeds * seen.steps));
  if (!seen.policy_us.empty()) {
    run.vattn_us = Quantile(seen.policy_us, .5);
    run.dense_us = Quantile(seen.dense_us, .5);
  }
  return run;
}

Json RunJson(const Run& run) {
  Json json = FiguresJson(run.all);
  json["name"] = run.name;
  json["settings"] = SettingsJson(run.options);
  json["fetched_bytes_per_step"] = run.bytes_per_step;
  json["time"] = {{"dense_us", run.dense_us},
                  {"vattn_us", run.vattn_us},
                  {"speedup", run.dense_us / run.vattn_us}};
  json["per_layer"] = Json::array();
  for (const Run::Layer& layer : run.layers) {
    Json entry = FiguresJson(layer.all);
    entry["layer"] = layer.name;
    entry["per_head"] = Json::array();
    for (const Figures& head : layer.heads) entry["per_head"].push_back(FiguresJson(head));
    json["per_layer"].push_back(std::move(entry));
  }
  return json;
}

std::string RunTable(const std::vector<const Run*>& runs) {
  std::vector<std::vector<std::string>> rows(1, {""});
  for (const Run* run : runs) rows[0].push_back(run->name);
  const auto add = [&](const char* label, auto&& cell) {
    std::vector<std::string> row = {label};
    for (const Run* run : runs) row.push_back(cell(*run, run->all));
    rows.push_back(std::move(row));
  };
  using F = Figures;
  add("setting", [](const Run& r, const F&) { return DescribePolicy(r.options); });
  add("selected share of the middle, mean",
      [](const Run&, const F& f) { return Percent(f.selected_mean); });
  add("selected share, p50 / p90", [](const Run&, const F& f) {
    return Percent(f.selected_p50) + " / " + Percent(f.selected_p90);
  });
  add("fetched share, mean", [](const Run&, const F& f) { return Percent(f.fetched_mean); });
  add("hot set hits", [](const Run&, const F& f) { return Percent(f.hot_hit_rate); });
  add("fetched per step", [](const Run& r, const F&) { return Bytes(r.bytes_per_step); });
  add("relative error, mean / p50", [](const Run&, const F& f) {
    return Fixed(f.error_mean, 4) + " / " + Fixed(f.error_p50, 4);
  });
  add("relative error, p95 / max",
      [](const Run&, const F& f) { return Fixed(f.error_p95, 4) + " / " + Fixed(f.error_max, 4); });
  add("heads verified", [](const Run&, const F& f) { return CountAndShare(f.verified, f.heads); });
  add("heads exact", [](const Run&, const F& f) { return CountAndShare(f.exact, f.heads); });
  add("heads dense (not verified)",
      [](const Run&, const F& f) { return CountAndShare(f.dense, f.heads); });
  add("heads best effort",
      [](const Run&, const F& f) { return CountAndShare(f.best_effort, f.heads); });
  add("error over epsilon, of verified (95 % upper)",
      [](const Run&, const F& f) { return Coverage(f); });
  add("sharpness", [](const Run&, const F& f) { return Fixed(f.sharpness, 2); });
  add("looks, mean", [](const Run&, const F& f) { return Fixed(f.looks_mean, 2); });
  add("step, us (dense)", [](const Run& r, const F&) {
    return Number(r.vattn_us, 4) + " (" + Number(r.dense_us, 4) + ")";
  });
  add("speedup over dense",
      [](const Run& r, const F&) { return Fixed(r.dense_us / r.vattn_us, 2); });
  return MarkdownTable(rows);
}

}  // namespace vattn::bench
