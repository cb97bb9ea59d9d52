// `vattn replay`: a recorded trace through one policy, or several side by side.
#ifndef VATTN_BENCH_REPLAY_REPLAY_COMMAND_H_
#define VATTN_BENCH_REPLAY_REPLAY_COMMAND_H_

#include <CLI/CLI.hpp>

#include "bench/cli/environment.h"

namespace vattn::bench {

void AddReplayCommand(CLI::App* app, const CommandLine& command);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_REPLAY_REPLAY_COMMAND_H_
