#include "api/llama_cpp/team.h"

#ifdef _OPENMP
#include <omp.h>

#include <atomic>
#endif

namespace vattn::llama_cpp {

void RunAlone(int threads, const std::function<void()>& work) {
#ifdef _OPENMP
  if (threads > 1) {
    std::atomic<bool> is_done{false};
#pragma omp parallel num_threads(threads)
    {
      if (omp_get_thread_num() == 0) {
        work();
        is_done = true;
        is_done.notify_all();
      } else {
        is_done.wait(false);
      }
    }
    return;
  }
#else
  static_cast<void>(threads);
#endif
  work();
}

}  // namespace vattn::llama_cpp
