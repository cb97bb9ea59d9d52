#include <algorithm>
#include <chrono>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "bench/baselines/cuda_baselines.h"
#include "bench/cli/handles.h"
#include "bench/cli/statistics.h"
#include "bench/cuda/cuda_memory.h"
#include "bench/cuda/cuda_timing.h"
#include "bench/cuda/watchdog.h"
#include "bench/step/step_cuda.h"
#include "bench/step/step_prompt.h"
#include "bench/step/step_record.h"

namespace vattn::bench {
namespace {

constexpr std::chrono::seconds kStepLimit(60);
constexpr int64_t kCheckedSteps = 8;

using Clock = std::chrono::steady_clock;

double FreeDeviceBytes() {
  size_t free = 0, total = 0;
  CheckCuda(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return static_cast<double>(free);
}

size_t CacheFillerBytes() {
  int device = 0, cache_bytes = 0;
  CheckCuda(cudaGetDevice(&device), "cudaGetDevice");
  CheckCuda(cudaDeviceGetAttribute(&cache_bytes, cudaDevAttrL2CacheSize, device),
            "cudaDeviceGetAttribute");
  return size_t{4} * cache_bytes;
}

struct DestroyGraph {
  void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
};
struct DestroyGraphExec {
  void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
};
using CudaGraph = std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, DestroyGraph>;
using CudaGraphExec = std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, DestroyGraphExec>;

// One batch through its steps.
class DeviceDecoder {
 public:
  DeviceDecoder(const DecodeShape& shape, const DecodeData& data, const vattn_options& options,
                const DeviceStepPlan& plan)
      : shape_(shape),
        data_(data),
        options_(options),
        plan_(plan),
        record_(shape, plan.shared),
        stream_(MakeStream()),
        timer_(stream_.get()),
        filler_(plan.keep_caches ? 1 : CacheFillerBytes()) {
    for (int32_t layer = 0; layer < shape.layers; ++layer) layers_.emplace_back(shape);
    free_bytes_ = FreeDeviceBytes();
    runtime_ = CreateRuntime(options);
  }

  void AppendPrompts(Progress* progress) {
    const auto start = Clock::now();
    const int32_t made = plan_.shared ? 1 : shape_.batch;
    for (int32_t i = 0; i < made; ++i) {
      sequences_.push_back(CreateSequence(runtime_.get(), i + 1));
      for (int32_t layer = 0; layer < shape_.layers; ++layer) {
        AppendPrompt(shape_, data_, i, layer, plan_.threads, {sequences_[i].get()});
        progress->Count(i * shape_.layers + layer + 1, made * shape_.layers);
      }
      Check(vattn_sequence_build_index(sequences_[i].get()), "vattn_sequence_build_index");
    }
    for (int32_t i = made; i < shape_.batch; ++i) {
      vattn_sequence* fork = nullptr;
      Check(vattn_sequence_fork(sequences_[0].get(), i + 1, &fork), "vattn_sequence_fork");
      sequences_.emplace_back(fork);
    }
    batch_ = CreateBatch(runtime_.get(), shape_.batch);
    for (int32_t i = 0; i < shape_.batch; ++i) {
      Check(vattn_batch_set(batch_.get(), i, sequences_[i].get()), "vattn_batch_set");
    }
    figures_.prompt_seconds = std::chrono::duration<double>(Clock::now() - start).count();
    figures_.distinct_tokens = made * shape_.tokens;
  }

  void RunSteps(Progress* progress) {
    Watchdog watchdog(
        std::to_string(shape_.tokens) + " tokens, batch " + std::to_string(shape_.batch),
        kStepLimit);
    const int64_t timed = plan_.all_steps() - plan_.steps;
    const int64_t check_every = std::max<int64_t>(1, plan_.steps / kCheckedSteps);
    for (int64_t step = 0; step < plan_.all_steps(); ++step) {
      watchdog.Pet();
      const bool replay = step >= kEagerWarmUp + kEagerSteps;
      const double us = Step(step, replay) / shape_.layers;
      if (!replay && step >= kEagerWarmUp) eager_us_.push_back(us);
      if (step >= timed) {
        replay_us_.push_back(us);
        record_.Add(layers_);
        if ((step - timed) % check_every == 0) record_.KeepAnswers(step, layers_, inputs_);
      }
      progress->Count(step + 1, plan_.all_steps());
    }
    figures_.device_bytes = free_bytes_ - FreeDeviceBytes();
  }

  DeviceStepFigures Finish(Progress* progress) {
    figures_.us_p50 = Quantile(replay_us_, .5);
    figures_.us_p90 = Quantile(replay_us_, .9);
    figures_.eager_p50 = Quantile(eager_us_, .5);
    figures_.eager_p90 = Quantile(eager_us_, .9);
    figures_.begin_p50 = Quantile(begin_us_, .5);
    figures_.begin_p90 = Quantile(begin_us_, .9);
    record_.Summarize(options_, &figures_);
    record_.Check(data_, options_, plan_.threads, progress, &figures_.errors);
    return figures_;
  }

 private:
  // Device time of the step's attention, all layers.
  double Step(int64_t step, bool replay) {
    inputs_ = MakeInputs(
        shape_, data_, {.query = plan_.resident ? 0 : step, .token = step, .shared = plan_.shared});
    for (int32_t layer = 0; layer < shape_.layers; ++layer) {
      Upload(inputs_[layer].q, layers_[layer].q);
      Upload(inputs_[layer].k, layers_[layer].k);
      Upload(inputs_[layer].v, layers_[layer].v);
      const DeviceArray<uint64_t>& timeline = layers_[layer].timeline;  // marks may be left out
      CheckCuda(cudaMemsetAsync(timeline.data(), 0, timeline.bytes(), stream_.get()),
                "cudaMemsetAsync");
    }
    CheckCuda(cudaStreamSynchronize(stream_.get()), "copying the step's inputs");
    const auto start = Clock::now();
    Check(vattn_batch_begin_step(batch_.get(), /*new_tokens=*/1, stream_.get()),
          "vattn_batch_begin_step");
    if (step >= kEagerWarmUp) {
      begin_us_.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
    }
    if (replay && graph_ == nullptr) Capture();
    // Also keeps the device busy while the host enqueues the calls of many layers.
    for (int32_t i = 0; !plan_.keep_caches && i <= shape_.layers / 4; ++i) {
      CheckCuda(cudaMemsetAsync(filler_.data(), i, filler_.bytes(), stream_.get()),
                "cudaMemsetAsync");
    }
    timer_.Start();
    if (replay) {
      CheckCuda(cudaGraphLaunch(graph_.get(), stream_.get()), "cudaGraphLaunch");
    } else {
      Attend();
    }
    return timer_.Stop();
  }

  void Upload(const std::vector<std::byte>& from, const DeviceArray<std::byte>& to) {
    CheckCuda(
        cudaMemcpyAsync(to.data(), from.data(), from.size(), cudaMemcpyHostToDevice, stream_.get()),
        "cudaMemcpyAsync");
  }

  void Attend() {
    for (int32_t layer = 0; layer < shape_.layers; ++layer) {
      const LayerArrays& arrays = layers_[layer];
      vattn_attend_params params;
      vattn_attend_params_init(&params, sizeof(params));
      params.layer = layer;
      params.num_tokens = 1;
      params.out_dtype = VATTN_F32;
      params.q = arrays.q.data();
      params.k_new = arrays.k.data();
      params.v_new = arrays.v.data();
      params.out = arrays.out.data();
      params.verdict = arrays.verdict.data();
      params.selected = arrays.selected.data();
      params.fetched = arrays.fetched.data();
      params.looks = arrays.looks.data();
      params.middle = arrays.middle.data();
      params.timeline = arrays.timeline.data();
      Check(vattn_attend(batch_.get(), &params, stream_.get()), "vattn_attend");
    }
  }

  void Capture() {
    CheckCuda(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal),
              "cudaStreamBeginCapture");
    cudaGraph_t captured = nullptr;
    try {
      Attend();
    } catch (...) {
      cudaStreamEndCapture(stream_.get(), &captured);
      const CudaGraph partial(captured);
      throw;
    }
    CheckCuda(cudaStreamEndCapture(stream_.get(), &captured), "cudaStreamEndCapture");
    const CudaGraph graph(captured);
    cudaGraphExec_t made = nullptr;
    CheckCuda(cudaGraphInstantiate(&made, captured, /*flags=*/0), "cudaGraphInstantiate");
    graph_.reset(made);
  }

  const DecodeShape shape_;
  const DecodeData& data_;
  const vattn_options options_;
  const DeviceStepPlan plan_;
  StepRecord record_;
  CudaStream stream_;
  DeviceTimer timer_;
  DeviceArray<std::byte> filler_;
  std::vector<LayerArrays> layers_;
  double free_bytes_ = 0;  // before the runtime
  Runtime runtime_;
  std::vector<Sequence> sequences_;
  Batch batch_;
  CudaGraphExec graph_;
  std::vector<LayerInputs> inputs_;  // of the last step
  std::vector<double> replay_us_, eager_us_, begin_us_;
  DeviceStepFigures figures_;
};

}  // namespace

void RequireStepDevice() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess && count > 0) return;
  throw UsageError("step: no CUDA device; --backend cpu measures without one");
}

