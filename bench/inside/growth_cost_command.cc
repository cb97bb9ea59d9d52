#include "bench/inside/growth_cost_command.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "bench/cli/failure.h"
#include "bench/cli/file_arguments.h"
#include "bench/cli/number_lists.h"
#include "bench/cli/progress.h"
#include "bench/cli/statistics.h"
#include "bench/cli/text.h"
#include "bench/replay/report.h"
#include "memory/status.h"
#include "runtime/batch.h"
#include "runtime/cuda/backend.h"
#include "runtime/sequence.h"

namespace vattn::bench {
namespace {

constexpr char kNotes[] =
    "One sequence of random rows (bf16) grows from nothing: --decode steps first, then appends of "
    "--piece tokens\n"
    "with --steps decode steps after each. Growing: reserving nothing, mapping pages below "
    "addresses that are\n"
    "there already; the time is the host's, inside of appends and of vattn_batch_begin_step. The "
    "address of the\n"
    "codes is looked at after every append, and a sequence that is not forked must copy no block.";

struct Arguments {
  int64_t tokens = 1 << 20, piece = 1 << 14, decode = 1 << 13;
  int32_t steps = 16, layers = 1, q_heads = 32, kv_heads = 8, head_dim = 128;
  int32_t device = 0;
  std::string json;
};

double Since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
      .count();
}

void Must(const absl::Status& status, const char* call) {
  if (!status.ok()) throw Failure(std::string(call) + ": " + std::string(status.message()));
}

// Microseconds of each call, and how much of them was growth.
struct Calls {
  std::vector<double> us, growth_us;
};

class Growing {
 public:
  explicit Growing(const Arguments& a) : a_(a) {
    Options o;
    o.num_layers = a.layers;
    o.num_q_heads = a.q_heads;
    o.num_kv_heads = a.kv_heads;
    o.head_dim_k = o.head_dim_v = a.head_dim;
    o.backend = BackendKind::kCuda;
    o.device = a.device;
    o.prefault = true;
    o.on_unverified =
        OnUnverified::kBestEffort;  // the answers are of no interest: no head is read whole
    const uint64_t blocks =
        static_cast<uint64_t>(a.tokens / kBlockTokens + 2) * a.kv_heads * a.layers;
    const Storage storage = MakeStorage(o);
    o.host_bytes = blocks * static_cast<uint64_t>(storage.block.bytes + 64);
    absl::StatusOr<std::shared_ptr<vattn::Runtime>> runtime = vattn::Runtime::Create(o, nullptr);
    Must(runtime.status(), "creating a runtime");
    runtime_ = *runtime;
    absl::StatusOr<std::unique_ptr<vattn::Sequence>> sequence =
        vattn::Sequence::Create(runtime_, {.id = 1});
    Must(sequence.status(), "creating a sequence");
    sequence_ = *std::move(sequence);
    batch_ = std::make_unique<vattn::Batch>(runtime_, 1);
    Must(batch_->Set(0, sequence_.get()), "filling a batch");
    codes_ = runtime_->cuda()->storage().codes;

    std::mt19937_64 random(1);
    std::normal_distribution<float> normal;
    rows_.resize(static_cast<size_t>(a.piece) * a.kv_heads * a.head_dim);
    for (uint16_t& x : rows_) {
      const float value = normal(random);
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      x = static_cast<uint16_t>(bits >> 16);
    }
    out_.resize(static_cast<size_t>(a.q_heads) * a.head_dim);
  }

  void Append(int64_t tokens, Calls& calls) {
    Time(calls, [&] {
      for (int l = 0; l < a_.layers; ++l) {
        const int64_t token = int64_t{a_.kv_heads} * a_.head_dim;
        Must(sequence_->Append({.layer = l,
                                .num_tokens = tokens,
                                .k = rows_.data(),
                                .v = rows_.data(),
                                .k_token_stride = token,
                                .k_head_stride = a_.head_dim,
                                .v_token_stride = token,
                                .v_head_stride = a_.head_dim}),
             "vattn_append");
      }
    });
  }

  // begin_step alone is timed: attention never grows.
  void Step(int64_t step, Calls& calls) {
    Time(calls, [&] { Must(batch_->BeginStep(1), "vattn_batch_begin_step"); });
    const uint16_t* const row =
        rows_.data() + static_cast<size_t>(step % 64) * a_.q_heads * a_.head_dim;
    for (int l = 0; l < a_.layers; ++l) {
      Must(batch_->Attend({.layer = l, .q = row, .k_new = row, .v_new = row, .out = out_.data()}),
           "vattn_attend");
    }
  }

  // Throws if anything has moved.
  void CheckPlaces() const {
    if (runtime_->cuda()->storage().codes != codes_) throw Failure("the codes have moved");
    if (runtime_->counters().blocks_copied != 0) throw Failure("blocks were copied");
  }

  PageCounts pages() const { return runtime_->cuda()->pages().counts(); }
  const std::string& device() const { return runtime_->cuda()->device().facts().name; }

 private:
  template <class F>
  void Time(Calls& calls, F&& call) {
    const uint64_t before = pages().growth_ns;
    const auto start = std::chrono::steady_clock::now();
    call();
    calls.us.push_back(Since(start));
    calls.growth_us.push_back(static_cast<double>(pages().growth_ns - before) / 1e3);
  }

