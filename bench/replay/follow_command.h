// `vattn follow`: what a growing context costs, and whether the promise holds on it.
#ifndef VATTN_BENCH_REPLAY_FOLLOW_COMMAND_H_
#define VATTN_BENCH_REPLAY_FOLLOW_COMMAND_H_

#include <CLI/CLI.hpp>

#include "bench/cli/environment.h"

namespace vattn::bench {

void AddFollowCommand(CLI::App* app, const CommandLine& command);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_REPLAY_FOLLOW_COMMAND_H_
