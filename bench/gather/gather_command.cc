#include "bench/gather/gather_command.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "bench/cli/failure.h"
#include "bench/cli/file_arguments.h"
#include "bench/cli/number_lists.h"
#include "bench/cli/text.h"
#include "bench/gather/gather.h"

namespace vattn::bench {
namespace {

constexpr char kNotes[] =
    "The region holds layers x KV heads x tokens rows in registered host memory, huge pages where\n"
    "granted. Every repetition takes other rows: the same share of each KV head of one layer, "
    "drawn\n"
    "uniformly, so that neighbours are rare. What arrived is compared with the region each time.\n"
    "Times are of the device, launch included, nothing else running. Movers:\n"
    "  memcpy        one copy of as many bytes without gaps, by the copy engine\n"
    "  bulk          the library's gather: bulk copies by few thread blocks\n"
    "  warp per row  blocks of 1024 threads, 16 bytes a lane, one row after the other; one block "
    "is\n"
    "                how HiSparse serves a request\n"
    "  team          blocks of 256 threads, as many for each KV head, that load rows themselves, "
    "as\n"
    "                attention that reads missed rows in place does";

struct Arguments {
  GatherShape shape;
  int32_t threads = 0;
  std::string json;
};

void CheckSize(const GatherShape& shape) {
  constexpr double kMostUnits = 1u << 31;  // of 16 bytes, in a repetition
  for (const double share : shape.shares) {
    const double bytes = static_cast<double>(shape.layer_bytes()) * share;
    if (bytes / 16 < kMostUnits) continue;
    throw UsageError("--shares: " + Number(share, 3) + " of a layer is " + Bytes(bytes) +
                     ", more than a repetition may move: " + Bytes(16 * kMostUnits));
  }
  const uint64_t need = shape.region_bytes(), available = AvailableMemoryBytes();
  if (available == 0 || need <= available) return;
  throw UsageError("--layers " + std::to_string(shape.layers) + ": the region takes " +
                   Bytes(static_cast<double>(need)) + ", available are " +
                   Bytes(static_cast<double>(available)) +
                   "; lower --layers, --kv-heads, --tokens or --row-bytes");
}

std::string DescribeRegion(const GatherShape& shape) {
  return Bytes(static_cast<double>(shape.region_bytes())) +
         " in host memory: " + std::to_string(shape.layers) +
         (shape.layers == 1 ? " layer x " : " layers x ") + std::to_string(shape.kv_heads) +
         " KV heads x " + std::to_string(shape.tokens) + " tokens x " +
         std::to_string(shape.row_bytes) + " bytes; " + std::to_string(shape.repetitions) +
         " sets of rows, seed " + std::to_string(shape.seed);
}

// The line of the memcpy with as many bytes: each share's first.
double CopyGbps(const GatherFigures& figures, const GatherLine& line) {
  for (const GatherLine& other : figures.lines) {
    if (other.mover == "memcpy" && other.share == line.share) return other.gbps_p50;
  }
  return 0;
}

std::string Table(const GatherFigures& figures) {
  std::vector<std::vector<std::string>> rows = {
      {"mover", "order", "blocks", "share", "rows", "us, p50", "GB/s, p50", "GB/s, best",
       "of memcpy", "of " + Bytes(static_cast<double>(figures.large_copy_bytes)) + " memcpy"}};
  for (const GatherLine& line : figures.lines) {
    rows.push_back({line.mover, line.order, line.blocks > 0 ? std::to_string(line.blocks) : "-",
                    Percent(line.share), std::to_string(line.rows), Fixed(line.us_p50, 1),
                    Fixed(line.gbps_p50, 1), Fixed(line.gbps_max, 1),
                    Fixed(line.gbps_p50 / CopyGbps(figures, line), 2),
                    Fixed(line.gbps_p50 / figures.large_copy_gbps, 2)});
  }
  return MarkdownTable(rows);
}

Json FiguresJson(const GatherFigures& figures, const GatherLine& line) {
  return {{"mover", line.mover},
          {"order", line.order},
          {"blocks", line.blocks},
          {"share", line.share},
          {"rows", line.rows},
          {"us", {{"p50", line.us_p50}, {"min", line.us_min}}},
          {"gbps", {{"p50", line.gbps_p50}, {"max", line.gbps_max}}},
          {"of_memcpy", line.gbps_p50 / CopyGbps(figures, line)},
          {"of_large_memcpy", line.gbps_p50 / figures.large_copy_gbps}};
}

void RunGather(const Arguments& arguments, const CommandLine& command) {
  RequireGatherDevice();
  GatherShape shape = arguments.shape;
  shape.threads = ResolveThreads(arguments.threads);
  CheckSize(shape);
  Progress progress;
  const GatherFigures figures = MeasureGather(shape, &progress);
  progress.Clear();

  const std::string reproduce = command.Reproduce(shape.seed);
  std::printf(
      "%s\n%s\n%s\nfilled and registered in %s s; memcpy of %s: %s GB/s\n\n%s\nreproduce: %s\n",
      EnvironmentLine().c_str(), figures.device.c_str(), DescribeRegion(shape).c_str(),
      Number(figures.fill_seconds, 3).c_str(),
      Bytes(static_cast<double>(figures.large_copy_bytes)).c_str(),
      Number(figures.large_copy_gbps, 3).c_str(), Table(figures).c_str(), reproduce.c_str());
  if (arguments.json.empty()) return;
  Json json = ResultHeader(command);
  json["reproduce"] = reproduce;
  json["device"] = figures.device;
  json["region"] = {{"bytes", shape.region_bytes()},
                    {"layers", shape.layers},
                    {"kv_heads", shape.kv_heads},
                    {"tokens", shape.tokens},
                    {"row_bytes", shape.row_bytes}};
  json["repetitions"] = shape.repetitions;
  json["seed"] = shape.seed;
  json["fill_seconds"] = figures.fill_seconds;
  json["large_memcpy"] = {{"bytes", figures.large_copy_bytes}, {"gbps", figures.large_copy_gbps}};
  json["rows"] = Json::array();
  for (const GatherLine& line : figures.lines) json["rows"].push_back(FiguresJson(figures, line));
  WriteJson(arguments.json, json);
}

}  // namespace

void AddGatherCommand(CLI::App* app, const CommandLine& command) {
  CLI::App* sub = app->add_subcommand(
      "gather", "Time the movement of scattered rows from host memory to the device, and memcpy");
  sub->footer(kNotes);
  auto arguments = std::make_shared<Arguments>();
  auto files = std::make_shared<FileArguments>(sub);
  GatherShape& shape = arguments->shape;
  const CLI::Validator count = Whole(1, 1 << 20);
  sub->add_option("--layers", shape.layers, "Layers in the region")
      ->check(count)
      ->capture_default_str();
  sub->add_option("--kv-heads", shape.kv_heads, "KV heads")->check(count)->capture_default_str();
  sub->add_option("--tokens", shape.tokens, "Tokens of a KV head")
      ->check(Whole(1, int64_t{1} << 31))
      ->capture_default_str();
  sub->add_option("--row-bytes", shape.row_bytes, "Bytes of a row: a multiple of 16, up to 4096")
      ->check(CLI::Validator(
          [](std::string& text) {
            const int bytes = std::atoi(text.c_str());
            return bytes > 0 && bytes <= 4096 && bytes % 16 == 0
                       ? ""
                       : "not a multiple of 16 up to 4096";
          },
          ""))
      ->capture_default_str();
  const auto shares = [arguments](const std::vector<std::string>& words) {
    arguments->shape.shares.clear();
    for (std::string& entry : SplitList("--shares", words)) {
      const std::string why = CLI::Range(1e-9, .5)(entry);
      if (!why.empty()) throw CLI::ValidationError("--shares", why);
      arguments->shape.shares.push_back(std::stod(entry));
    }
  };
  sub->add_option_function<std::vector<std::string>>("--shares", shares,
                                                     "Shares of the tokens to move, as .005,.02")
      ->type_name("LIST");
  sub->add_option("--repetitions", shape.repetitions, "Timed sets of rows")
      ->check(Whole(1, 10000))
      ->capture_default_str();
  sub->add_option("--threads", arguments->threads, "Threads that fill the region (0: all cores)")
      ->check(Whole(0, 1 << 16))
      ->capture_default_str();
  sub->add_option("--seed", shape.seed, "Of the rows that are drawn")
      ->check(Seed())
      ->capture_default_str();
  files->AddJson(&arguments->json);
  sub->callback([arguments, files, &command] {
    files->Check();
    RunGather(*arguments, command);
  });
}

}  // namespace vattn::bench
