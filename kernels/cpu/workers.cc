#include "kernels/cpu/workers.h"

#include <oneapi/tbb/global_control.h>
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/task_arena.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <vector>

namespace vattn::cpu {
namespace {

// oneTBB prints a warning when it is asked for more threads than it gives.
int Limited(int threads) {
  const size_t most =
      tbb::global_control::active_value(tbb::global_control::max_allowed_parallelism);
  return std::min(threads, static_cast<int>(most));
}

}  // namespace

struct Workers::Arena {
  explicit Arena(int threads)
      : arena(threads > 0 ? Limited(threads) : tbb::task_arena::automatic) {}
  tbb::task_arena arena;
};

Workers::Workers(int num_threads) : arena_(std::make_unique<Arena>(num_threads)) {}
Workers::~Workers() = default;

bool Workers::Start() {
  // What the new threads wait for outlives them: one that was refused leaves its work behind.
  static std::mutex mutex;
  static std::atomic<uint64_t> opened{0};
  const std::lock_guard<std::mutex> lock(mutex);
  const uint64_t gate = opened + 1;
  std::vector<std::unique_ptr<tbb::task_arena>> arenas;
  bool started = true;
  try {
    // One more arena with work is one more thread, started by this one. Left to themselves, threads
    // of oneTBB start each other, and where the system refuses that the process ends.
    for (int i = 1; i < num_threads(); ++i) {
      arenas.push_back(
          std::make_unique<tbb::task_arena>(/*max_concurrency=*/2, /*reserved_for_masters=*/1));
      arenas.back()->enqueue([gate] {
        for (uint64_t seen = opened; seen < gate; seen = opened) opened.wait(seen);
      });
    }
  } catch (const std::runtime_error&) {
    started = false;
  }
  opened = gate;
  opened.notify_all();
  return started;
}

int Workers::num_threads() const { return arena_->arena.max_concurrency(); }

void Workers::Run(int64_t count, void (*body)(void*, int64_t), void* context) {
  arena_->arena.execute(
      [&] { tbb::parallel_for(int64_t{0}, count, [&](int64_t i) { body(context, i); }); });
}

}  // namespace vattn::cpu