DeviceRates MeasureDeviceRates(int threads) {
  constexpr size_t kBytes = size_t{1} << 30;
  DeviceRates rates;
  int device = 0;
  cudaDeviceProp properties;
  CheckCuda(cudaGetDevice(&device), "cudaGetDevice");
  CheckCuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  rates.device = properties.name;
  const HostRegion host(kBytes, threads, [](uint64_t* words, size_t first, size_t count) {
    for (size_t i = 0; i < count; ++i) words[i] = first + i;
  });
  const DeviceArray<std::byte> to(kBytes);
  const CudaStream stream = MakeStream();
  const double us = MedianMicroseconds(/*repetitions=*/5, stream.get(), [&] {
    CheckCuda(cudaMemcpyAsync(to.data(), host.data(), kBytes, cudaMemcpyHostToDevice, stream.get()),
              "cudaMemcpyAsync");
  });
  rates.memcpy_gbps = kBytes / us / 1e3;
  rates.copy_gbps = DeviceCopyGbps();
  return rates;
}

DeviceStepFigures MeasureDeviceStep(const DecodeShape& shape, const DecodeData& data,
                                    const vattn_options& options, const DeviceStepPlan& plan,
                                    Progress* progress) {
  const std::string subject =
      std::to_string(shape.tokens) + " tokens x " + std::to_string(shape.batch);
  progress->Begin(subject + ": pool");
  cudaGetLastError();  // of a measurement that found no room
  DeviceDecoder decoder(shape, data, options, plan);
  progress->Begin(subject + ": prompt");
  decoder.AppendPrompts(progress);
  progress->Begin(subject + ": step");
  decoder.RunSteps(progress);
  progress->Begin(subject + ": check");
  return decoder.Finish(progress);
}

}  // namespace vattn::bench
