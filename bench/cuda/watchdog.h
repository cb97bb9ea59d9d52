// Ends the program when a device does not come back: waits for it cannot be broken off otherwise.
#ifndef VATTN_BENCH_CUDA_WATCHDOG_H_
#define VATTN_BENCH_CUDA_WATCHDOG_H_

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <stop_token>
#include <string>
#include <thread>
#include <utility>

namespace vattn::bench {

// While it lives, Pet has to be called within every `limit`; else a line on stderr says what took
// so long and the process ends with exit code 1.
class Watchdog {
 public:
  Watchdog(std::string what, std::chrono::seconds limit)
      : what_(std::move(what)),
        limit_(limit),
        thread_([this](std::stop_token stop) { Run(stop); }) {}

  void Pet() {
    const std::lock_guard lock(mutex_);
    ++pets_;
    wake_.notify_all();
  }

 private:
  void Run(const std::stop_token& stop) {
    std::unique_lock lock(mutex_);
    while (!stop.stop_requested()) {
      const int64_t before = pets_;
      if (wake_.wait_for(lock, stop, limit_, [&] { return pets_ != before; })) continue;
      if (stop.stop_requested()) return;
      std::fprintf(stderr, "\nvattn: %s: no answer from the device in %lld s\n", what_.c_str(),
                   static_cast<long long>(limit_.count()));
      std::_Exit(EXIT_FAILURE);
    }
  }

  const std::string what_;
  const std::chrono::seconds limit_;
  std::mutex mutex_;
  std::condition_variable_any wake_;
  int64_t pets_ = 0;
  std::jthread thread_;  // last: it uses all of the above
};

}  // namespace vattn::bench

#endif  // VATTN_BENCH_CUDA_WATCHDOG_H_
