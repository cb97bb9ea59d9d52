#include <cstddef>
#include <cstdint>
#include <vector>

#include "bench/cli/statistics.h"
#include "bench/cuda/cuda_memory.h"
#include "bench/cuda/cuda_timing.h"

namespace vattn::bench {
namespace {

constexpr uint64_t kHeadStartNanoseconds = 100'000;

__global__ void WaitKernel(uint64_t nanoseconds) {
  uint64_t start, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - start < nanoseconds);
}

}  // namespace

CudaEvent MakeEvent() {
  cudaEvent_t event = nullptr;
  CheckCuda(cudaEventCreate(&event), "cudaEventCreate");
  return CudaEvent(event);
}

CudaStream MakeStream() {
  cudaStream_t stream = nullptr;
  CheckCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  return CudaStream(stream);
}

DeviceTimer::DeviceTimer(cudaStream_t stream)
    : stream_(stream), start_(MakeEvent()), stop_(MakeEvent()) {}

void DeviceTimer::Start() {
  WaitKernel<<<1, 1, 0, stream_>>>(kHeadStartNanoseconds);
  CheckCuda(cudaGetLastError(), "WaitKernel");
  CheckCuda(cudaEventRecord(start_.get(), stream_), "cudaEventRecord");
}

double DeviceTimer::Stop() {
  CheckCuda(cudaEventRecord(stop_.get(), stream_), "cudaEventRecord");
  CheckCuda(cudaEventSynchronize(stop_.get()), "cudaEventSynchronize");
  float milliseconds = 0;
  CheckCuda(cudaEventElapsedTime(&milliseconds, start_.get(), stop_.get()), "cudaEventElapsedTime");
  return milliseconds * 1e3;
}

double MedianMicroseconds(int repetitions, cudaStream_t stream,
                          const std::function<void()>& enqueue) {
  int device = 0, cache_bytes = 0;
  CheckCuda(cudaGetDevice(&device), "cudaGetDevice");
  CheckCuda(cudaDeviceGetAttribute(&cache_bytes, cudaDevAttrL2CacheSize, device),
            "cudaDeviceGetAttribute");
  const DeviceArray<std::byte> filler(size_t{4} * cache_bytes);
  DeviceTimer timer(stream);
  std::vector<double> us;
  for (int i = 0; i <= repetitions; ++i) {
    CheckCuda(cudaMemsetAsync(filler.data(), i, filler.bytes(), stream), "cudaMemsetAsync");
    timer.Start();
    enqueue();
    us.push_back(timer.Stop());
  }
  us.erase(us.begin());
  return Quantile(us, .5);
}

}  // namespace vattn::bench
