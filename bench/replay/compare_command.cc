#include "bench/replay/compare_command.h"

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "bench/cli/failure.h"
#include "bench/cli/handles.h"
#include "bench/cli/option_arguments.h"
#include "bench/cli/text.h"
#include "bench/replay/match.h"
#include "bench/replay/report.h"
#include "bench/trace/trace_arguments.h"
#include "bench/trace/trace_views.h"

namespace vattn::bench {
namespace {

constexpr char kNotes[] =
    "Every line has the 95th percentile of the error that verified has in the last one (epsilon, "
    "top-k\n"
    "and base sample are searched for it with the first seed). topk-uniform knows the exact "
    "scores.\n"
    "selection: verified over topk-uniform, each query head with rows of its own; sharing: one "
    "draw\n"
    "for the query heads of a KV head; hot set: rows kept on the device from step to step.";

struct Arguments {
  OptionArguments options;
  std::string trace, json;
  std::vector<int32_t> layers;
  int64_t steps = 0;
  int32_t seeds = 2;
};

struct Line {
  std::string name;
  Run run;
  double bytes;  // a step, all chosen layers
};

class Comparison {
 public:
  Comparison(const Trace& trace, const Arguments& arguments)
      : trace_(trace), options_(arguments.options.Resolve()) {
    plan_.layers = ResolveLayers(trace, arguments.layers);
    plan_.steps = arguments.steps > 0 ? arguments.steps : trace.steps;
    plan_.seeds = arguments.seeds;
    if (plan_.steps > trace.steps) {
      throw UsageError("--steps: " + std::to_string(plan_.steps) + ", the trace has " +
                       std::to_string(trace.steps));
    }
    CreateRuntime(Shaped(trace, options_));  // a wrong option shows before the long part
    progress_.Begin("exact attention in float64");
    reference_ =
        ComputeReference(trace, plan_.layers, plan_.steps, ResolveThreads(options_.num_threads));
    split_ = SplitHeads(trace, plan_.layers);
    split_plan_ = plan_;
    for (size_t i = 0; i < plan_.layers.size(); ++i)
      split_plan_.layers[i] = static_cast<int32_t>(i);
  }

  std::vector<Line> Measure() {
    vattn_options verified = Shaped(trace_, options_);
    verified.policy = VATTN_POLICY_VERIFIED;
    const Line shared = RunOf("verified, shared draw, hot set", trace_, plan_, verified);
    const double target = shared.run.all.error_p95;
    vattn_options exact = options_;
    exact.index = VATTN_INDEX_EXACT;
    const auto uniform = [&](const Trace& trace, const ReplayPlan& plan) {
      return MatchTopKUniform(trace, plan, Shaped(trace, exact), reference_, target, &progress_);
    };
    const vattn_options own = uniform(split_, split_plan_), united = uniform(trace_, plan_);
    const vattn_options alone = MatchVerified(split_, split_plan_, Shaped(split_, options_),
                                              reference_, target, &progress_);
    std::vector<Line> lines;
    lines.push_back(Selected(
        RunOf("topk-uniform, exact scores, rows by query head", split_, split_plan_, own)));
    lines.push_back(Selected(RunOf("the same, union over the group", trace_, plan_, united)));
    lines.push_back(RunOf("the same, union and hot set", trace_, plan_, united));
    lines.push_back(Selected(RunOf("verified, rows by query head", split_, split_plan_, alone)));
    lines.push_back(Selected(shared));
    lines.back().name = "verified, shared draw";
    lines.push_back(shared);
    progress_.Clear();
    return lines;
  }

  const ReplayPlan& plan() const { return plan_; }
  const vattn_options& options() const { return options_; }

 private:
  vattn_options Shaped(const Trace& trace, vattn_options options) const {
    ReplayPlan plan = plan_;
    SetShape(trace, plan, &options);
    return options;
  }

  Line RunOf(const std::string& name, const Trace& trace, const ReplayPlan& plan,
             const vattn_options& options) {
    progress_.Begin(name);
    Run run =
        MakeRun(name, trace, plan, options, Replay(trace, plan, options, reference_, &progress_));
    return {name, run, run.bytes_per_step};
  }

  // Every selected row over PCIe, as without a hot set.
  static Line Selected(Line line) {
    const double fetched = 1 - line.run.all.hot_hit_rate;
    line.bytes = fetched > 0 ? line.bytes / fetched : kUnknown;
    return line;
  }

  const Trace& trace_;
  const vattn_options options_;
  Trace split_;
  ReplayPlan plan_, split_plan_;
  Reference reference_;
  Progress progress_;
};

Json LineJson(const Line& line) {
  Json json = RunJson(line.run);
  json.erase("per_layer");
  json["name"] = line.name;
  json["pcie_bytes_per_step"] = line.bytes;
  return json;
}

void RunCompare(const Arguments& arguments, const CommandLine& command) {
  const Trace trace = ReadTrace(arguments.trace);
  Comparison comparison(trace, arguments);
  const std::vector<Line> lines = comparison.Measure();
  const double first = lines.front().bytes;
  std::vector<std::vector<std::string>> rows = {
      {"", "setting", "p95 error", "rows selected", "bytes a step", "fewer by"}};
  for (const Line& line : lines) {
    rows.push_back({line.name, DescribePolicy(line.run.options), Fixed(line.run.all.error_p95, 4),
                    Percent(line.run.all.selected_mean), Bytes(line.bytes),
                    Fixed(first / line.bytes, 1)});
  }
  const std::string factors = "selection " + Fixed(lines[0].bytes / lines[3].bytes, 2) +
                              " x sharing " + Fixed(lines[3].bytes / lines[4].bytes, 2) +
                              " x hot set " + Fixed(lines[4].bytes / lines[5].bytes, 2) + " = " +
                              Fixed(lines[0].bytes / lines[5].bytes, 1) +
                              " times fewer; with sharing and hot set on both sides " +
                              Fixed(lines[2].bytes / lines[5].bytes, 1);
  const std::string reproduce = command.Reproduce(comparison.options().seed);
  std::printf("%s\n%s: %d layers, %lld steps, %d seeds\n\n%s\n%s\nreproduce: %s\n",
              EnvironmentLine().c_str(), trace.path.c_str(),
              static_cast<int>(comparison.plan().layers.size()),
              static_cast<long long>(comparison.plan().steps),
              static_cast<int>(comparison.plan().seeds), MarkdownTable(rows).c_str(),
              factors.c_str(), reproduce.c_str());
  std::fflush(stdout);
  if (arguments.json.empty()) return;
  Json json = ResultHeader(command);
  json["reproduce"] = reproduce;
  json["lines"] = Json::array();
  for (const Line& line : lines) json["lines"].push_back(LineJson(line));
  WriteJson(arguments.json, json);
}

}  // namespace

void AddCompareCommand(CLI::App* app, const CommandLine& command) {
  CLI::App* sub = app->add_subcommand(
      "compare",
      "Bytes over PCIe for the same error: verified against top-k with a uniform sample");
  sub->footer(kNotes);
  auto arguments = std::make_shared<Arguments>();
  auto files = std::make_shared<FileArguments>(sub);
  AddTrace(files.get(), &arguments->trace);
  arguments->options.Add(sub);
  AddSeeds(sub, "Runs of each line, with consecutive seeds", &arguments->seeds);
  AddLayers(sub, &arguments->layers);
  AddSteps(sub, &arguments->steps);
  files->AddJson(&arguments->json);
  sub->callback([arguments, files, &command] {
    files->Check();
    RunCompare(*arguments, command);
  });
}

}  // namespace vattn::bench
