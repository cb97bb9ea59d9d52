// `vattn gather`: how fast scattered rows of host memory reach the device.
#ifndef VATTN_BENCH_GATHER_GATHER_COMMAND_H_
#define VATTN_BENCH_GATHER_GATHER_COMMAND_H_

#include <CLI/CLI.hpp>

#include "bench/cli/environment.h"

namespace vattn::bench {

void AddGatherCommand(CLI::App* app, const CommandLine& command);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_GATHER_GATHER_COMMAND_H_
