// What decode steps on a CUDA device reported, and the arrays that they report in. For .cu files
// only.
#ifndef VATTN_BENCH_STEP_STEP_RECORD_H_
#define VATTN_BENCH_STEP_STEP_RECORD_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "api/vattn.h"
#include "bench/cli/progress.h"
#include "bench/cuda/cuda_memory.h"
#include "bench/step/step_check.h"
#include "bench/step/step_cuda.h"
#include "bench/step/step_prompt.h"
#include "bench/trace/decode_data.h"

namespace vattn::bench {

// The arrays of one layer's calls; extents as vattn_attend_params.
struct LayerArrays {
  explicit LayerArrays(const DecodeShape& shape);

  DeviceArray<std::byte> q, k, v;
  DeviceArray<float> out;
  DeviceArray<int32_t> verdict, selected, fetched, looks;
  DeviceArray<int64_t> middle;
  DeviceArray<uint64_t> timeline;
};

class StepRecord {
 public:
  // shared: the batch is forks of the data's sequence 0.
  StepRecord(const DecodeShape& shape, bool shared);

  // A step that has ended. layers [layers].
  void Add(const std::vector<LayerArrays>& layers);
  // The answers of some heads of the same step, to be checked.
  void KeepAnswers(int64_t step, const std::vector<LayerArrays>& layers,
                   const std::vector<LayerInputs>& inputs);

  // Means over what was added.
  void Summarize(const vattn_options& options, DeviceStepFigures* figures) const;
  // Answers that were kept against exact attention.
  void Check(const DecodeData& data, const vattn_options& options, int threads, Progress* progress,
             AnswerErrors* errors) const;

 private:
  struct CheckedHead {
    HeadPlace place;  // KV head of the data
    int32_t slot;
    std::vector<HeadAnswer> answers;
  };

  const DecodeShape shape_;
  std::vector<CheckedHead> checked_;
  std::vector<double> looks_, selected_, fetched_, middle_;  // [steps, layers, batch, kv_heads]
  std::array<std::vector<double>, VATTN_TIMELINE_MARKS - 1> stage_us_;
  std::array<int64_t, 4> verdicts_ = {};
};

}  // namespace vattn::bench

#endif  // VATTN_BENCH_STEP_STEP_RECORD_H_
