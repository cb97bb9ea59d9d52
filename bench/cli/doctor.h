// `vattn doctor`: what this machine offers.
#ifndef VATTN_BENCH_CLI_DOCTOR_H_
#define VATTN_BENCH_CLI_DOCTOR_H_

#include <CLI/CLI.hpp>

#include "bench/cli/environment.h"

namespace vattn::bench {

void AddDoctorCommand(CLI::App* app, const CommandLine& command);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_CLI_DOCTOR_H_
