#include "bench/disk/disk_command.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "bench/cli/failure.h"
#include "bench/cli/file_arguments.h"
#include "bench/cli/handles.h"
#include "bench/cli/number_lists.h"
#include "bench/cli/scratch_folder.h"
#include "bench/cli/statistics.h"
#include "bench/cli/text.h"
#include "bench/disk/disk.h"
#include "bench/replay/replay.h"

namespace vattn::bench {
namespace {

constexpr char kNotes[] =
    "A sequence of random rows (4 layers, 8 KV heads, head_dim 128, bf16) is restored and saved, "
    "by\n"
    "turns, in a pool whose pages are there already. A save ends when the file is durable; a "
    "restore\n"
    "begins with a file that the page cache was asked to forget, and checks every byte. Rates are "
    "of\n"
    "the file's bytes. bench/disk/disk_fio.sh puts fio's beside them.\n"
    "With --trace a recording is decoded beside a sequence that was saved halfway and restored, "
    "and\n"
    "the answers are compared to the bit; nothing is timed.";

struct Arguments {
  DiskPlan plan;
  std::string engine = "auto", trace, json;
};

Json FiguresJson(const std::vector<double>& gbps) {
  return {{"p50", Quantile(gbps, .5)}, {"max", *std::max_element(gbps.begin(), gbps.end())}};
}

void RunCompare(const Arguments& arguments, const CommandLine& command) {
  const Trace trace = ReadTrace(arguments.trace);
  ReplayPlan plan;
  for (int32_t layer = 0; layer < trace.layers; ++layer) plan.layers.push_back(layer);
  vattn_options options;
  vattn_options_init(&options, sizeof(options));
  SetShape(trace, plan, &options);
  options.io_engine = arguments.plan.engine;
  options.io_buffered = arguments.plan.buffered;
  const ScratchFolder folder(arguments.plan.directory, {"sequence"});
  const RestoredFigures figures = CompareRestored(trace, options, folder.path(0));
  std::printf("%s\n%s: saved after %ld of %ld steps (%s) and restored: %ld of %ld answers differ\n",
              EnvironmentLine().c_str(), trace.path.c_str(), static_cast<long>(trace.steps / 2),
              static_cast<long>(trace.steps),
              Bytes(static_cast<double>(figures.file_bytes)).c_str(),
              static_cast<long>(figures.different), static_cast<long>(figures.answers));
  if (!arguments.json.empty()) {
    Json json = ResultHeader(command);
    json["trace"] = trace.path;
    json["file_bytes"] = figures.file_bytes;
    json["answers"] = figures.answers;
    json["different"] = figures.different;
    WriteJson(arguments.json, json);
  }
  if (figures.different > 0) throw Failure("attention of the restored sequence is not the same");
}

void RunDisk(Arguments arguments, const CommandLine& command) {
  const std::vector<std::string> engines = {"auto", "uring", "pread"};
  arguments.plan.engine = static_cast<int32_t>(
      std::find(engines.begin(), engines.end(), arguments.engine) - engines.begin());
  if (!arguments.trace.empty()) return RunCompare(arguments, command);
  Progress progress;
  const DiskFigures figures = MeasureDisk(arguments.plan, &progress);
  std::vector<std::vector<std::string>> rows = {
      {"block KiB", "depth", "save GB/s, p50", "best", "restore GB/s, p50", "best"}};
  Json lines = Json::array();
  for (const DiskLine& line : figures.lines) {
    const auto best = [](const std::vector<double>& gbps) {
      return Fixed(*std::max_element(gbps.begin(), gbps.end()), 2);
    };
    rows.push_back({std::to_string(line.block_kib), std::to_string(line.depth),
                    Fixed(Quantile(line.save_gbps, .5), 2), best(line.save_gbps),
                    Fixed(Quantile(line.restore_gbps, .5), 2), best(line.restore_gbps)});
    lines.push_back({{"block_bytes", line.block_kib << 10},
                     {"depth", line.depth},
                     {"save_gbps", FiguresJson(line.save_gbps)},
                     {"restore_gbps", FiguresJson(line.restore_gbps)}});
  }
  std::printf("%s\n%s in %s, engine %s%s, %d repetitions\n\n%s\nreproduce: %s\n",
              EnvironmentLine().c_str(), Bytes(static_cast<double>(figures.file_bytes)).c_str(),
              arguments.plan.directory.c_str(), arguments.engine.c_str(),
              arguments.plan.buffered == 1 ? ", through the page cache" : "",
              arguments.plan.repetitions, MarkdownTable(rows).c_str(), command.Text().c_str());
  if (arguments.json.empty()) return;
  Json json = ResultHeader(command);
  json["file_bytes"] = figures.file_bytes;
  json["engine"] = arguments.engine;
  json["buffered"] = arguments.plan.buffered == 1;
  json["repetitions"] = arguments.plan.repetitions;
  json["rows"] = lines;
  WriteJson(arguments.json, json);
}

}  // namespace

void AddDiskCommand(CLI::App* app, const CommandLine& command) {
  CLI::App* sub = app->add_subcommand("disk", "Time saving and restoring a sequence");
  sub->footer(kNotes);
  auto arguments = std::make_shared<Arguments>();
  auto files = std::make_shared<FileArguments>(sub);
  DiskPlan& plan = arguments->plan;
  plan.directory = ".";
  sub->add_option("--directory", plan.directory, "Where the files are made, and removed again")
      ->type_name("DIR")
      ->capture_default_str();
  sub->add_option("--size", plan.mebibytes, "MiB of the file, about")
      ->check(Whole(1, 1 << 20))
      ->capture_default_str();
  AddNumbers(sub, "--block", &plan.block_kib, "KiB of a transfer, as 256,1024", 4, 1 << 18);
  AddNumbers(sub, "--depth", &plan.depths, "Transfers under way, as 1,8", 1, 256);
  sub->add_option("--engine", arguments->engine, "auto, uring or pread")
      ->check(CLI::IsMember({"auto", "uring", "pread"}).description(""))
      ->capture_default_str();
  sub->add_flag("--buffered{1}", plan.buffered, "Through the page cache");
  sub->add_option("--repetitions", plan.repetitions, "Of each")
      ->check(Whole(1, 1000))
      ->capture_default_str();
  files->AddInput("--trace", &arguments->trace, "Compare attention on this recording instead");
  files->AddJson(&arguments->json);
  sub->callback([arguments, files, &command] {
    files->Check();
    RunDisk(*arguments, command);
  });
}

}  // namespace vattn::bench
