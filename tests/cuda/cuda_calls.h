// What tests hold on a CUDA device. Failures of CUDA throw.
#ifndef VATTN_TESTS_CUDA_CUDA_CALLS_H_
#define VATTN_TESTS_CUDA_CUDA_CALLS_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "tests/api/attention_model.h"

namespace vattn::test {

void CheckCuda(cudaError_t error, const char* what);
// Why there is no device, or "".
std::string NoDevice();

#define SKIP_WITHOUT_DEVICE()                                            \
  do {                                                                   \
    const std::string missing = vattn::test::NoDevice();                 \
    if (!missing.empty()) GTEST_SKIP() << "no CUDA device: " << missing; \
  } while (false)

// Bytes of device memory in use by anyone.
int64_t DeviceBytesUsed();

template <class Handle, cudaError_t (*kDestroy)(Handle)>
struct CudaDestroyer {
  void operator()(Handle handle) const { kDestroy(handle); }
};
using OwnedStream = std::unique_ptr<std::remove_pointer_t<cudaStream_t>,
                                    CudaDestroyer<cudaStream_t, cudaStreamDestroy>>;
using OwnedGraph = std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>,
                                   CudaDestroyer<cudaGraphExec_t, cudaGraphExecDestroy>>;
OwnedStream MakeStream();
// What `enqueue` puts on the stream, as a graph; nothing runs.
template <class F>
OwnedGraph Capture(cudaStream_t stream, F&& enqueue) {
  CheckCuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "beginning a capture");
  enqueue();
  cudaGraph_t graph = nullptr;
  CheckCuda(cudaStreamEndCapture(stream, &graph), "ending a capture");
  cudaGraphExec_t made = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&made, graph, 0);
  cudaGraphDestroy(graph);
  CheckCuda(error, "instantiating a graph");
  return OwnedGraph(made);
}

// The arrays of a Call on the device, at addresses that stay.
class DeviceCall {
 public:
  explicit DeviceCall(const Call& call, int new_tokens);

  vattn_attend_params Params() const { return params_; }
  // q, k_new and v_new; enqueues.
  void Upload(Call& call, cudaStream_t stream) const;
  // Everything that attention writes; waits for the stream.
  void Download(Call& call, cudaStream_t stream) const;

 private:
  struct Free {
    void operator()(std::byte* memory) const { cudaFree(memory); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  vattn_attend_params params_;
};

}  // namespace vattn::test

#endif  // VATTN_TESTS_CUDA_CUDA_CALLS_H_
