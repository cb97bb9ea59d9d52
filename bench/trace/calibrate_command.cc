#include "bench/trace/calibrate_command.h"

#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "bench/cli/failure.h"
#include "bench/cli/option_arguments.h"
#include "bench/cli/text.h"
#include "bench/trace/calibrate.h"
#include "bench/trace/trace_arguments.h"

namespace vattn::bench {
namespace {

constexpr char kNotes[] =
    "A profile serves every text of the model that it was recorded from, in runtimes with as many\n"
    "layers: record all of them, or choose those of the runtime with --layers. Use it with\n"
    "vattn_options.profile, or compare it with vattn replay --calibration profile --profile FILE.";

enum Source : int32_t { kPrompt = 0, kSteps = 1, kEither = 2 };

struct Arguments {
  std::string trace, out, json;
  std::vector<int32_t> layers;
  int32_t source = kEither;
};

void RunCalibrate(const Arguments& arguments, const CommandLine& command) {
  const Trace trace = ReadTrace(arguments.trace);
  const std::vector<int32_t> layers = ResolveLayers(trace, arguments.layers);
  if (arguments.source == kPrompt && trace.prompt_queries == 0) {
    throw UsageError("--queries: prompt, the trace has no q_prompt");
  }
  const bool prompt = arguments.source != kSteps && trace.prompt_queries > 0;
  const Tensor& queries = prompt ? trace.q_prompt : trace.q;
  const float scale = 1 / std::sqrt(static_cast<float>(trace.head_dim_k));
  const std::vector<float> moments = QueryMoments(queries, trace.kv_heads, layers, scale);
  const std::string file = ProfileFile(trace, layers, scale, moments);
  WriteFile(arguments.out, file);
  const char* source = prompt ? "prompt" : "steps";
  const int64_t tokens = queries.shape[2], group = trace.q_heads / trace.kv_heads;
  std::printf(
      "%s\n\n%s", EnvironmentLine().c_str(),
      MarkdownTable({{"profile", "layers", "KV heads", "head_dim", "queries", "of", "bytes"},
                     {arguments.out, std::to_string(layers.size()), std::to_string(trace.kv_heads),
                      std::to_string(trace.head_dim_k), std::to_string(tokens * group), source,
                      Bytes(static_cast<double>(file.size()))}})
          .c_str());
  std::fflush(stdout);
  if (arguments.json.empty()) return;
  Json json = ResultHeader(command);
  json["profile"] = {{"path", arguments.out},
                     {"trace", trace.path},
                     {"layers", Json::array()},
                     {"kv_heads", trace.kv_heads},
                     {"head_dim_k", trace.head_dim_k},
                     {"queries", tokens * group},
                     {"of", source},
                     {"bytes", file.size()}};
  for (const int32_t layer : layers) {
    json["profile"]["layers"].push_back(trace.layer_names[layer]);
  }
  WriteJson(arguments.json, json);
}

}  // namespace

void AddCalibrateCommand(CLI::App* app, const CommandLine& command) {
  CLI::App* sub = app->add_subcommand(
      "calibrate", "Make a model profile from recorded queries, for prompts that come without any");
  sub->footer(kNotes);
  auto arguments = std::make_shared<Arguments>();
  auto files = std::make_shared<FileArguments>(sub);
  AddTrace(files.get(), &arguments->trace);
  files->AddOutput("--out", &arguments->out, "The profile (vattn-profile-1)")->required();
  AddChoice(sub, "--queries", {{"prompt", kPrompt}, {"steps", kSteps}},
            "Which queries: of the prompt, or of the decode steps (prompt, if recorded)",
            &arguments->source);
  AddLayers(sub, &arguments->layers);
  files->AddJson(&arguments->json);
  sub->callback([arguments, files, &command] {
    files->Check();
    RunCalibrate(*arguments, command);
  });
}

}  // namespace vattn::bench
