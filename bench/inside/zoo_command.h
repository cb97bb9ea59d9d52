// The command `vattn zoo`: every kind of index on one recording.
#ifndef VATTN_BENCH_INSIDE_ZOO_COMMAND_H_
#define VATTN_BENCH_INSIDE_ZOO_COMMAND_H_

#include <CLI/CLI.hpp>

#include "bench/cli/environment.h"

namespace vattn::bench {

void AddZooCommand(CLI::App* app, const CommandLine& command);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_INSIDE_ZOO_COMMAND_H_
