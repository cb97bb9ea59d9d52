// The command `vattn growth-cost`: what it costs a device to grow with a sequence.
#ifndef VATTN_BENCH_INSIDE_GROWTH_COST_COMMAND_H_
#define VATTN_BENCH_INSIDE_GROWTH_COST_COMMAND_H_

#include <CLI/CLI.hpp>

#include "bench/cli/environment.h"

namespace vattn::bench {

void AddGrowthCostCommand(CLI::App* app, const CommandLine& command);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_INSIDE_GROWTH_COST_COMMAND_H_
