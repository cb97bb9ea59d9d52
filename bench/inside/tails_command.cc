#include "bench/inside/tails_command.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "bench/cli/option_arguments.h"
#include "bench/cli/progress.h"
#include "bench/cli/settings.h"
#include "bench/cli/statistics.h"
#include "bench/cli/text.h"
#include "bench/inside/tails_measure.h"
#include "bench/replay/replay.h"
#include "bench/replay/report.h"
#include "bench/trace/trace_arguments.h"

namespace vattn::bench {
namespace {

constexpr char kNotes[] =
    "Every query head has draws of its own, of the same tokens for every term: Poisson, in "
    "proportion to\n"
    "the score that the index predicts, with the expected rows of --rows. Attention over the "
    "prompt's\n"
    "tokens with the queries of a step in eight. bytes/token: of the term, beside the index. "
    "error: of\n"
    "the corrected estimate, relative as epsilon is. certified: of all answers, by the certificate "
    "of a\n"
    "first look; off: over epsilon, of those. rows needed: the share of the middle at which the "
    "variance\n"
    "of such draws is just small enough for that certificate. product form: nothing stands in, and "
    "the\n"
    "draw knows exp of the score of a token's cluster alone (SBM-Transformer).";
constexpr int64_t kEvery = 8;  // steps between those that are looked at
constexpr std::array<const char*, kTails> kNames = {"nothing",
                                                    "one mean value",
                                                    "value codes, 2 bits",
                                                    "mean of its page of 16",
                                                    "mean of its cluster, of 1,024",
                                                    "linear state, not trained",
                                                    "nothing, drawn by product form"};

struct Arguments {
  OptionArguments options;
  std::string trace, json;
  std::vector<int32_t> layers;
  int64_t steps = 0;
  int32_t draws = 8;
  double rows = .01;
};

TailPlan MakePlan(const Trace& trace, const Arguments& arguments) {
  TailPlan plan;
  plan.layers = ResolveLayers(trace, arguments.layers);
  plan.draws = arguments.draws;
  plan.rows = arguments.rows;
  const int64_t steps = arguments.steps > 0 ? std::min(arguments.steps, trace.steps) : trace.steps;
  for (int64_t step = 0; step < steps; step += kEvery) plan.steps.push_back(step);
  plan.options = arguments.options.Resolve();
  ReplayPlan shape;
  shape.layers = plan.layers;
  SetShape(trace, shape, &plan.options);
  return plan;
}

void RunTails(const Arguments& arguments, const CommandLine& command) {
  const Trace trace = ReadTrace(arguments.trace);
  const TailPlan plan = MakePlan(trace, arguments);
  Progress progress;
  progress.Begin("tail terms");
  const std::array<TailFigures, kTails> all = MeasureTails(trace, plan, &progress);
  progress.Clear();
  std::vector<std::vector<std::string>> table = {
      {"what stands for a row", "bytes/token", "error, mean", "p95", "certified",
       "off, of certified", "rows needed", "over nothing's"}};
  Json terms = Json::array();
  const double alone = Mean(all[kNone].needed);
  for (int tail = 0; tail < kTails; ++tail) {
    const TailFigures& f = all[tail];
    const auto answers = static_cast<double>(f.errors.size());
    const auto certified = static_cast<double>(f.certified);
    const double needed = Mean(f.needed), p95 = Quantile(f.errors, .95);
    table.push_back({kNames[tail], Number(f.bytes, 2), Fixed(Mean(f.errors), 4), Fixed(p95, 4),
                     Percent(certified / answers),
                     f.certified > 0 ? Percent(static_cast<double>(f.off) / certified) : "-",
                     Percent(needed), Fixed(needed / alone, 2)});
    terms.push_back({{"name", kNames[tail]},
                     {"bytes_per_token", f.bytes},
                     {"error_mean", Mean(f.errors)},
                     {"error_p95", p95},
                     {"answers", f.errors.size()},
                     {"certified", f.certified},
                     {"off", f.off},
                     {"rows_needed", needed}});
  }
  const std::string reproduce = command.Reproduce(plan.options.seed);
  std::printf(
      "%s\n%s: %zu layers, %zu steps, %d draws of %s of the middle for each query head\n"
      "%s\n\n%s\nreproduce: %s\n",
      EnvironmentLine().c_str(), trace.path.c_str(), plan.layers.size(), plan.steps.size(),
      static_cast<int>(plan.draws), Percent(plan.rows).c_str(),
      DescribePolicy(plan.options).c_str(), MarkdownTable(table).c_str(), reproduce.c_str());
  std::fflush(stdout);
  if (arguments.json.empty()) return;
  Json json = ResultHeader(command);
  json["reproduce"] = reproduce;
  json["terms"] = std::move(terms);
  WriteJson(arguments.json, json);
}

}  // namespace

void AddTailsCommand(CLI::App* app, const CommandLine& command) {
  CLI::App* sub = app->add_subcommand(
      "tails", "What could stand in for rows that are not drawn: error, certificate, bytes");
  sub->footer(kNotes);
  auto arguments = std::make_shared<Arguments>();
  auto files = std::make_shared<FileArguments>(sub);
  AddTrace(files.get(), &arguments->trace);
  arguments->options.Add(sub);
  sub->add_option("--rows", arguments->rows, "Expected rows of a draw, as a share of the middle")
      ->capture_default_str()
      ->check(CLI::Range(1e-6, 1.).description(""));
  sub->add_option("--draws", arguments->draws, "For each query head and step")
      ->capture_default_str()
      ->check(Whole(1, 1000000));
  AddLayers(sub, &arguments->layers);
  AddSteps(sub, &arguments->steps);
  files->AddJson(&arguments->json);
  sub->callback([arguments, files, &command] {
    files->Check();
    RunTails(*arguments, command);
  });
}

}  // namespace vattn::bench
