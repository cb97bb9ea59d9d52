// The command `vattn tails`: what could stand in for rows that are not drawn, on one recording.
#ifndef VATTN_BENCH_INSIDE_TAILS_COMMAND_H_
#define VATTN_BENCH_INSIDE_TAILS_COMMAND_H_

#include <CLI/CLI.hpp>

#include "bench/cli/environment.h"

namespace vattn::bench {

void AddTailsCommand(CLI::App* app, const CommandLine& command);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_INSIDE_TAILS_COMMAND_H_
