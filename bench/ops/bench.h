// Axes and data of the benchmarks of single operations: one group (one KV head and its query heads)
// of one sequence, on one thread.
#ifndef VATTN_BENCH_OPS_BENCH_H_
#define VATTN_BENCH_OPS_BENCH_H_

#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/params.h"

namespace vattn::bench {

// Values that an axis takes.
inline const std::vector<int64_t> kTokenAxis = {4096, 16384, 32768, 131072};
inline const std::vector<int64_t> kHeadAxis = {1, 4, 6, 8};
inline const std::vector<int64_t> kCodeByteAxis = {16, 32, 48, 64};
inline const std::vector<int64_t> kDimAxis = {64, 128};
// Where an axis is not the subject.
constexpr int64_t kTokens = 32768, kHeads = 4, kCodeBytes = 32, kDim = 128;

struct Shape {
  int64_t tokens = kTokens, heads = kHeads, code_bytes = kCodeBytes, dim = kDim;
};
// Arguments (tokens, heads, code_bytes, dim), one axis varied at a time around the usual values.
void Axes(benchmark::internal::Benchmark* benchmark);
Shape ShapeOf(const benchmark::State& state);

// Random rows of a group in bf16 with a calibrated index and codes for its whole middle, an open
// step, and working memory.
class Workload {
 public:
  explicit Workload(const Shape& shape);
  ~Workload();
  Workload(const Workload&) = delete;
  Workload& operator=(const Workload&) = delete;

  // Goes on to another copy of rows and codes: together they are more than a cache holds, so that
  // every iteration reads from memory, as a decode step does that comes back after all other
  // layers.
  void Next();

  const Shape& shape() const { return shape_; }
  const Storage& storage() const { return storage_; }
  const Promise& promise() const { return promise_; }
  Group& group() { return group_; }
  int64_t middle() const { return group_.middle_end - group_.middle_begin; }
  EncodeParams encode_params() const;
  // Lists every `stride`th token of the middle in scratch.token; returns their number.
  int64_t ListTokens(int64_t stride);

 private:
  struct Data;
  Shape shape_;
  std::unique_ptr<Data> data_;
  int64_t copies_ = 1, copy_ = 0;
  Storage storage_;
  Promise promise_;
  Group group_;
};

// GB/s and tokens/s beside the time of one iteration.
void SetRates(benchmark::State& state, double bytes, double tokens);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_OPS_BENCH_H_
