// `vattn compare`: rows over PCIe at equal error, against top-k with a uniform sample, factor by
// factor.
#ifndef VATTN_BENCH_REPLAY_COMPARE_COMMAND_H_
#define VATTN_BENCH_REPLAY_COMPARE_COMMAND_H_

#include <CLI/CLI.hpp>

#include "bench/cli/environment.h"

namespace vattn::bench {

void AddCompareCommand(CLI::App* app, const CommandLine& command);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_REPLAY_COMPARE_COMMAND_H_
