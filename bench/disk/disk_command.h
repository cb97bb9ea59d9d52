// `vattn disk`: how fast sequences go to files and come back.
#ifndef VATTN_BENCH_DISK_DISK_COMMAND_H_
#define VATTN_BENCH_DISK_DISK_COMMAND_H_

#include <CLI/CLI.hpp>

#include "bench/cli/environment.h"

namespace vattn::bench {

void AddDiskCommand(CLI::App* app, const CommandLine& command);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_DISK_DISK_COMMAND_H_
