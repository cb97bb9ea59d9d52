#include "bench/replay/growth_command.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <memory>
#include <numeric>
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
    "Contexts are the recording's first 16 and its last tokens, with the same queries. topk and\n"
    "topk-uniform are set to the 95th percentile of the error that verified has at that length. "
    "The last\n"
    "line is the exponent a of rows ~ tokens^a, by least squares over the lengths.";

constexpr int64_t kSinks = 16;
constexpr std::array<int64_t, 4> kUsual = {4096, 8192, 16384, 32768};

struct Arguments {
  OptionArguments options;
  std::string trace, json;
  std::vector<int64_t> tokens;  // empty: those of kUsual that the recording has
  std::vector<int32_t> layers;
  int64_t steps = 0;
  int32_t seeds = 1;
  bool verified_only = false;
};

// Of one policy at one length, a KV head and step.
struct Need {
  double selected = 0, fetched = 0, error_p95 = 0;
};

Need NeedOf(const Trace& trace, const ReplayPlan& plan, const vattn_options& options,
            const Reference& reference, Progress* progress) {
  const Observations seen = Replay(trace, plan, options, reference, progress);
  const Figures f =
      Summarize(seen, {0, seen.layers, 0, seen.q_heads}, options.epsilon, options.delta);
  const auto mean = [](const std::vector<int32_t>& rows) {
    return std::accumulate(rows.begin(), rows.end(), 0.) / static_cast<double>(rows.size());
  };
  return {mean(seen.selected), mean(seen.fetched), f.error_p95};
}

// Slope of ln y over ln x.
double Exponent(const std::vector<int64_t>& x, const std::vector<double>& y) {
  const auto n = static_cast<double>(x.size());
  double sx = 0, sy = 0, sxx = 0, sxy = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double a = std::log(static_cast<double>(x[i])), b = std::log(y[i]);
    sx += a, sy += b, sxx += a * a, sxy += a * b;
  }
  return (n * sxy - sx * sy) / (n * sxx - sx * sx);
}

// The lengths that were asked for, or the usual ones that the recording has; of a short one halves
// of its own. The longest may be shortened by the steps that the recording took.
std::vector<int64_t> ResolveLengths(const Trace& trace, const std::vector<int64_t>& given) {
  std::vector<int64_t> lengths = given;
  for (const int64_t tokens : given) {
    if (tokens > kSinks && tokens <= trace.tokens) continue;
    throw UsageError("--tokens: " + std::to_string(tokens) + ", must be from " +
                     std::to_string(kSinks + 1) + " to the recording's " +
                     std::to_string(trace.tokens));
  }
  if (given.empty()) {
    std::copy_if(kUsual.begin(), kUsual.end(), std::back_inserter(lengths),
                 [&](int64_t tokens) { return tokens <= trace.tokens; });
    if (lengths.size() < 2)
      lengths = {trace.prompt_tokens / 4, trace.prompt_tokens / 2, trace.prompt_tokens};
  }
  for (int64_t& tokens : lengths) tokens = std::min(tokens, trace.prompt_tokens);
  std::sort(lengths.begin(), lengths.end());
  lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
  return lengths;
}

