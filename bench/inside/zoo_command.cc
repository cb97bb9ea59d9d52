#include "bench/inside/zoo_command.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "bench/cli/failure.h"
#include "bench/cli/handles.h"
#include "bench/cli/option_arguments.h"
#include "bench/cli/progress.h"
#include "bench/cli/settings.h"
#include "bench/cli/statistics.h"
#include "bench/cli/text.h"
#include "bench/inside/zoo_scan.h"
#include "bench/replay/replay.h"
#include "bench/replay/report.h"
#include "bench/trace/trace_arguments.h"

namespace vattn::bench {
namespace {

constexpr char kNotes[] =
    "tables: of a KV head, beside the codes. exact has no codes and reads the keys.\n"
    "recall: of the 1 % of the middle with the largest scores, how many are among the 1 % with the "
    "largest\n"
    "predictions; mass: attention of the latter over that of the former; noise: standard deviation "
    "of\n"
    "prediction - score over the middle; ns/token: a scan on one thread, for all query heads of a "
    "KV head,\n"
    "codes in cache as far as they fit. Selected, fetched and dense: what policy verified needs "
    "with this\n"
    "index for the same promise. reused: exact scores of up to 8 steps ago, given as external "
    "ones.\n"
    "heads over delta: (layer, query head) pairs that are wrong more often than promised, at 99 % "
    "confidence.\n"
    "An index that ranks heavy tokens among the light ones breaks the promise: what is not drawn "
    "is not seen.";
constexpr int64_t kEvery = 8;  // steps between those whose scans are compared

struct Arguments {
  OptionArguments options;
  std::string trace, sign_maps, json;
  std::vector<int32_t> layers;
  std::vector<std::string> only;
  int64_t steps = 0;
  int32_t seeds = 1;
};

struct Entry {
  std::string name;
  int32_t index;
  int32_t bytes = 32;
  bool learned = false;
};

std::vector<Entry> Entries(const Arguments& arguments) {
  std::vector<Entry> all = {{"exact", VATTN_INDEX_EXACT},
                            {"balanced-32", VATTN_INDEX_BALANCED, 32},
                            {"balanced-16", VATTN_INDEX_BALANCED, 16},
                            {"hadamard2", VATTN_INDEX_HADAMARD2},
                            {"sign-32", VATTN_INDEX_SIGN, 32},
                            {"sign-4", VATTN_INDEX_SIGN, 4},
                            {"page", VATTN_INDEX_PAGE},
                            {"pooled", VATTN_INDEX_POOLED},
                            {"clusters", VATTN_INDEX_CLUSTERS, 32},
                            {"reused", VATTN_INDEX_EXTERNAL}};
  if (!arguments.sign_maps.empty()) all.push_back({"sign-learned", VATTN_INDEX_SIGN, 0, true});
  if (arguments.only.empty()) return all;
  std::vector<Entry> chosen;
  for (const std::string& name : arguments.only) {
    const auto at =
        std::find_if(all.begin(), all.end(), [&](const Entry& e) { return e.name == name; });
    if (at == all.end()) {
      std::string names;
      for (const Entry& entry : all) names += (names.empty() ? "" : ", ") + entry.name;
      throw UsageError("--only: " + name + " is none of " + names +
                       (arguments.sign_maps.empty() ? "; sign-learned needs --sign-maps" : ""));
    }
    chosen.push_back(*at);
  }
  return chosen;
}

// With the bytes that a file of learned maps is for: the one whose bits it has.
vattn_options OptionsFor(const Entry& entry, const Arguments& arguments, vattn_options options) {
  options.index = entry.index;
  options.index_bytes = entry.bytes;
  if (!entry.learned) return options;
  options.sign_maps = arguments.sign_maps.c_str();
  std::string why;
  for (const int32_t bytes : {4, 8, 16, 32}) {
    options.index_bytes = bytes;
    vattn_runtime* runtime = nullptr;
    if (vattn_runtime_create(&options, &runtime) == VATTN_OK) {
      vattn_runtime_destroy(runtime);
      return options;
    }
    why = vattn_last_error();
  }
  throw UsageError("--sign-maps: " + why);
}

// (layer, query head) pairs that fail more often than delta allows, with 99 % confidence each.
int64_t HeadsOverDelta(const Run& run) {
  int64_t over = 0;
  for (const Run::Layer& layer : run.layers) {
    for (const Figures& head : layer.heads) {
      over += 1 - ClopperPearsonUpper(head.verified - head.failures, head.verified, .99) >
              run.options.delta;
    }
  }
  return over;
}

void RunZoo(const Arguments& arguments, const CommandLine& command) {
  const Trace trace = ReadTrace(arguments.trace);
  ReplayPlan plan;
  plan.layers = ResolveLayers(trace, arguments.layers);
  plan.steps = arguments.steps > 0 ? std::min(arguments.steps, trace.steps) : trace.steps;
  plan.seeds = arguments.seeds;
  vattn_options asked = arguments.options.Resolve();
  SetShape(trace, plan, &asked);
  const std::vector<Entry> entries = Entries(arguments);  // a wrong name shows before the long part
  Progress progress;
  progress.Begin("exact attention in float64");
  const Reference reference =
      ComputeReference(trace, plan.layers, plan.steps, ResolveThreads(asked.num_threads));
  std::vector<std::vector<std::string>> table = {
      {"index", "bytes/token", "tables", "recall", "mass", "noise", "ns/token", "selected",
       "fetched", "fetched/step", "dense", "over epsilon (95 % upper)", "heads over delta"}};
  Json json = ResultHeader(command);
  json["trace"] = trace.path;
  json["indices"] = Json::array();
  double spread = 0;
  for (const Entry& entry : entries) {
    const vattn_options options = OptionsFor(entry, arguments, asked);
    progress.Begin(entry.name);
    const ScanFigures scan = MeasureScan(trace, plan.layers, options, plan.steps, kEvery);
    const Run run = MakeRun(entry.name, trace, plan, options,
                            Replay(trace, plan, options, reference, &progress));
    const Figures& all = run.all;
    spread = scan.spread;
    table.push_back({entry.name, Number(scan.bytes, 3), Bytes(scan.table_bytes),
                     Fixed(scan.recall, 3), Fixed(scan.mass, 3), Fixed(scan.noise, 3),
                     Fixed(scan.ns, 2), Percent(all.selected_mean), Percent(all.fetched_mean),
                     Bytes(run.bytes_per_step),
                     Percent(static_cast<double>(all.dense) /
                             static_cast<double>(std::max<int64_t>(1, all.heads))),
                     std::to_string(all.failures) + " of " + std::to_string(all.verified) + " (" +
                         Number(all.upper95, 2) + ")",
                     std::to_string(HeadsOverDelta(run))});
    json["indices"].push_back({{"scan",
                                {{"bytes_per_token", scan.bytes},
                                 {"table_bytes", scan.table_bytes},
                                 {"recall", scan.recall},
                                 {"mass", scan.mass},
                                 {"noise", scan.noise},
                                 {"score_spread", scan.spread},
                                 {"ns_per_token", scan.ns}}},
                               {"heads_over_delta", HeadsOverDelta(run)},
                               {"run", RunJson(run)}});
  }
  progress.Clear();
  std::printf(
      "%s\n%s: %zu layers, %lld steps; scores have a standard deviation of "
      "%s\n%s\n\n%s\nreproduce: %s\n",
      EnvironmentLine().c_str(), trace.path.c_str(), plan.layers.size(),
      static_cast<long long>(plan.steps), Fixed(spread, 2).c_str(), DescribePolicy(asked).c_str(),
      MarkdownTable(table).c_str(), command.Reproduce(asked.seed).c_str());
  std::fflush(stdout);
  if (!arguments.json.empty()) WriteJson(arguments.json, json);
}

}  // namespace

void AddZooCommand(CLI::App* app, const CommandLine& command) {
  CLI::App* sub = app->add_subcommand(
      "zoo", "Every kind of index on a recording: how well it predicts, what it costs");
  sub->footer(kNotes);
  auto arguments = std::make_shared<Arguments>();
  auto files = std::make_shared<FileArguments>(sub);
  AddTrace(files.get(), &arguments->trace);
  arguments->options.Add(sub);
  for (const char* const own : {"--index", "--index-bytes"})
    sub->remove_option(sub->get_option(own));
  sub->add_option_function<std::vector<std::string>>(
         "--only",
         [arguments](const std::vector<std::string>& words) {
           arguments->only = SplitList("--only", words);
         },
         "Indices by their names in the table, as balanced-32,page (all)")
      ->type_name("LIST");
  files->AddInput("--sign-maps", &arguments->sign_maps,
                  "Adds sign-learned, with these maps (vattn-sign-1)");
  AddSeeds(sub, "Runs, with consecutive seeds", &arguments->seeds);
  AddLayers(sub, &arguments->layers);
  AddSteps(sub, &arguments->steps);
  files->AddJson(&arguments->json);
  sub->callback([arguments, files, &command] {
    files->Check();
    RunZoo(*arguments, command);
  });
}

}  // namespace vattn::bench
