#include "bench/replay/replay_command.h"

#include <algorithm>
#include <cstdio>
#include <deque>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bench/cli/failure.h"
#include "bench/cli/handles.h"
#include "bench/cli/option_arguments.h"
#include "bench/cli/text.h"
#include "bench/replay/certify_command.h"
#include "bench/replay/match.h"
#include "bench/replay/plot.h"
#include "bench/replay/report.h"
#include "bench/trace/hostile_trace.h"
#include "bench/trace/trace_arguments.h"
#include "bench/trace/trace_views.h"

namespace vattn::bench {
namespace {

constexpr char kNotes[] =
    "Errors are relative to attention in float64 over all tokens. Times are medians of a step "
    "over\n"
    "all layers, the policy and dense attention taking turns within the first run. With --policy\n"
    "topk or topk-uniform the table also has verified at the same settings and what the policy "
    "needs\n"
    "for the same 95th percentile of the error; that takes a search, which --layers and --steps\n"
    "make shorter.\n"
    "--certify measures coverage by layer and query head for epsilon .05 .1 .2 and delta .05 .1 "
    "(or\n"
    "those given), over --seeds forks of the prompt with random numbers of their own. Trials: "
    "fresh =\n"
    "all numbers new in every step, an exact test; kept = as in production, runs are clusters "
    "(bound\n"
    "of Bentkus); request = delta for a whole run, each of its answers gets an equal part; call = "
    "one step and\n"
    "query head, the worst of the first half of the runs judged on the other half (only with "
    "--trials).";

enum Calibration : int32_t { kPrompt = 0, kProfile = 1, kIdentity = 2 };
Choices CalibrationChoices() {
  return {{"prompt", kPrompt}, {"profile", kProfile}, {"identity", kIdentity}};
}

constexpr int32_t kGrid = -1;
Choices TrialChoices() {
  return {{"grid", kGrid},
          {"fresh", static_cast<int32_t>(Trials::kFresh)},
          {"kept", static_cast<int32_t>(Trials::kKept)},
          {"request", static_cast<int32_t>(Trials::kRequest)},
          {"call", static_cast<int32_t>(Trials::kCall)}};
}

struct Arguments {
  OptionArguments options;
  std::string trace, profile, json, plot, inputs;
  int64_t prompt_tokens = 0, queries_end = 0, queries = 0, repeat_step = -1;
  int32_t trials = kGrid;
  int32_t calibration = kPrompt;
  std::vector<int32_t> layers;
  int64_t steps = 0;
  int32_t seeds = 4;
  bool compare = false, certify = false, hostile = false;
};

ReplayPlan MakePlan(const Trace& trace, const Arguments& arguments) {
  ReplayPlan plan;
  plan.layers = ResolveLayers(trace, arguments.layers);
  if (arguments.steps > trace.steps) {
    throw UsageError("--steps: " + std::to_string(arguments.steps) + ", the trace has " +
                     std::to_string(trace.steps));
  }
  plan.steps = arguments.steps > 0 ? arguments.steps : trace.steps;
  plan.seeds = arguments.seeds;
  plan.timed = true;
  plan.prompt_queries = arguments.calibration == kPrompt;
  return plan;
}

// The runs of one command line, in the order of the table.
class Study {
 public:
  Study(const Trace& trace, const ReplayPlan& plan, const vattn_options& asked)
      : trace_(trace), plan_(plan), asked_(asked) {
    progress_.Begin("exact attention in float64");
    reference_ =
        ComputeReference(trace, plan.layers, plan.steps, ResolveThreads(asked.num_threads));
  }

  void RunAll(bool compare) {
    const bool topk = asked_.policy == VATTN_POLICY_TOPK;
    const bool uniform = asked_.policy == VATTN_POLICY_TOPK_UNIFORM;
    if (asked_.policy == VATTN_POLICY_VERIFIED || compare || topk || uniform) {
      verified_ = &Add("verified", Verified());
    }
    asked_run_ = asked_.policy == VATTN_POLICY_VERIFIED
                     ? verified_
                     : &Add(ChoiceName(PolicyChoices(), asked_.policy), asked_);
    if (compare || uniform) {
      Add("topk-uniform, same p95", MatchTopKUniform(trace_, plan_, asked_, reference_,
                                                     verified_->all.error_p95, &progress_));
    }
    if (compare || topk) {
      Add("topk, same p95",
          MatchTopK(trace_, plan_, asked_, reference_, verified_->all.error_p95, &progress_));
    }
    progress_.Clear();
  }

