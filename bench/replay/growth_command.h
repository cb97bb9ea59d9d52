// `vattn growth`: rows that each policy needs for the same promise against the length of the
// context.
#ifndef VATTN_BENCH_REPLAY_GROWTH_COMMAND_H_
#define VATTN_BENCH_REPLAY_GROWTH_COMMAND_H_

#include <CLI/CLI.hpp>

#include "bench/cli/environment.h"

namespace vattn::bench {

void AddGrowthCommand(CLI::App* app, const CommandLine& command);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_REPLAY_GROWTH_COMMAND_H_
