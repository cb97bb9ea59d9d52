// Device time of work on a stream, without the time that the host takes to enqueue it.
#ifndef VATTN_BENCH_CUDA_CUDA_TIMING_H_
#define VATTN_BENCH_CUDA_CUDA_TIMING_H_

#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <type_traits>

namespace vattn::bench {

struct DestroyEvent {
  void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
};
struct DestroyStream {
  void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
};
using CudaEvent = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, DestroyEvent>;
using CudaStream = std::unique_ptr<std::remove_pointer_t<cudaStream_t>, DestroyStream>;

CudaEvent MakeEvent();
// Does not wait for the default stream.
CudaStream MakeStream();

class DeviceTimer {
 public:
  explicit DeviceTimer(cudaStream_t stream);

  // The stream is kept busy for a while first, so that everything up to Stop is enqueued before the
  // first of it runs.
  void Start();
  // Waits; microseconds since Start.
  double Stop();

 private:
  const cudaStream_t stream_;
  CudaEvent start_, stop_;
};

// Median of so many runs of what `enqueue` puts on the stream, after one that does not count. The
// L2 cache is filled with other bytes before each.
double MedianMicroseconds(int repetitions, cudaStream_t stream,
                          const std::function<void()>& enqueue);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_CUDA_CUDA_TIMING_H_
