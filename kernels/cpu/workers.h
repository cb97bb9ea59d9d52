// The worker threads of a CPU runtime: the one place that knows oneTBB.
#ifndef VATTN_KERNELS_CPU_WORKERS_H_
#define VATTN_KERNELS_CPU_WORKERS_H_

#include <cstdint>
#include <memory>
#include <type_traits>

#include "kernels/params.h"

namespace vattn::cpu {

class Workers {
 public:
  // 0: all that the process may use, which is also the most.
  explicit Workers(int num_threads);
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  // Takes the threads from the system now. False if it refuses: the workers are then not to be
  // used.
  bool Start();
  int num_threads() const;
  // body(context, i) for i in [0, count), in any order, at once on several threads; nests.
  void Run(int64_t count, void (*body)(void* context, int64_t i), void* context);

 private:
  struct Arena;
  std::unique_ptr<Arena> arena_;
};

// Runs body(i) for i in [0, count) on the workers; on the calling thread if they are null.
template <class F>
void ParallelFor(Workers* workers, int64_t count, F&& body) {
  if (workers == nullptr || count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  workers->Run(
      count,
      [](void* context, int64_t i) { (*static_cast<std::remove_reference_t<F>*>(context))(i); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_WORKERS_H_
