#include "bench/disk/disk.h"

#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <filesystem>
#include <numeric>
#include <random>

#include "bench/cli/failure.h"
#include "bench/cli/handles.h"
#include "bench/cli/scratch_folder.h"
#include "bench/replay/session.h"

namespace vattn::bench {
namespace {

constexpr int32_t kLayers = 4, kKvHeads = 8, kHeadDim = 128;

vattn_options OptionsFor(const DiskPlan& plan, int64_t tokens) {
  vattn_options options;
  vattn_options_init(&options, sizeof(options));
  options.num_layers = kLayers;
  options.num_q_heads = options.num_kv_heads = kKvHeads;
  options.head_dim_k = options.head_dim_v = kHeadDim;
  options.dtype = VATTN_BF16;
  options.backend = VATTN_BACKEND_CPU;
  options.host_bytes = HostBytes(options, tokens, /*sequences=*/1);
  options.prefault = 1;  // page faults are no part of a file's speed
  options.io_engine = plan.engine;
  options.io_buffered = plan.buffered;
  return options;
}

// Random bytes as rows: nothing on the way can shrink them.
void Fill(vattn_sequence* sequence, int64_t tokens) {
  constexpr int64_t kChunk = 1024;
  std::vector<uint64_t> rows(kChunk * kKvHeads * kHeadDim / 4);
  std::mt19937_64 engine(1);
  for (int32_t layer = 0; layer < kLayers; ++layer) {
    for (int64_t token = 0; token < tokens; token += kChunk) {
      for (uint64_t& word : rows) word = engine() & 0xbfffbfffbfffbfff;  // no Inf, no NaN
      vattn_append_params params;
      vattn_append_params_init(&params, sizeof(params));
      params.layer = layer;
      params.num_tokens = std::min(kChunk, tokens - token);
      params.k = params.v = rows.data();
      Check(vattn_append(sequence, &params), "vattn_append");
    }
  }
}

void ForgetPages(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return;
  (void)posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  close(fd);
}

template <class Body>
double Seconds(Body&& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

Sequence Restore(vattn_runtime* runtime, const std::string& path) {
  vattn_sequence* made = nullptr;
  Check(vattn_sequence_restore(runtime, path.c_str(), &made), "vattn_sequence_restore");
  return Sequence(made);
}

}  // namespace

DiskFigures MeasureDisk(const DiskPlan& plan, Progress* progress) {
  const ScratchFolder folder(plan.directory, {"source", "target"});
  const std::string &source = folder.path(0), &target = folder.path(1);
  vattn_options probe = OptionsFor(plan, 256);
  const int64_t token_bytes = int64_t{kLayers} * kKvHeads * (RowBytes(probe) + probe.index_bytes);
  const int64_t tokens = std::max<int64_t>(256, (plan.mebibytes << 20) / token_bytes / 256 * 256);
  vattn_options options = OptionsFor(plan, tokens);
  progress->Begin("writing the first file");
  {
    const Runtime runtime = CreateRuntime(options);
    const Sequence sequence = CreateSequence(runtime.get(), 1);
    Fill(sequence.get(), tokens);
    Check(vattn_sequence_save(sequence.get(), source.c_str()), "vattn_sequence_save");
  }
  DiskFigures figures = {.file_bytes = std::filesystem::file_size(source), .lines = {}};
  const double gigabytes = static_cast<double>(figures.file_bytes) / 1e9;
  progress->Begin("configuration");
  const int64_t total = static_cast<int64_t>(plan.block_kib.size() * plan.depths.size());
  for (const int32_t block_kib : plan.block_kib) {
    for (const int32_t depth : plan.depths) {
      progress->Count(static_cast<int64_t>(figures.lines.size()) + 1, total);
      DiskLine line = {.block_kib = block_kib, .depth = depth, .save_gbps = {}, .restore_gbps = {}};
      options.io_block_bytes = block_kib << 10;
      options.io_depth = depth;
      const Runtime runtime = CreateRuntime(options);
      for (int32_t i = 0; i < plan.repetitions; ++i) {
        ForgetPages(source);
        Sequence sequence;
        line.restore_gbps.push_back(gigabytes /
                                    Seconds([&] { sequence = Restore(runtime.get(), source); }));
        std::remove(target.c_str());
        line.save_gbps.push_back(gigabytes / Seconds([&] {
                                   Check(vattn_sequence_save(sequence.get(), target.c_str()),
                                         "vattn_sequence_save");
                                 }));
      }
      figures.lines.push_back(std::move(line));
    }
  }
  progress->Clear();
  return figures;
}

RestoredFigures CompareRestored(const Trace& trace, const vattn_options& options,
                                const std::string& path) {
  std::vector<int32_t> layers(static_cast<size_t>(trace.layers));
  std::iota(layers.begin(), layers.end(), 0);
  Session first(trace, layers, options, /*prompt_queries=*/true);
  const int64_t half = trace.steps / 2;
  for (int64_t step = 0; step < half; ++step) first.Step(step);
  first.Save(path);
  RestoredFigures figures;
  figures.file_bytes = std::filesystem::file_size(path);
  Session second(trace, layers, options, path);
  const auto same = [](const auto& a, const auto& b, int64_t from, int64_t count) {
    return std::memcmp(&a[from], &b[from], static_cast<size_t>(count) * sizeof(a[0])) == 0;
  };
  for (int64_t step = half; step < trace.steps; ++step) {
    first.Step(step);
    second.Step(step);
    const StepResult &a = first.result(), &b = second.result();
    for (int64_t head = 0; head < trace.layers * trace.q_heads; ++head) {
      ++figures.answers;
      figures.different +=
          !(same(a.out, b.out, head * trace.head_dim_v, trace.head_dim_v) &&
            same(a.error, b.error, head, 1) && same(a.verdict, b.verdict, head, 1));
    }
  }
  return figures;
}

}  // namespace vattn::bench