  const Arguments a_;
  std::shared_ptr<vattn::Runtime> runtime_;
  std::unique_ptr<vattn::Sequence> sequence_;
  std::unique_ptr<vattn::Batch> batch_;
  const std::byte* codes_ = nullptr;
  std::vector<uint16_t> rows_;  // [piece][kv_heads][head_dim]
  std::vector<float> out_;
};

Json Figures(const Calls& calls) {
  return {{"calls", calls.us.size()},
          {"grew", std::count_if(calls.growth_us.begin(), calls.growth_us.end(),
                                 [](double us) { return us > 0; })},
          {"us_p50", Quantile(calls.us, .5)},
          {"growth_us",
           {{"mean", Mean(calls.growth_us)},
            {"p99", Quantile(calls.growth_us, .99)},
            {"max", calls.growth_us.empty()
                        ? 0
                        : *std::max_element(calls.growth_us.begin(), calls.growth_us.end())}}}};
}

std::vector<std::string> Row(const char* name, const Json& f) {
  const auto us = [&](const char* key) { return Fixed(f["growth_us"][key].get<double>(), 2); };
  return {name,
          std::to_string(f["calls"].get<int64_t>()),
          Fixed(f["us_p50"].get<double>(), 1),
          std::to_string(f["grew"].get<int64_t>()),
          us("mean"),
          us("p99"),
          us("max")};
}

void RunGrowthCost(const Arguments& a, const CommandLine& command) {
  if (a.q_heads % a.kv_heads != 0) throw UsageError("--q-heads must be a multiple of --kv-heads");
  if (a.piece < 64 * a.q_heads / a.kv_heads)
    throw UsageError("--piece is too short to take queries from");
  Growing growing(a);
  Progress progress;
  Calls decode, appends, steps;
  progress.Begin("decode steps from an empty prompt");
  growing.Append(1, appends);
  int64_t tokens = 1, step = 0;
  for (; tokens < std::min(a.decode, a.tokens); ++tokens) growing.Step(step++, decode);
  growing.CheckPlaces();
  Json list = Json::array();
  progress.Begin("appends and decode steps");
  while (tokens < a.tokens) {
    const int64_t piece = std::min(a.piece, a.tokens - tokens);
    growing.Append(piece, appends);
    tokens += piece;
    for (int32_t s = 0; s < a.steps && tokens < a.tokens; ++s, ++tokens)
      growing.Step(step++, steps);
    growing.CheckPlaces();
    const PageCounts pages = growing.pages();
    list.push_back(
        {{"tokens", tokens}, {"bytes_mapped", pages.mapped_bytes}, {"growths", pages.growths}});
    progress.Count(tokens, a.tokens);
  }
  progress.Clear();
  const PageCounts pages = growing.pages();
  Json json = ResultHeader(command);
  json["device"] = growing.device();
  json["tokens"] = tokens;
  json["bytes_reserved"] = pages.reserved_bytes;
  json["bytes_mapped"] = pages.mapped_bytes;
  json["growths"] = pages.growths;
  json["growth_ms"] = static_cast<double>(pages.growth_ns) / 1e6;
  json["moved"] = false;  // CheckPlaces would have thrown
  json["decode_from_empty"] = Figures(decode);
  json["appends"] = Figures(appends);
  json["decode_between_appends"] = Figures(steps);
  json["pieces"] = std::move(list);
  const std::vector<std::vector<std::string>> rows = {
      {"calls", "number", "us p50", "that grew", "growth us mean", "p99", "max"},
      Row("begin_step, from empty", json["decode_from_empty"]),
      Row("append", json["appends"]),
      Row("begin_step, between appends", json["decode_between_appends"])};
  std::printf(
      "%s\n%s: %lld tokens, %d layers, %d KV heads, d %d\n%s of addresses, %s mapped in %lld "
      "growths of %s ms; "
      "codes did not move, no block was copied\n\n%s\nreproduce: %s\n",
      EnvironmentLine().c_str(), growing.device().c_str(), static_cast<long long>(tokens), a.layers,
      a.kv_heads, a.head_dim, Bytes(static_cast<double>(pages.reserved_bytes)).c_str(),
      Bytes(static_cast<double>(pages.mapped_bytes)).c_str(), static_cast<long long>(pages.growths),
      Fixed(static_cast<double>(pages.growth_ns) / 1e6, 2).c_str(), MarkdownTable(rows).c_str(),
      command.Text().c_str());
  std::fflush(stdout);
  if (!a.json.empty()) WriteJson(a.json, json);
}

}  // namespace

void AddGrowthCostCommand(CLI::App* app, const CommandLine& command) {
  CLI::App* sub =
      app->add_subcommand("growth-cost", "What it costs a CUDA device to grow with a sequence");
  sub->footer(kNotes);
  auto a = std::make_shared<Arguments>();
  auto files = std::make_shared<FileArguments>(sub);
  const auto add = [&](const char* name, auto& value, const char* help, int64_t low, int64_t high) {
    sub->add_option(name, value, help)->capture_default_str()->check(Whole(low, high));
  };
  add("--tokens", a->tokens, "Tokens of the sequence in the end", 1, int64_t{1} << 30);
  add("--decode", a->decode, "Tokens that come by decode steps first", 1, int64_t{1} << 30);
  add("--piece", a->piece, "Tokens of an append", 256, 1 << 20);
  add("--steps", a->steps, "Decode steps after each append", 0, 1 << 20);
  add("--layers", a->layers, "Layers", 1, 1024);
  add("--q-heads", a->q_heads, "Query heads", 1, 1024);
  add("--kv-heads", a->kv_heads, "KV heads", 1, 1024);
  add("--head-dim", a->head_dim, "Elements of a head", 16, 256);
  add("--device", a->device, "CUDA device", 0, 1023);
  files->AddJson(&a->json);
  sub->callback([a, files, &command] {
    files->Check();
    RunGrowthCost(*a, command);
  });
}

}  // namespace vattn::bench
