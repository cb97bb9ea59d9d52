#include <algorithm>
#include <string>
#include <utility>

#include "bench/cli/dtype.h"
#include "bench/cli/failure.h"
#include "bench/cli/handles.h"
#include "bench/cli/statistics.h"
#include "bench/step/step_record.h"

namespace vattn::bench {
namespace {

constexpr int64_t kCheckedHeads = 8;

template <class T>
void Append(const DeviceArray<T>& array, std::vector<double>* all) {
  const std::vector<T> values = array.Download();
  all->insert(all->end(), values.begin(), values.end());
}

}  // namespace

LayerArrays::LayerArrays(const DecodeShape& s)
    : q(size_t{1} * s.batch * s.q_heads * s.head_dim * ElementBytes(s.dtype)),
      k(size_t{1} * s.batch * s.kv_heads * s.head_dim * ElementBytes(s.dtype)),
      v(k.size()),
      out(size_t{1} * s.batch * s.q_heads * s.head_dim),
      verdict(size_t{1} * s.batch * s.q_heads),
      selected(size_t{1} * s.batch * s.kv_heads),
      fetched(selected.size()),
      looks(selected.size()),
      middle(selected.size()),
      timeline(std::vector<uint64_t>(VATTN_TIMELINE_MARKS)) {}

StepRecord::StepRecord(const DecodeShape& shape, bool shared) : shape_(shape) {
  const int64_t all = int64_t{shape.batch} * shape.layers * shape.kv_heads;
  const int64_t count = std::min(all, kCheckedHeads);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = i * all / count, slot = at / shape.kv_heads / shape.layers;
    checked_.push_back({.place = {.sequence = shared ? 0 : slot,
                                  .layer = at / shape.kv_heads % shape.layers,
                                  .head = at % shape.kv_heads},
                        .slot = static_cast<int32_t>(slot),
                        .answers = {}});
  }
}

void StepRecord::Add(const std::vector<LayerArrays>& layers) {
  for (const LayerArrays& arrays : layers) {
    Append(arrays.selected, &selected_);
    Append(arrays.fetched, &fetched_);
    Append(arrays.looks, &looks_);
    Append(arrays.middle, &middle_);
    for (const int32_t verdict : arrays.verdict.Download()) {
      if (verdict < 0 || verdict >= static_cast<int32_t>(verdicts_.size())) {
        throw Failure("vattn_attend: verdict " + std::to_string(verdict) + " is none");
      }
      ++verdicts_[verdict];
    }
    const std::vector<uint64_t> marks = arrays.timeline.Download();
    for (size_t i = 0; i < stage_us_.size(); ++i) {
      if (marks[i] == 0 || marks[i + 1] < marks[i]) continue;  // not passed by this call
      stage_us_[i].push_back(static_cast<double>(marks[i + 1] - marks[i]) / 1e3);
    }
  }
}

void StepRecord::KeepAnswers(int64_t step, const std::vector<LayerArrays>& layers,
                             const std::vector<LayerInputs>& inputs) {
  const size_t dim = shape_.head_dim;
  std::vector<std::vector<float>> out;
  std::vector<std::vector<int32_t>> verdict;
  for (const LayerArrays& arrays : layers) {
    out.push_back(arrays.out.Download());
    verdict.push_back(arrays.verdict.Download());
  }
  const int32_t group = shape_.q_heads / shape_.kv_heads;
  for (CheckedHead& head : checked_) {
    const int64_t layer = head.place.layer;
    for (int32_t g = 0; g < group; ++g) {
      const int64_t at = int64_t{head.slot} * shape_.q_heads + head.place.head * group + g;
      HeadAnswer answer = {.step = step, .verdict = verdict[layer][at], .q = {}, .out = {}};
      answer.q.resize(dim);
      ToFloat(shape_.dtype, &inputs[layer].q[at * dim * ElementBytes(shape_.dtype)], dim,
              answer.q.data());
      const float* from = &out[layer][at * dim];
      answer.out.assign(from, from + dim);
      head.answers.push_back(std::move(answer));
    }
  }
}

void StepRecord::Summarize(const vattn_options& options, DeviceStepFigures* figures) const {
  figures->looks = Mean(looks_);
  figures->selected = Mean(selected_);
  figures->fetched = Mean(fetched_);
  figures->middle = Mean(middle_);
  figures->verdicts = verdicts_;
  const double heads = static_cast<double>(shape_.batch) * shape_.kv_heads;
  const bool exact = options.index == VATTN_INDEX_EXACT;
  // fp16 estimates, for rankings fp32 scores, a query head each.
  const double estimate = options.policy == VATTN_POLICY_VERIFIED ? 2 : 4;
  const double estimate_bytes = estimate * shape_.q_heads / shape_.kv_heads;
  const double key_bytes =
      exact ? static_cast<double>(shape_.head_dim * ElementBytes(shape_.dtype)) : 0;
  figures->pcie_bytes = heads * (figures->fetched * static_cast<double>(RowBytes(options)) +
                                 figures->middle * key_bytes);
  const double code_bytes =
      (exact ? 0 : options.index_bytes) + options.value_bits * options.head_dim_v / 8.;
  figures->scan_bytes = heads * figures->middle * (code_bytes + 2 * estimate_bytes);
  for (size_t i = 0; i < stage_us_.size(); ++i) figures->stage_us[i] = Mean(stage_us_[i]);
}

void StepRecord::Check(const DecodeData& data, const vattn_options& options, int threads,
                       Progress* progress, AnswerErrors* errors) const {
  for (size_t i = 0; i < checked_.size(); ++i) {
    CheckAnswers(shape_, data, checked_[i].place, checked_[i].answers, options.norm,
                 options.norm_floor, threads, errors);
    progress->Count(static_cast<int64_t>(i) + 1, static_cast<int64_t>(checked_.size()));
  }
}

}  // namespace vattn::bench
