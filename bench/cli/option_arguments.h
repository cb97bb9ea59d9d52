// The library's options as command line arguments, shared by the subcommands.
#ifndef VATTN_BENCH_CLI_OPTION_ARGUMENTS_H_
#define VATTN_BENCH_CLI_OPTION_ARGUMENTS_H_

#include <CLI/CLI.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "api/vattn.h"
#include "bench/cli/file_arguments.h"
#include "bench/cli/number_lists.h"
#include "bench/cli/settings.h"

namespace vattn::bench {

// An option that takes one of the names.
CLI::Option* AddChoice(CLI::App* app, const std::string& name, const Choices& choices,
                       const std::string& help, int32_t* value);

// --trace, which must be given.
void AddTrace(FileArguments* files, std::string* trace);

// --seeds: how many, from --seed on.
void AddSeeds(CLI::App* app, const std::string& help, int32_t* seeds);

// --steps; 0, if it was not given: all.
void AddSteps(CLI::App* app, int64_t* steps);

// --layers. The list stays empty if the argument is not given, which means all layers:
// ResolveLayers in bench/trace/trace_arguments.h turns it into their numbers.
void AddLayers(CLI::App* app, std::vector<int32_t>* layers);

class OptionArguments {
 public:
  OptionArguments() {
    vattn_options_init(&options_, sizeof(options_));
    options_.seed = 1;
  }

  // Index, promise, seed and machine.
  void Add(CLI::App* app);
  // Policy and what the policies other than verified are set by.
  void AddPolicies(CLI::App* app);

  // After parsing: the preset, then what was given by itself. Ranges are the library's to check.
  vattn_options Resolve() const;
  bool epsilon_given() const { return epsilon_.has_value(); }
  bool delta_given() const { return delta_.has_value(); }
  bool index_bytes_given() const { return index_bytes_.has_value(); }

 private:
  vattn_options options_;
  std::string preset_;
  std::optional<float> epsilon_, delta_;
  std::optional<int32_t> index_bytes_;
  int32_t norm_ = -1;  // not given
};

}  // namespace vattn::bench

#endif  // VATTN_BENCH_CLI_OPTION_ARGUMENTS_H_
