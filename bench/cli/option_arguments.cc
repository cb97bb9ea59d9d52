#include "bench/cli/option_arguments.h"

#include <string>

#include "bench/cli/failure.h"

namespace vattn::bench {

CLI::Option* AddChoice(CLI::App* app, const std::string& name, const Choices& choices,
                       const std::string& help, int32_t* value) {
  std::string names;
  for (const auto& [choice, number] : choices) names += (names.empty() ? "" : "|") + choice;
  const auto parse = [choices, names](std::string& text) -> std::string {
    for (const auto& [choice, number] : choices) {
      if (text != choice) continue;
      text = std::to_string(number);
      return "";
    }
    return text + " is none of " + names;
  };
  return app->add_option(name, *value, help)
      ->transform(CLI::Validator(parse, ""))
      ->type_name(names);
}

void AddTrace(FileArguments* files, std::string* trace) {
  files->AddInput("--trace", trace, "The recording (vattn-trace-1)")->required();
}

void AddSeeds(CLI::App* app, const std::string& help, int32_t* seeds) {
  app->add_option("--seeds", *seeds, help)->capture_default_str()->check(Whole(1, 1000000));
}

void AddSteps(CLI::App* app, int64_t* steps) {
  app->add_option("--steps", *steps, "Only the first steps (all)")
      ->check(Whole(1, int64_t{1} << 40));
}

void AddLayers(CLI::App* app, std::vector<int32_t>* layers) {
  AddNumbers(app, "--layers", layers, "Layers by place in the file, as 0,2 (all)", 0, INT32_MAX);
}

void OptionArguments::Add(CLI::App* app) {
  AddChoice(app, "--index", IndexChoices(), "How scores of the middle are predicted (balanced)",
            &options_.index);
  app->add_option("--index-bytes", index_bytes_,
                  "Bytes of code per token and KV head: 16, 32, 48 or 64 (" +
                      std::to_string(options_.index_bytes) + ")");
  app->add_option("--value-bits", options_.value_bits,
                  "Bits per value element kept beside the rows: 0, 2 or 4")
      ->capture_default_str();
  app->add_option("--preset", preset_,
                  "strict (.1, norm output), default (.1, norm value) or fast (.2, norm value); "
                  "--epsilon, --delta and --norm override it")
      ->check(CLI::IsMember({"strict", "default", "fast"}));
  app->add_option("--epsilon", epsilon_, "Relative error that is allowed (0.1)");
  app->add_option("--delta", delta_, "Probability of more, per query head and call (0.1)");
  AddChoice(app, "--norm", NormChoices(), "What an error is relative to (value)", &norm_);
  AddChoice(app, "--bound", BoundChoices(), "How the error is bounded (sharp)", &options_.bound);
  AddChoice(app, "--on-unverified", OnUnverifiedChoices(),
            "What becomes of a head that cannot be verified (dense)", &options_.on_unverified);
  app->add_flag_callback(
      "--pilot", [this] { options_.pilot = 1; },
      "The first draw is a pilot for the second: fewer rows, more time");
  app->add_option("--hot-share", options_.hot_share,
                  "Share of the middle that the hot set may hold")
      ->capture_default_str();
  app->add_option("--refresh", options_.refresh,
                  "1 / refresh of the random numbers are renewed a step")
      ->capture_default_str();
  app->add_option("--seed", options_.seed, "First seed; every result prints it")
      ->check(Seed())
      ->capture_default_str();
  AddChoice(app, "--backend", BackendChoices(), "Where to compute (auto)", &options_.backend);
  app->add_option("--threads", options_.num_threads, "CPU threads; 0: all usable")
      ->check(Whole(0, 4096))
      ->capture_default_str();
}

void OptionArguments::AddPolicies(CLI::App* app) {
  AddChoice(app, "--policy", PolicyChoices(), "How rows of the middle are chosen (verified)",
            &options_.policy);
  app->add_option("--topk-share", options_.topk_share,
                  "topk and topk-uniform: share of the middle per query head")
      ->capture_default_str();
  app->add_option("--base-share", options_.base_share,
                  "topk-uniform: share of the middle in the base sample")
      ->capture_default_str();
  AddChoice(app, "--target", TargetChoices(), "topk-uniform: what the sample is sized for (sdpa)",
            &options_.target);
}

vattn_options OptionArguments::Resolve() const {
  vattn_options options = options_;
  if (!preset_.empty()) {
    const std::string json = "{\"preset\": \"" + preset_ + "\"}";
    if (vattn_options_from_json(json.c_str(), &options) != VATTN_OK) {
      throw UsageError(vattn_last_error());
    }
  }
  if (index_bytes_) options.index_bytes = *index_bytes_;
  if (epsilon_) options.epsilon = *epsilon_;
  if (delta_) options.delta = *delta_;
  if (norm_ >= 0) options.norm = norm_;
  return options;
}

}  // namespace vattn::bench
