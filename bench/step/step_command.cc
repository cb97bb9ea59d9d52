#include "bench/step/step_command.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bench/cli/failure.h"
#include "bench/cli/handles.h"
#include "bench/cli/option_arguments.h"
#include "bench/cli/text.h"
#include "bench/step/step.h"
#include "bench/step/step_cuda.h"
#include "bench/step/step_cuda_command.h"

namespace vattn::bench {
namespace {

constexpr char kNotes[] =
    "With --trace the sequences are the recorded ones lengthened: the first 16 and the last 128\n"
    "prompt tokens are kept, what lies between is tiled to the length, each row moved by seeded\n"
    "Gaussian noise of 5 % of its dimensions' standard deviations. KV heads, layers and steps "
    "beyond\n"
    "those recorded go round through them. Without --trace keys and queries are Gaussian with a\n"
    "decaying spectrum in common. The caches are filled with other bytes before every timed call, "
    "as\n"
    "the other layers of a model would do. Read bandwidth is the fastest of several plain reads "
    "of\n"
    "1 GiB by the same number of threads, before and after.\n"
    "On a CUDA device every --tokens and --batch is measured: the attention of a step as a "
    "replayed\n"
    "CUDA graph, device arrays throughout, beside exact attention with all KV in device memory, "
    "the\n"
    "same streamed from the host, and a HiSparse-style hot set. Where host memory would not hold "
    "a\n"
    "batch apart its sequences are forks of one. --policy is for a CUDA device; the CPU measures\n"
    "verified.";

constexpr size_t kBandwidthBytes = size_t{1} << 30;
constexpr int kBandwidthRepeats = 5;
constexpr int64_t kCpuSteps = 32;

struct Arguments {
  OptionArguments options;
  DecodeShape shape;
  std::vector<int64_t> tokens = {4096, 32768, 131072};
  std::vector<int32_t> batches = {1};
  std::optional<int64_t> steps;
  bool keep_caches = false, resident = false, no_baselines = false;
  double host_gib = 0;
  std::string trace, json;
};

// More than any cache, so that nothing of the last call is left in one.
ReadBuffer MakeCacheFiller(int threads) {
  const long level3 = sysconf(_SC_LEVEL3_CACHE_SIZE);
  const size_t bytes = level3 > 0 ? 2 * static_cast<size_t>(level3) : 0;
  return ReadBuffer(std::max(bytes, size_t{64} << 20), threads);
}

void CheckMemory(const DecodeShape& shape, const vattn_options& options) {
  const uint64_t need = 2 * options.host_bytes, available = AvailableMemoryBytes();
  if (available == 0 || need <= available) return;
  throw UsageError("--tokens " + std::to_string(shape.tokens) + ": two runtimes need " +
                   Bytes(static_cast<double>(need)) + ", available are " +
                   Bytes(static_cast<double>(available)) +
                   "; lower --tokens, --layers, --kv-heads or --batch");
}

std::string DescribeShape(const DecodeShape& shape, const Arguments& arguments, int64_t steps,
                          const vattn_options& options) {
  const std::string data =
      arguments.trace.empty() ? "synthetic keys" : "stretched from a recorded trace (see --help)";
  return std::to_string(shape.layers) + (shape.layers == 1 ? " layer, " : " layers, ") +
         std::to_string(shape.q_heads) + " query heads, " + std::to_string(shape.kv_heads) +
         " KV heads, head_dim " + std::to_string(shape.head_dim) + ", " +
         ChoiceName(DTypeChoices(), shape.dtype) + ", batch " + std::to_string(shape.batch) + ", " +
         data + "\n" + DescribePolicy(options) + ", " + DescribeCodes(options) + ", " +
         std::to_string(ResolveThreads(options.num_threads)) + " threads, " +
         std::to_string(steps) + " steps, seed " + std::to_string(options.seed);
}

std::string Table(const std::vector<StepFigures>& all, double read_gbps) {
  std::vector<std::vector<std::string>> rows = {
      {"tokens", "verified us, p50 / p90", "dense us, p50 / p90", "dense GB/s", "of read bandwidth",
       "speedup", "selected", "verified or exact"}};
  for (const StepFigures& f : all) {
    rows.push_back(
        {std::to_string(f.tokens), Number(f.verified_p50, 4) + " / " + Number(f.verified_p90, 4),
         Number(f.dense_p50, 4) + " / " + Number(f.dense_p90, 4), Number(f.dense_gbps, 3),
         Percent(f.dense_gbps / read_gbps), Fixed(f.dense_p50 / f.verified_p50, 2),
         Percent(f.selected_share), Percent(f.promised_share)});
  }
  return MarkdownTable(rows);
}

Json FiguresJson(const StepFigures& f, double read_gbps) {
  return {{"tokens", f.tokens},
          {"verified_us", {{"p50", f.verified_p50}, {"p90", f.verified_p90}}},
          {"dense_us", {{"p50", f.dense_p50}, {"p90", f.dense_p90}}},
          {"dense_gbps", f.dense_gbps},
          {"dense_of_read_bandwidth", f.dense_gbps / read_gbps},
          {"speedup", f.dense_p50 / f.verified_p50},
          {"selected_share", {{"mean", f.selected_share}}},
          {"verified_or_exact_share", f.promised_share}};
}

// The backend that the library takes for these options.
int32_t ChosenBackend(const vattn_options& options) {
  if (options.backend == VATTN_BACKEND_CPU) return VATTN_BACKEND_CPU;
  if (options.backend == VATTN_BACKEND_CUDA) RequireStepDevice();
  vattn_options small = options, chosen;
  small.host_bytes = uint64_t{64} << 20;
  vattn_options_init(&chosen, sizeof(chosen));
  const Runtime runtime = CreateRuntime(small);
  Check(vattn_runtime_options(runtime.get(), &chosen), "vattn_runtime_options");
  return chosen.backend;
}

void RunStepOnDevice(const Arguments& arguments, const DecodeShape& shape,
                     const vattn_options& options, const Trace* trace, const CommandLine& command) {
  DeviceStepArguments device;
  device.shape = shape;
  device.options = options;
  device.options.backend = VATTN_BACKEND_CUDA;
  device.tokens = arguments.tokens;
  device.batches = arguments.batches;
  if (arguments.steps) device.plan.steps = *arguments.steps;
  device.plan.keep_caches = arguments.keep_caches;
  device.plan.threads = ResolveThreads(options.num_threads);
  device.resident = arguments.resident;
  device.baselines = !arguments.no_baselines;
  device.host_bytes = static_cast<uint64_t>(arguments.host_gib * 0x1p30);
  device.json = arguments.json;
  RunDeviceStep(device, trace, command);
}

void RunStep(const Arguments& arguments, const CommandLine& command) {
  DecodeShape shape = arguments.shape;
  vattn_options options = arguments.options.Resolve();
  std::optional<Trace> trace;
  if (!arguments.trace.empty()) trace = ReadTrace(arguments.trace);
  if (shape.head_dim == 0) shape.head_dim = trace ? static_cast<int32_t>(trace->head_dim_k) : 128;
  SetShape(shape, 0, &options);
  if (ChosenBackend(options) == VATTN_BACKEND_CUDA) {
    RunStepOnDevice(arguments, shape, options, trace ? &*trace : nullptr, command);
    return;
  }
  if (arguments.batches.size() != 1) throw UsageError("--batch: one number on the CPU backend");
  if (arguments.resident) throw UsageError("--resident: on a CUDA device only");
  if (options.policy != VATTN_POLICY_VERIFIED) {
    throw UsageError("--policy: verified on the CPU backend, which is measured beside dense");
  }
  shape.batch = arguments.batches[0];
  const int64_t steps = arguments.steps.value_or(kCpuSteps);
  for (const int64_t tokens : arguments.tokens) {  // what does not fit shows before the long part
    shape.tokens = tokens;
    SetShape(shape, steps, &options);
    CheckMemory(shape, options);
    CreateRuntime(options);
  }

  Progress progress;
  const int threads = ResolveThreads(options.num_threads);
  std::optional<ReadBuffer> filler;
  if (!arguments.keep_caches) filler.emplace(MakeCacheFiller(threads));
  progress.Begin("read bandwidth");
  double read_gbps = ReadBuffer(kBandwidthBytes, threads).Bandwidth(kBandwidthRepeats);
  std::vector<StepFigures> all;
  for (const int64_t tokens : arguments.tokens) {
    shape.tokens = tokens;
    SetShape(shape, steps, &options);
    const std::unique_ptr<DecodeData> data =
        trace ? StretchTrace(*trace, shape, options.seed) : MakeSynthetic(shape, options.seed);
    all.push_back(
        MeasureStep(shape, *data, options, steps, filler ? &*filler : nullptr, &progress));
  }
  read_gbps =
      std::max(read_gbps, ReadBuffer(kBandwidthBytes, threads).Bandwidth(kBandwidthRepeats));
  progress.Clear();

  const std::string reproduce = command.Reproduce(options.seed);
  std::printf("%s\n%s\nread bandwidth: %s GB/s\n\n%s\nreproduce: %s\n", EnvironmentLine().c_str(),
              DescribeShape(shape, arguments, steps, options).c_str(), Number(read_gbps, 3).c_str(),
              Table(all, read_gbps).c_str(), reproduce.c_str());
  if (arguments.json.empty()) return;
  Json json = ResultHeader(command);
  json["reproduce"] = reproduce;
  json["data"] = trace ? "stretched trace" : "synthetic";
  json["trace"] = arguments.trace;
  json["settings"] = SettingsJson(options);
  json["shape"] = {{"layers", shape.layers},
                   {"q_heads", shape.q_heads},
                   {"kv_heads", shape.kv_heads},
                   {"head_dim", shape.head_dim},
                   {"batch", shape.batch},
                   {"dtype", ChoiceName(DTypeChoices(), shape.dtype)},
                   {"steps", steps},
                   {"caches_filled", !arguments.keep_caches}};
  json["read_gbps"] = read_gbps;
  json["rows"] = Json::array();
  for (const StepFigures& figures : all) json["rows"].push_back(FiguresJson(figures, read_gbps));
  WriteJson(arguments.json, json);
}

}  // namespace

void AddStepCommand(CLI::App* app, const CommandLine& command) {
  CLI::App* sub = app->add_subcommand(
      "step", "Time decode steps on long sequences: policy verified and dense, taking turns");
  sub->footer(kNotes);
  auto arguments = std::make_shared<Arguments>();
  auto files = std::make_shared<FileArguments>(sub);
  DecodeShape& shape = arguments->shape;
  shape.dtype = VATTN_BF16;
  shape.head_dim = 0;  // not given
  const CLI::Validator count = Whole(1, 1 << 20);
  AddNumbers(sub, "--tokens", &arguments->tokens, "Lengths of the sequences, as 4096,32768", 1,
             int64_t{1} << 40);
  sub->add_option("--layers", shape.layers, "Layers")->check(count)->capture_default_str();
  sub->add_option("--q-heads", shape.q_heads, "Query heads")->check(count)->capture_default_str();
  sub->add_option("--kv-heads", shape.kv_heads, "KV heads")->check(count)->capture_default_str();
  sub->add_option("--head-dim", shape.head_dim, "Elements of K and of V (the trace's, else 128)")
      ->check(count);
  AddNumbers(sub, "--batch", &arguments->batches, "Sequences in a step; several on CUDA, as 1,4", 1,
             1 << 20);
  AddChoice(sub, "--dtype", DTypeChoices(), "Type of rows and queries (bf16)", &shape.dtype);
  sub->add_option("--steps", arguments->steps, "Timed steps (32; 64 on CUDA)")->check(count);
  files->AddInput("--trace", &arguments->trace, "Recording to lengthen (synthetic without)");
  sub->add_flag("--keep-caches", arguments->keep_caches, "Leave the caches as the last call did");
  sub->add_flag("--resident", arguments->resident,
                "CUDA: a second line where every step asks the same, so that nothing is missed");
  sub->add_flag("--no-baselines", arguments->no_baselines, "CUDA: the library's steps alone");
  sub->add_option("--host-gib", arguments->host_gib,
                  "CUDA: host memory that may be taken (what is available)")
      ->check(CLI::Range(1., 1e6).description(""));
  arguments->options.AddPolicies(sub);
  arguments->options.Add(sub);
  files->AddJson(&arguments->json);
  sub->callback([arguments, files, &command] {
    files->Check();
    RunStep(*arguments, command);
  });
}

}  // namespace vattn::bench
