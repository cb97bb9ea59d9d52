// What decode attention is measured against on a CUDA device: exact attention with all KV in device
// memory, the same streamed from the host, and a hot set with fetch before attention. Rows are
// bf16, K then V of one token and KV head. Calls block; a failing CUDA call throws Failure. Plain
// C++.
#ifndef VATTN_BENCH_BASELINES_CUDA_BASELINES_H_
#define VATTN_BENCH_BASELINES_CUDA_BASELINES_H_

#include <cstdint>
#include <memory>
#include <vector>

namespace vattn::bench {

struct BaselineShape {
  std::vector<int64_t> lengths;  // tokens of each sequence, at least 1
  int32_t kv_heads = 8;
  int32_t group = 4;        // query heads of a KV head, up to 8
  int32_t head_dim = 128;   // or 64
  int32_t threads = 1;      // that fill host memory
  int32_t item_tokens = 0;  // of a thread block of DenseOnDevice; 0: chosen
  uint64_t seed = 1;

  int64_t row_bytes() const { return 4 * int64_t{head_dim}; }
  int64_t rows() const;  // of all sequences and KV heads
  int64_t bytes() const { return rows() * row_bytes(); }
};

// One layer's attention of one token a sequence, all rows in device memory.
class DenseOnDevice {
 public:
  explicit DenseOnDevice(const BaselineShape& shape);
  ~DenseOnDevice();
  // Median device time of a call, the L2 cache holding other data before it.
  double RunMicroseconds(int repetitions);
  // Runs once; the largest relative error of a query head against float64. For small shapes.
  double Check();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// The same with all rows in pinned host memory: the copy engine brings chunk after chunk into one
// of two buffers while attention runs over the other.
class DenseStreamed {
 public:
  explicit DenseStreamed(const BaselineShape& shape, int64_t chunk_bytes = int64_t{32} << 20);
  ~DenseStreamed();
  double RunMicroseconds(int repetitions);
  double Check();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// As HiSparse does it, with each (sequence, KV head) a request of its own: given the list of `k`
// tokens to attend to, one block of 1024 threads a request finds which are in the hot set of
// `slots` rows (exact least recently used), gives the others the oldest slots and copies them from
// pinned host memory, a warp a row; then attention over the k rows. Every repetition is a step with
// its own lists.
struct HotSetShape {
  int32_t k = 2048;      // or the length of the sequence if that is less
  int32_t slots = 4096;  // k to 32767
  double overlap = .8;   // share of a list that was in the one before
};
class HotSetTopK {
 public:
  HotSetTopK(const BaselineShape& shape, const HotSetShape& hot_set);
  ~HotSetTopK();
  double RunMicroseconds(int repetitions);
  // Of the last RunMicroseconds, a step.
  double missed_share() const;
  double fetched_bytes() const;
  // Steps until slots are reused, comparing the slots' tokens with a hot set kept on the CPU
  // (Failure if they differ), then as above. For small shapes.
  double Check();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// GB/s that a copy within device memory reads and writes together.
double DeviceCopyGbps();

}  // namespace vattn::bench

#endif  // VATTN_BENCH_BASELINES_CUDA_BASELINES_H_
