#include "bench/step/step_cuda_command.h"

#include <cstdio>
#include <exception>
#include <limits>
#include <memory>

#include "bench/cli/failure.h"
#include "bench/cli/handles.h"
#include "bench/cli/progress.h"
#include "bench/cli/settings.h"
#include "bench/cli/text.h"
#include "bench/step/step.h"
#include "bench/step/step_baselines.h"
#include "bench/step/step_cuda_report.h"

namespace vattn::bench {
namespace {

constexpr uint64_t kHostMargin = uint64_t{2} << 30;  // rows being made, answers being checked
constexpr int32_t kMostRefresh = 4096;

uint64_t PoolBytes(const DecodeShape& shape, const vattn_options& options,
                   const DeviceStepPlan& plan) {
  const int64_t steps = plan.all_steps();
  if (!plan.shared) return HostBytes(options, shape.tokens + steps, shape.batch);
  // Each fork has its own copy of the blocks that its steps write or code.
  constexpr int64_t kCopiedTokens = 512;
  return HostBytes(options, shape.tokens + steps, 1) +
         HostBytes(options, steps + kCopiedTokens, shape.batch);
}

// Every line to be measured, before the first is: UsageError if one cannot be held.
std::vector<DeviceStepLine> PlanLines(const DeviceStepArguments& arguments, uint64_t host_bytes) {
  std::vector<DeviceStepLine> lines;
  for (const int64_t tokens : arguments.tokens) {
    for (const int32_t batch : arguments.batches) {
      DeviceStepLine line = {.shape = arguments.shape,
                             .options = arguments.options,
                             .plan = arguments.plan,
                             .figures = {},
                             .baselines = {}};
      line.shape.tokens = tokens;
      line.shape.batch = batch;
      SetShape(line.shape, line.plan.all_steps(), &line.options);
      line.options.prefault = 1;  // pinning touches every page, on one thread
      line.options.host_bytes = PoolBytes(line.shape, line.options, line.plan);
      if (line.options.host_bytes + kHostMargin > host_bytes && batch > 1) {
        line.plan.shared = true;
        line.options.host_bytes = PoolBytes(line.shape, line.options, line.plan);
      }
      const uint64_t need = line.options.host_bytes + kHostMargin;
      if (need > host_bytes) {
        throw UsageError("--tokens " + std::to_string(tokens) + ": needs " +
                         Bytes(static_cast<double>(need)) + " of host memory, " +
                         Bytes(static_cast<double>(host_bytes)) +
                         " are available; lower --tokens, --layers or --kv-heads");
      }
      lines.push_back(line);
      if (!arguments.resident) continue;
      line.plan.resident = true;
      line.options.refresh = kMostRefresh;
      lines.push_back(line);
    }
  }
  return lines;
}

bool SameShape(const DecodeShape& a, const DecodeShape& b) {
  return a.tokens == b.tokens && a.batch == b.batch;
}

std::unique_ptr<DecodeData> MakeData(const Trace* trace, const DecodeShape& shape, uint64_t seed) {
  return trace != nullptr ? StretchTrace(*trace, shape, seed) : MakeSynthetic(shape, seed);
}

// A small line that does not count: kernels and the device's own tables are loaded by then.
void WarmUp(const DeviceStepLine& first, const Trace* trace, Progress* progress) {
  DeviceStepLine line = first;
  line.shape.tokens = 4096;
  line.shape.batch = 1;
  line.plan.shared = false;
  line.plan.steps = 1;
  line.options.host_bytes = PoolBytes(line.shape, line.options, line.plan);
  const auto data = MakeData(trace, line.shape, line.options.seed);
  MeasureDeviceStep(line.shape, *data, line.options, line.plan, progress);
}

std::string Describe(const DeviceStepArguments& arguments, const DeviceRates& rates, bool recorded,
                     uint64_t host_bytes) {
  const DecodeShape& shape = arguments.shape;
  return rates.device + ": memcpy from the host " + Number(rates.memcpy_gbps, 3) +
         " GB/s, device copy " + Number(rates.copy_gbps, 4) + " GB/s (read and written)\n" +
         std::to_string(shape.layers) + (shape.layers == 1 ? " layer, " : " layers, ") +
         std::to_string(shape.q_heads) + " query heads, " + std::to_string(shape.kv_heads) +
         " KV heads, head_dim " + std::to_string(shape.head_dim) + ", " +
         ChoiceName(DTypeChoices(), shape.dtype) + ", " +
         (recorded ? "stretched from a recorded trace (see --help)" : "synthetic keys") + "\n" +
         DescribePolicy(arguments.options) + ", " + DescribeCodes(arguments.options) +
         ", hot share " + Number(arguments.options.hot_share, 3) + ", " +
         std::to_string(arguments.plan.steps) + " steps after " +
         std::to_string(arguments.plan.all_steps() - arguments.plan.steps) +
         " that warm up, seed " + std::to_string(arguments.options.seed) + "; up to " +
         Bytes(static_cast<double>(host_bytes)) + " of host memory";
}

Json ReportJson(const DeviceStepArguments& arguments, const std::vector<DeviceStepLine>& lines,
                const DeviceRates& rates, const Trace* trace, const CommandLine& command) {
  const DecodeShape& shape = arguments.shape;
  Json json = ResultHeader(command);
  json["reproduce"] = command.Reproduce(arguments.options.seed);
  json["data"] = trace != nullptr ? "stretched trace" : "synthetic";
  json["trace"] = trace != nullptr ? trace->path : "";
  json["settings"] = SettingsJson(arguments.options);
  json["shape"] = {{"layers", shape.layers},
                   {"q_heads", shape.q_heads},
                   {"kv_heads", shape.kv_heads},
                   {"head_dim", shape.head_dim},
                   {"dtype", ChoiceName(DTypeChoices(), shape.dtype)},
                   {"steps", arguments.plan.steps},
                   {"caches_filled", !arguments.plan.keep_caches}};
  json["device"] = {
      {"name", rates.device}, {"memcpy_gbps", rates.memcpy_gbps}, {"copy_gbps", rates.copy_gbps}};
  json["rows"] = Json::array();
  for (const DeviceStepLine& line : lines) json["rows"].push_back(DeviceStepJson(line, rates));
  return json;
}

}  // namespace

void RunDeviceStep(const DeviceStepArguments& arguments, const Trace* trace,
                   const CommandLine& command) {
  RequireStepDevice();
  uint64_t host_bytes = arguments.host_bytes > 0 ? arguments.host_bytes : AvailableMemoryBytes();
  if (host_bytes == 0) host_bytes = std::numeric_limits<uint64_t>::max();  // not known
  const std::vector<DeviceStepLine> planned = PlanLines(arguments, host_bytes);
  Progress progress;
  progress.Begin("rates");
  const DeviceRates rates = MeasureDeviceRates(arguments.plan.threads);
  WarmUp(planned.front(), trace, &progress);

  std::vector<DeviceStepLine> done;
  std::vector<std::string> failed;
  for (DeviceStepLine line : planned) {
    try {
      {
        const auto data = MakeData(trace, line.shape, line.options.seed);
        line.figures = MeasureDeviceStep(line.shape, *data, line.options, line.plan, &progress);
      }
      if (line.plan.resident && !done.empty() && SameShape(done.back().shape, line.shape)) {
        line.baselines = done.back().baselines;
      } else if (arguments.baselines) {
        line.baselines = MeasureStepBaselines(line.shape,
                                              {.host_bytes = host_bytes - kHostMargin,
                                               .threads = arguments.plan.threads,
                                               .seed = line.options.seed},
                                              &progress);
      }
    } catch (const std::exception& error) {
      failed.push_back(LineName(line) + ": " + error.what());
      continue;
    }
    progress.Clear();
    // A long run shows what it has; the file is complete up to here if a later line ends it.
    std::fprintf(stderr, "%s: %.1f us a layer\n", LineName(line).c_str(), line.figures.us_p50);
    done.push_back(line);
    if (!arguments.json.empty()) {
      WriteJson(arguments.json, ReportJson(arguments, done, rates, trace, command));
    }
  }
  progress.Clear();
  if (!done.empty()) {
    std::printf("%s\n%s\n\n%s\nreproduce: %s\n", EnvironmentLine().c_str(),
                Describe(arguments, rates, trace != nullptr, host_bytes).c_str(),
                DeviceStepTables(done, rates).c_str(),
                command.Reproduce(arguments.options.seed).c_str());
    std::fflush(stdout);
  }
  if (failed.empty()) return;
  std::string text = "step: not measured";
  for (const std::string& line : failed) text += "\n  " + line;
  throw Failure(text);
}

}  // namespace vattn::bench