  std::string Plot(const std::string& title, const std::string& subtitle) {
    std::optional<Run> own;
    if (verified_ == nullptr) own = MakeOne("verified", Verified());
    const std::vector<CostCurve> costs =
        MeasureCosts(trace_, plan_, asked_, reference_, &progress_);
    progress_.Clear();
    return PlotReplay(title, subtitle, own ? *own : *verified_, costs);
  }

  std::vector<const Run*> runs() const {
    std::vector<const Run*> list;
    for (const Run& run : runs_) list.push_back(&run);
    return list;
  }
  // The run with the settings that were asked for.
  const Run& asked() const { return *asked_run_; }

 private:
  Run MakeOne(const std::string& name, const vattn_options& options) {
    progress_.Begin(name);
    return MakeRun(name, trace_, plan_, options,
                   Replay(trace_, plan_, options, reference_, &progress_));
  }

  const Run& Add(const std::string& name, const vattn_options& options) {
    return runs_.emplace_back(MakeOne(name, options));
  }

  vattn_options Verified() const {
    vattn_options options = asked_;
    options.policy = VATTN_POLICY_VERIFIED;
    return options;
  }

  const Trace& trace_;
  const ReplayPlan plan_;
  const vattn_options asked_;
  Progress progress_;
  Reference reference_;
  std::deque<Run> runs_;  // does not move what it holds
  const Run* verified_ = nullptr;
  const Run* asked_run_ = nullptr;
};

std::string NameOf(const Trace& trace) {
  const auto model = trace.metadata.find("model");
  return std::filesystem::path(trace.path).filename().string() +
         (model == trace.metadata.end() ? "" : " (" + model->second + ")");
}

std::string ShapeOf(const Trace& trace, const ReplayPlan& plan) {
  constexpr size_t kMaxNamed = 8;
  std::string layers = plan.layers.size() == 1 ? "layer" : "layers";
  for (const int32_t layer : plan.layers) layers += " " + trace.layer_names[layer];
  if (plan.layers.size() > kMaxNamed) layers = std::to_string(plan.layers.size()) + " layers";
  return layers + ", " + std::to_string(trace.q_heads) + " query heads, " +
         std::to_string(trace.kv_heads) + " KV heads, head_dim " +
         std::to_string(trace.head_dim_k) + ", " + std::to_string(trace.prompt_tokens) +
         " prompt tokens, " + std::to_string(plan.steps) + " steps";
}

// A profile that is not used would be ignored without a word.
void CheckCalibration(const Arguments& arguments) {
  if (arguments.profile.empty() != (arguments.calibration == kProfile)) return;
  throw UsageError(arguments.profile.empty() ? "--calibration profile: needs --profile"
                                             : "--profile: needs --calibration profile");
}

Json TraceJson(const Trace& trace, const ReplayPlan& plan) {
  Json layers = Json::array();
  for (const int32_t layer : plan.layers) layers.push_back(trace.layer_names[layer]);
  return {{"path", trace.path},
          {"metadata", trace.metadata},
          {"layers", layers},
          {"q_heads", trace.q_heads},
          {"kv_heads", trace.kv_heads},
          {"head_dim_k", trace.head_dim_k},
          {"head_dim_v", trace.head_dim_v},
          {"prompt_tokens", trace.prompt_tokens},
          {"prompt_queries", trace.prompt_queries},
          {"steps", plan.steps},
          {"seeds", plan.seeds}};
}

constexpr int64_t kHostileSteps = 16;
constexpr int64_t kRepeated = 200;  // times

// The recording, split elsewhere or with a step repeated, as the command line says.
Trace ReadAsked(const Arguments& arguments) {
  Trace trace = ReadTrace(arguments.trace);
  const bool split =
      arguments.prompt_tokens > 0 || arguments.queries_end > 0 || arguments.queries > 0;
  if (split) {
    const int64_t prompt =
        arguments.prompt_tokens > 0 ? arguments.prompt_tokens : trace.prompt_tokens;
    trace = SplitAt(trace, prompt, arguments.repeat_step < 0 ? arguments.steps : 0,
                    arguments.queries, arguments.queries_end);
  }
  if (arguments.repeat_step < 0) return trace;
  return RepeatStep(trace, arguments.repeat_step,
                    arguments.steps > 0 ? arguments.steps : kRepeated);
}

// Those that the command line names: by a part of the name, or every kind.
std::vector<Trace> HostileOf(const Arguments& arguments, int64_t steps) {
  std::vector<Trace> all = HostileTraces(std::min(steps, test::kCalibration)), some;
  for (Trace& trace : IsotropicTraces(steps)) all.push_back(std::move(trace));
  for (Trace& trace : all) {
    if (trace.path.find(arguments.inputs) != std::string::npos) some.push_back(std::move(trace));
  }
  if (some.empty())
    throw UsageError("--inputs: no hostile input has \"" + arguments.inputs + "\" in its name");
  return some;
}

// The grid, narrowed to the kind, epsilon and delta that were given; those may lie outside it.
std::vector<Cell> CellsOf(const Arguments& arguments, const vattn_options& options) {
  std::vector<Cell> grid = CoverageGrid(), cells;
  if (arguments.trials == static_cast<int32_t>(Trials::kCall)) {
    for (Cell& cell : grid) cell.trials = Trials::kCall;
  }
  for (Cell cell : grid) {
    if (arguments.trials != kGrid && cell.trials != static_cast<Trials>(arguments.trials)) continue;
    if (arguments.options.epsilon_given()) cell.epsilon = options.epsilon;
    if (arguments.options.delta_given()) cell.delta = options.delta;
    const bool there = std::any_of(cells.begin(), cells.end(), [&](const Cell& other) {
      return other.epsilon == cell.epsilon && other.delta == cell.delta &&
             other.trials == cell.trials;
    });
    if (!there) cells.push_back(cell);
  }
  return cells;
}

void RunCertifyOf(const Arguments& arguments, const CommandLine& command) {
  CertifyJob job;
  job.options = arguments.options.Resolve();
  job.plan.steps = kHostileSteps;
  if (arguments.hostile) {
    // Rows have a quarter of a model's bytes
    if (!arguments.options.index_bytes_given()) job.options.index_bytes = 16;
    job.options.hot_share = 0;
    job.options.on_unverified = VATTN_ON_UNVERIFIED_BEST_EFFORT;
    if (arguments.steps > 0) job.plan.steps = std::min(arguments.steps, test::kCalibration);
    for (Trace& trace : HostileOf(arguments, job.plan.steps)) {
      job.names.push_back(trace.path);
      job.traces.push_back(std::move(trace));
    }
  } else {
    job.traces.push_back(ReadAsked(arguments));
    job.plan = MakePlan(job.traces[0], arguments);
    job.names.push_back(std::filesystem::path(arguments.trace).stem().string());
    if (!arguments.profile.empty()) job.options.profile = arguments.profile.c_str();
  }
  job.plan.seeds = arguments.seeds;
  job.plan.timed = false;
  job.cells = CellsOf(arguments, job.options);
  RunCertify(job, arguments.json, command);
}

void RunReplay(const Arguments& arguments, const CommandLine& command) {
  CheckCalibration(arguments);
  if (arguments.hostile && !arguments.certify) throw UsageError("--hostile: needs --certify");
  if (!arguments.inputs.empty() && !arguments.hostile)
    throw UsageError("--inputs: needs --hostile");
  if (arguments.trials != kGrid && !arguments.certify)
    throw UsageError("--trials: needs --certify");
  if (arguments.trace.empty() == !arguments.hostile) {
    throw UsageError(arguments.hostile ? "--trace: not with --hostile" : "--trace is required");
  }
  if (arguments.certify) return RunCertifyOf(arguments, command);
  const Trace trace = ReadAsked(arguments);
  const ReplayPlan plan = MakePlan(trace, arguments);
  vattn_options options = arguments.options.Resolve();
  SetShape(trace, plan, &options);
  if (!arguments.profile.empty()) options.profile = arguments.profile.c_str();
  CreateRuntime(options);  // a wrong option shows before the long part

  Study study(trace, plan, options);
  study.RunAll(arguments.compare);
  const std::string reproduce = command.Reproduce(options.seed);
  const std::string shape = ShapeOf(trace, plan);
  const std::string seeds =
      "seed " + std::to_string(options.seed) +
      (plan.seeds > 1 ? " to " + std::to_string(options.seed + plan.seeds - 1) : std::string());
  std::printf("%s\n%s: %s, %s\n\n%s\nreproduce: %s\n", EnvironmentLine().c_str(),
              NameOf(trace).c_str(), shape.c_str(), seeds.c_str(), RunTable(study.runs()).c_str(),
              reproduce.c_str());
  std::fflush(stdout);

  if (!arguments.json.empty()) {
    Json json = ResultHeader(command);
    json["reproduce"] = reproduce;
    json["trace"] = TraceJson(trace, plan);
    json["calibration"] = {
        {"from", ChoiceName(CalibrationChoices(), arguments.calibration)},
        {"profile", arguments.profile.empty() ? Json() : Json(arguments.profile)}};
    json.update(RunJson(study.asked()));
    json["compare"] = Json::array();
    for (const Run* run : study.runs()) {
      if (run != &study.asked()) json["compare"].push_back(RunJson(*run));
    }
    WriteJson(arguments.json, json);
  }
  if (!arguments.plot.empty()) {
    WriteFile(arguments.plot, study.Plot("vattn replay: " + NameOf(trace), shape));
  }
}

}  // namespace

void AddReplayCommand(CLI::App* app, const CommandLine& command) {
  CLI::App* sub = app->add_subcommand(
      "replay",
      "Replay recorded attention (vattn-trace-1) and say how exact it was and what it cost");
  sub->footer(kNotes);
  auto arguments = std::make_shared<Arguments>();
  auto files = std::make_shared<FileArguments>(sub);
  files->AddInput("--trace", &arguments->trace, "The recording");
  arguments->options.AddPolicies(sub);
  arguments->options.Add(sub);
  AddSeeds(sub, "Runs, with consecutive seeds", &arguments->seeds);
  AddLayers(sub, &arguments->layers);
  AddSteps(sub, &arguments->steps);
  AddChoice(sub, "--calibration", CalibrationChoices(),
            "What the index is calibrated on: the recorded prompt queries, a profile, nothing "
            "(prompt)",
            &arguments->calibration);
  files->AddInput("--profile", &arguments->profile, "The profile, as vattn calibrate makes it");
  sub->add_flag("--compare", arguments->compare,
                "Verified beside topk-uniform and topk with the same p95 error");
  sub->add_flag("--certify", arguments->certify, "Coverage of the promise, with upper bounds");
  sub->add_flag("--hostile", arguments->hostile,
                "With --certify, instead of a recording: inputs made to break the promise");
  sub->add_option("--inputs", arguments->inputs, "Hostile inputs with this in their name (all)")
      ->type_name("TEXT");
  AddChoice(sub, "--trials", TrialChoices(),
            "What --certify counts as a trial (grid: fresh, kept, request)", &arguments->trials);
  const auto tokens = [&](const char* name, const char* help, int64_t* value) {
    sub->add_option(name, *value, help)
        ->check(CLI::Range(int64_t{0}, int64_t{1} << 40).description(""));
  };
  tokens("--prompt-tokens",
         "Split the recording here: what follows is steps (the recording's prompt)",
         &arguments->prompt_tokens);
  tokens("--queries", "Calibrate on the queries of so many tokens (all recorded)",
         &arguments->queries);
  tokens("--queries-end", "... before this token (the prompt's end)", &arguments->queries_end);
  tokens("--repeat-step", "A loop: this step's token and query --steps (200) times",
         &arguments->repeat_step);
  files->AddJson(&arguments->json);
  files->AddOutput(
      "--plot", &arguments->plot,
      "Draw error and share by layer and head, and error against share for the policies",
      "FILE.svg");
  sub->callback([arguments, files, &command] {
    files->Check();
    RunReplay(*arguments, command);
  });
}

}  // namespace vattn::bench
