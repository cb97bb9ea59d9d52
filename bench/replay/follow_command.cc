#include "bench/replay/follow_command.h"

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "bench/cli/failure.h"
#include "bench/cli/file_arguments.h"
#include "bench/cli/handles.h"
#include "bench/cli/option_arguments.h"
#include "bench/cli/text.h"
#include "bench/replay/follow.h"
#include "bench/replay/follow_report.h"
#include "bench/replay/replay.h"
#include "bench/trace/trace_arguments.h"

namespace vattn::bench {
namespace {

constexpr char kNotes[] =
    "Rows are those that a KV head selects in a step. Every chunk is passed with the queries of "
    "its own\n"
    "tokens, as far as they were recorded (--queries own). Judged are the last --judged steps "
    "before every\n"
    "multiple of --every and before the end of a run of steps: the sequence's own answers (kept), "
    "and those of\n"
    "--forks forks of it (fresh). \"At once\" is a second sequence that got everything up to "
    "--settling steps\n"
    "before in one call. A lower bound over delta (marked !) says that the promise does not hold "
    "there.\n"
    "  a long answer            --prompt 512\n"
    "  eight chunks with steps  --prompt 16384 --chunk 2048 --between 64\n"
    "  an index made early      --prompt 16384 --first 4096 --build-each --queries prompt";

Choices QueryChoices() {
  return {{"own", static_cast<int32_t>(AppendedQueries::kOwn)},
          {"prompt", static_cast<int32_t>(AppendedQueries::kPrompt)},
          {"none", static_cast<int32_t>(AppendedQueries::kNone)}};
}

struct Arguments {
  OptionArguments options;
  std::string trace, json;
  FollowPlan plan;
  int64_t steps = 0;
  int32_t queries = static_cast<int32_t>(AppendedQueries::kOwn);
  bool grown_only = false;
};

void RunFollow(const Arguments& arguments, const CommandLine& command) {
  const Trace trace = ReadTrace(arguments.trace);
  FollowPlan plan = arguments.plan;
  plan.layers = ResolveLayers(trace, plan.layers);
  plan.queries = static_cast<AppendedQueries>(arguments.queries);
  plan.at_once = !arguments.grown_only;
  if (plan.prompt == 0) plan.prompt = trace.prompt_tokens;
  if (plan.chunk == 0) plan.chunk = plan.prompt;
  if (plan.first == 0) plan.first = plan.chunk;
  const int64_t last = trace.prompt_tokens + trace.steps;
  plan.end = arguments.steps > 0 ? plan.prompt + arguments.steps : std::max(plan.prompt, last);
  vattn_options options = arguments.options.Resolve();
  if (options.index == VATTN_INDEX_EXTERNAL)
    throw UsageError("--index: external scores are not recorded");
  ReplayPlan shape;
  shape.layers = plan.layers;
  shape.forks = true;
  SetShape(trace, shape, &options);
  CreateRuntime(options);  // a wrong option shows before the long part

  Progress progress;
  const Followed followed = Follow(trace, plan, options, &progress);
  progress.Clear();
  const std::string reproduce = command.Reproduce(options.seed);
  std::printf("%s\n%s, %d layers, %d query heads, %d KV heads, head_dim %d, %s, %s\n%s\n",
              EnvironmentLine().c_str(), trace.path.c_str(), static_cast<int>(plan.layers.size()),
              static_cast<int>(trace.q_heads), static_cast<int>(trace.kv_heads),
              static_cast<int>(trace.head_dim_k), DescribePolicy(options).c_str(),
              DescribeCodes(options).c_str(),
              FollowTables(followed, trace, plan, options.delta).c_str());
  std::printf("counters of the last run, those that are not 0:\n");
  if (!followed.counters.empty()) {
    for (const auto& [name, value] : followed.counters.back()) {
      if (value != 0) std::printf("  %s %.0f\n", name.c_str(), value);
    }
  }
  std::printf("\nreproduce: %s\n", reproduce.c_str());
  std::fflush(stdout);
  if (arguments.json.empty()) return;
  Json json = ResultHeader(command);
  json["reproduce"] = reproduce;
  json["trace"] = {{"path", trace.path}, {"metadata", trace.metadata}};
  json["settings"] = SettingsJson(options);
  json.update(FollowJson(followed, trace, plan, Rounded(options.delta)));
  WriteJson(arguments.json, json);
}

}  // namespace

void AddFollowCommand(CLI::App* app, const CommandLine& command) {
  CLI::App* sub = app->add_subcommand(
      "follow", "Replay recorded attention as its context grows, beside an index made at once");
  sub->footer(kNotes);
  auto arguments = std::make_shared<Arguments>();
  FollowPlan& plan = arguments->plan;
  const auto tokens = [&](const char* name, const char* help, int64_t* value) {
    sub->add_option(name, *value, help)
        ->check(CLI::Range(int64_t{0}, int64_t{1} << 40).description(""));
  };
  auto files = std::make_shared<FileArguments>(sub);
  AddTrace(files.get(), &arguments->trace);
  tokens("--prompt", "Tokens that are not decoded (the recording's prompt)", &plan.prompt);
  tokens("--chunk", "Tokens of a chunk of the prompt (all of it)", &plan.chunk);
  tokens("--first", "Tokens of the first chunk (as the others)", &plan.first);
  tokens("--between", "The last tokens of every chunk but the last are decode steps (0)",
         &plan.between);
  sub->add_flag("--build-each", plan.build_each,
                "Build the index after every chunk, as storing a prefix does");
  AddChoice(sub, "--queries", QueryChoices(),
            "Passed with appended tokens: theirs, q_prompt, none (own)", &arguments->queries);
  AddSteps(sub, &arguments->steps);
  tokens("--every", "Steps are judged before every multiple of this (1024)", &plan.every);
  tokens("--judged", "Steps that are judged there (16)", &plan.judged);
  tokens("--settling", "Steps that a sequence appended at once takes before those (16)",
         &plan.settling);
  sub->add_option("--forks", plan.forks, "Trials with fresh random numbers of a judged step (8)")
      ->check(CLI::Range(0, 100000).description(""));
  sub->add_flag("--grown-only", arguments->grown_only, "No sequence that is appended at once");
  arguments->options.Add(sub);
  AddSeeds(sub, "Runs, with consecutive seeds", &plan.runs);
  AddLayers(sub, &plan.layers);
  files->AddJson(&arguments->json);
  sub->callback([arguments, files, &command] {
    files->Check();
    if (arguments->plan.every < 1 || arguments->plan.judged < 1) {
      throw UsageError("--every and --judged: 1 or more");
    }
    RunFollow(*arguments, command);
  });
}

}  // namespace vattn::bench
