// `vattn step`: how long a decode step takes, by length of the sequence.
#ifndef VATTN_BENCH_STEP_STEP_COMMAND_H_
#define VATTN_BENCH_STEP_STEP_COMMAND_H_

#include <CLI/CLI.hpp>

#include "bench/cli/environment.h"

namespace vattn::bench {

void AddStepCommand(CLI::App* app, const CommandLine& command);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_STEP_STEP_COMMAND_H_
