// `vattn calibrate`: a model profile from the queries of a recorded trace.
#ifndef VATTN_BENCH_TRACE_CALIBRATE_COMMAND_H_
#define VATTN_BENCH_TRACE_CALIBRATE_COMMAND_H_

#include <CLI/CLI.hpp>

#include "bench/cli/environment.h"

namespace vattn::bench {

void AddCalibrateCommand(CLI::App* app, const CommandLine& command);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_TRACE_CALIBRATE_COMMAND_H_
