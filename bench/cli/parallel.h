// Threads for the tools' own work. The library brings its own.
#ifndef VATTN_BENCH_CLI_PARALLEL_H_
#define VATTN_BENCH_CLI_PARALLEL_H_

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace vattn::bench {

// Calls body(i) for i in [0, count) on up to num_threads threads, in no particular order. Rethrows
// the first exception after all threads have stopped.
template <class Body>
void ParallelFor(int num_threads, int64_t count, Body&& body) {
  std::atomic<int64_t> next = 0;
  std::mutex mutex;
  std::exception_ptr first;
  auto work = [&] {
    try {
      for (int64_t i = next++; i < count; i = next++) body(i);
    } catch (...) {
      next = count;
      std::lock_guard lock(mutex);
      if (!first) first = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> threads;
    for (int t = 1; t < num_threads && t < count; ++t) threads.emplace_back(work);
    work();
  }
  if (first) std::rethrow_exception(first);
}

}  // namespace vattn::bench

#endif  // VATTN_BENCH_CLI_PARALLEL_H_
