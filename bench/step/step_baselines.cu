#include <cuda_runtime_api.h>

#include <chrono>
#include <exception>
#include <functional>

#include "api/vattn.h"
#include "bench/baselines/cuda_baselines.h"
#include "bench/cli/failure.h"
#include "bench/cli/text.h"
#include "bench/cuda/cuda_memory.h"
#include "bench/cuda/watchdog.h"
#include "bench/step/step_baselines.h"

namespace vattn::bench {
namespace {

constexpr int kRepetitions = 16;
constexpr uint64_t kLongStream = uint64_t{8} << 30;    // bytes from which one repetition has to do
constexpr uint64_t kDeviceMargin = uint64_t{1} << 30;  // for states and other small arrays
constexpr std::chrono::seconds kLimit(180);            // pinning 64 GiB is in it
constexpr HotSetShape kHotSet = {.k = 2048, .slots = 4096, .overlap = .8};

// Why the baselines do not serve such a shape; empty if they do.
std::string Unserved(const DecodeShape& shape) {
  if (shape.dtype != VATTN_BF16) return "the baselines have bf16 rows only";
  if (shape.head_dim != 64 && shape.head_dim != 128)
    return "the baselines have head_dim 64 and 128";
  if (shape.q_heads / shape.kv_heads > 8)
    return "the baselines have 8 query heads a KV head at most";
  return "";
}

std::string Excess(const char* where, uint64_t need, uint64_t available) {
  return "needs " + Bytes(static_cast<double>(need)) + " of " + where + " memory, " +
         Bytes(static_cast<double>(available)) + " are available";
}

}  // namespace

StepBaselines MeasureStepBaselines(const DecodeShape& shape, const StepBaselinePlan& plan,
                                   Progress* progress) {
  StepBaselines result;
  if (const std::string why = Unserved(shape); !why.empty()) {
    result.notes.push_back(why);
    return result;
  }
  BaselineShape baseline;
  baseline.lengths.assign(shape.batch, shape.tokens);
  baseline.kv_heads = shape.kv_heads;
  baseline.group = shape.q_heads / shape.kv_heads;
  baseline.head_dim = shape.head_dim;
  baseline.threads = plan.threads;
  baseline.seed = plan.seed;
  const uint64_t bytes = baseline.bytes();
  const std::string subject =
      std::to_string(shape.tokens) + " tokens x " + std::to_string(shape.batch) + ": ";
  // A baseline that fails leaves the others to be measured.
  const auto measure = [&](const std::string& name, const std::string& unfit,
                           const std::function<void()>& run) {
    progress->Begin(subject + name);
    const Watchdog watchdog(subject + name, kLimit);
    try {
      if (!unfit.empty()) throw Failure(unfit);
      run();
    } catch (const std::exception& error) {
      cudaGetLastError();  // what could not be allocated is no error of the next one
      result.notes.push_back(subject + name + ": " + error.what());
    }
  };

  size_t free = 0, total = 0;
  CheckCuda(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  const bool on_device = bytes + kDeviceMargin <= free;
  const bool on_host = bytes <= plan.host_bytes;
  const std::string no_host = on_host ? "" : Excess("host", bytes, plan.host_bytes);
  measure("dense in device memory", on_device ? "" : Excess("device", bytes + kDeviceMargin, free),
          [&] { result.dense_us = DenseOnDevice(baseline).RunMicroseconds(kRepetitions); });
  measure("dense streamed", no_host, [&] {
    result.streamed_us = DenseStreamed(baseline).RunMicroseconds(bytes > kLongStream ? 1 : 3);
  });
  measure("HiSparse-style hot set", no_host, [&] {
    HotSetTopK hot_set(baseline, kHotSet);
    result.hot_set_us = hot_set.RunMicroseconds(kRepetitions);
    result.hot_set_missed = hot_set.missed_share();
  });
  return result;
}

}  // namespace vattn::bench
