// ggml's threads out of the way of vattn's.
#ifndef VATTN_API_LLAMA_CPP_TEAM_H_
#define VATTN_API_LLAMA_CPP_TEAM_H_

#include <functional>

namespace vattn::llama_cpp {

// Runs `work` while the other threads of the calling thread's OpenMP team sleep. After each operation of ggml
// they spin for some milliseconds, waiting for the next one, on the cores that vattn's threads are to
// run on. `threads`: as many as ggml's team has. Without OpenMP it only runs the work.
void RunAlone(int threads, const std::function<void()>& work);

}  // namespace vattn::llama_cpp

#endif  // VATTN_API_LLAMA_CPP_TEAM_H_
