#include "kernels/cpu/workers.h"

#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/task_arena.h>

namespace vattn::cpu {

struct Workers::Arena {
  explicit Arena(int threads) : arena(threads > 0 ? threads : tbb::task_arena::automatic) {}
  tbb::task_arena arena;
};

Workers::Workers(int num_threads) : arena_(std::make_unique<Arena>(num_threads)) {}
Workers::~Workers() = default;

int Workers::num_threads() const { return arena_->arena.max_concurrency(); }

void Workers::Run(int64_t count, void (*body)(void*, int64_t), void* context) {
  arena_->arena.execute([&] {
    tbb::parallel_for(int64_t{0}, count, [&](int64_t i) { body(context, i); });
  });
}

}  // namespace vattn::cpu
