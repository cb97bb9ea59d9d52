// The `vattn` command line. Exit codes: 0 done, 1 failed, 2 the command line is wrong.

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>

#include "api/vattn.h"
#include "bench/cli/doctor.h"
#include "bench/cli/environment.h"
#include "bench/cli/failure.h"
#include "bench/cli/standard_output.h"
#include "bench/disk/disk_command.h"
#include "bench/gather/gather_command.h"
#include "bench/inside/growth_cost_command.h"
#include "bench/inside/tails_command.h"
#include "bench/inside/zoo_command.h"
#include "bench/replay/compare_command.h"
#include "bench/replay/follow_command.h"
#include "bench/replay/growth_command.h"
#include "bench/replay/replay_command.h"
#include "bench/step/step_command.h"
#include "bench/trace/calibrate_command.h"

namespace {

int Run(int argc, char** argv) {
  using vattn::bench::CommandLine;
  const CommandLine command(argc, argv);
  CLI::App app("Decode attention with most of the KV cache outside the accelerator", "vattn");
  app.set_version_flag("--version",
                       std::string("vattn ") + vattn_version() + "\n" + vattn_build_info());
  app.require_subcommand(1);
  try {
    vattn::bench::RequireStandardOutput();
    vattn::bench::AddDoctorCommand(&app, command);
    vattn::bench::AddDiskCommand(&app, command);
    vattn::bench::AddGatherCommand(&app, command);
    vattn::bench::AddReplayCommand(&app, command);
    vattn::bench::AddStepCommand(&app, command);
    vattn::bench::AddCalibrateCommand(&app, command);
    vattn::bench::AddZooCommand(&app, command);
    vattn::bench::AddTailsCommand(&app, command);
    vattn::bench::AddCompareCommand(&app, command);
    vattn::bench::AddFollowCommand(&app, command);
    vattn::bench::AddGrowthCommand(&app, command);
    vattn::bench::AddGrowthCostCommand(&app, command);
    app.parse(argc, argv);
    return 0;
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;  // help and version end up here as well
  } catch (const vattn::bench::UsageError& error) {
    std::fprintf(stderr, "vattn: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "vattn: %s\n", error.what());
    return 1;
  }
}

}  // namespace

int main(int argc, char** argv) { return vattn::bench::FinishStandardOutput(Run(argc, argv)); }
