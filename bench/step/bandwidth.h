// How fast this machine reads memory: what dense attention on a CPU is measured against.
#ifndef VATTN_BENCH_STEP_BANDWIDTH_H_
#define VATTN_BENCH_STEP_BANDWIDTH_H_

#include <cstddef>
#include <cstdint>
#include <memory>

namespace vattn::bench {

// Memory to read through, each page touched by one of num_threads threads.
class ReadBuffer {
 public:
  ReadBuffer(size_t bytes, int num_threads);

  // Reads every byte once with num_threads threads. Also leaves the caches full of it.
  void ReadAll() const;
  // GB/s of the fastest of `repeats` reads.
  double Bandwidth(int repeats) const;

 private:
  static constexpr size_t kChunk = size_t{2} << 20;  // a huge page

  struct Free {
    void operator()(void* memory) const;
  };
  size_t chunks_;
  int num_threads_;
  std::unique_ptr<uint64_t[], Free> memory_;
};

}  // namespace vattn::bench

#endif  // VATTN_BENCH_STEP_BANDWIDTH_H_