void RunGrowth(const Arguments& arguments, const CommandLine& command) {
  const Trace whole = ReadTrace(arguments.trace);
  const std::vector<int32_t> layers = ResolveLayers(whole, arguments.layers);
  const std::vector<std::string> policies =
      arguments.verified_only ? std::vector<std::string>{"verified"}
                              : std::vector<std::string>{"verified", "topk-uniform", "topk"};
  std::vector<std::string> header = {"tokens"};
  for (const std::string& policy : policies) {
    header.push_back(policy + ", selected");
    header.push_back("fetched");
    header.push_back("p95 error");
  }
  std::vector<std::vector<std::string>> rows = {header};
  std::vector<std::vector<double>> figures(2 * policies.size());  // by column, without errors
  Json list = Json::array();
  Progress progress;
  const std::vector<int64_t> lengths = ResolveLengths(whole, arguments.tokens);
  for (const int64_t tokens : lengths) {
    const Trace trace = Shorten(whole, layers, tokens, kSinks);
    ReplayPlan plan;
    plan.layers.resize(trace.layers);
    std::iota(plan.layers.begin(), plan.layers.end(), 0);
    plan.steps = arguments.steps > 0 ? std::min(arguments.steps, trace.steps) : trace.steps;
    plan.seeds = arguments.seeds;
    vattn_options options = arguments.options.Resolve();
    SetShape(trace, plan, &options);
    progress.Begin("exact attention in float64");
    const Reference reference =
        ComputeReference(trace, plan.layers, plan.steps, ResolveThreads(options.num_threads));
    std::vector<std::string> row = {std::to_string(tokens)};
    Json entry = {{"tokens", tokens}};
    double target = 0;
    for (size_t i = 0; i < policies.size(); ++i) {
      vattn_options asked = options;
      if (i == 1) asked = MatchTopKUniform(trace, plan, options, reference, target, &progress);
      if (i == 2) asked = MatchTopK(trace, plan, options, reference, target, &progress);
      progress.Begin(policies[i] + ", " + std::to_string(tokens) + " tokens");
      const Need need = NeedOf(trace, plan, asked, reference, &progress);
      if (i == 0) target = need.error_p95;
      figures[2 * i].push_back(need.selected);
      figures[2 * i + 1].push_back(need.fetched);
      row.insert(row.end(),
                 {Fixed(need.selected, 0), Fixed(need.fetched, 0), Fixed(need.error_p95, 4)});
      entry[policies[i]] = {
          {"selected", need.selected}, {"fetched", need.fetched}, {"error_p95", need.error_p95}};
    }
    rows.push_back(row);
    list.push_back(std::move(entry));
  }
  progress.Clear();
  std::vector<std::string> last = {"exponent"};
  Json exponents = Json::object();
  for (size_t i = 0; i < policies.size(); ++i) {
    const double selected = Exponent(lengths, figures[2 * i]),
                 fetched = Exponent(lengths, figures[2 * i + 1]);
    last.insert(last.end(), {Fixed(selected, 2), Fixed(fetched, 2), "-"});
    exponents[policies[i]] = {{"selected", selected}, {"fetched", fetched}};
  }
  rows.push_back(last);
  const std::string reproduce = command.Reproduce(arguments.options.Resolve().seed);
  std::printf("%s\nrows a KV head and step, %s, %d layers\n\n%s\nreproduce: %s\n",
              EnvironmentLine().c_str(), whole.path.c_str(), static_cast<int>(layers.size()),
              MarkdownTable(rows).c_str(), reproduce.c_str());
  std::fflush(stdout);
  if (arguments.json.empty()) return;
  Json json = ResultHeader(command);
  json["reproduce"] = reproduce;
  json["lengths"] = std::move(list);
  json["exponents"] = std::move(exponents);
  WriteJson(arguments.json, json);
}

}  // namespace

void AddGrowthCommand(CLI::App* app, const CommandLine& command) {
  CLI::App* sub =
      app->add_subcommand("growth", "How the rows that a policy needs grow with the context");
  sub->footer(kNotes);
  auto arguments = std::make_shared<Arguments>();
  auto files = std::make_shared<FileArguments>(sub);
  AddTrace(files.get(), &arguments->trace);
  AddNumbers(sub, "--tokens", &arguments->tokens,
             "Lengths of context (those of 4096,8192,16384,32768 that the recording has)", 1,
             int64_t{1} << 40);
  sub->add_flag("--verified-only", arguments->verified_only, "Not the policies that take a search");
  arguments->options.Add(sub);
  AddSeeds(sub, "Runs of each line, with consecutive seeds", &arguments->seeds);
  AddLayers(sub, &arguments->layers);
  AddSteps(sub, &arguments->steps);
  files->AddJson(&arguments->json);
  sub->callback([arguments, files, &command] {
    files->Check();
    RunGrowth(*arguments, command);
  });
}

}  // namespace vattn::bench
