// Owners of device and registered host memory for the tools, and CUDA's error codes as exceptions.
// For .cu files only.
#ifndef VATTN_BENCH_CUDA_CUDA_MEMORY_H_
#define VATTN_BENCH_CUDA_CUDA_MEMORY_H_

#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "bench/cli/failure.h"
#include "bench/cli/parallel.h"

namespace vattn::bench {

inline void CheckCuda(int error, const std::string& what) {
  if (error == cudaSuccess) return;
  throw Failure(what + ": " + cudaGetErrorString(static_cast<cudaError_t>(error)));
}

// Uninitialised device memory.
template <class T>
class DeviceArray {
 public:
  DeviceArray() = default;
  explicit DeviceArray(size_t count) : count_(count) {
    void* memory = nullptr;
    CheckCuda(cudaMalloc(&memory, std::max<size_t>(count, 1) * sizeof(T)),
              "cudaMalloc of " + std::to_string(count * sizeof(T)) + " bytes");
    memory_.reset(static_cast<T*>(memory));
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    CheckCuda(cudaMemcpy(data(), values.data(), bytes(), cudaMemcpyHostToDevice), "cudaMemcpy");
    // Other streams do not wait for the default one, which may still be moving the last bytes.
    CheckCuda(cudaStreamSynchronize(/*stream=*/nullptr), "cudaStreamSynchronize");
  }

  T* data() const { return memory_.get(); }
  size_t size() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }
  // REQUIRES that what writes it has ended.
  std::vector<T> Download() const {
    std::vector<T> values(count_);
    CheckCuda(cudaMemcpy(values.data(), data(), bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }

 private:
  struct Free {
    void operator()(T* memory) const { cudaFree(memory); }
  };
  std::unique_ptr<T, Free> memory_;
  size_t count_ = 0;
};

// Host memory that the device reads in place: huge pages where granted, each 2 MiB first touched by
// fill(word index, words) on one of num_threads threads, then registered.
class HostRegion {
 public:
  static constexpr size_t kChunk = size_t{2} << 20;

  template <class Fill>  // void(uint64_t* words, size_t first_word, size_t num_words)
  HostRegion(size_t bytes, int num_threads, Fill&& fill) : bytes_(bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = {static_cast<std::byte*>(memory), Unmap{bytes}};
    madvise(memory, bytes, MADV_HUGEPAGE);
    const auto chunks = static_cast<int64_t>((bytes + kChunk - 1) / kChunk);
    ParallelFor(num_threads, chunks, [&](int64_t i) {
      const size_t first = i * kChunk, count = std::min(kChunk, bytes - first);
      fill(reinterpret_cast<uint64_t*>(data() + first), first / 8, count / 8);
    });
    CheckCuda(cudaHostRegister(memory, bytes, cudaHostRegisterMapped),
              "cudaHostRegister of " + std::to_string(bytes) + " bytes");
    registered_ = {memory, {}};
    CheckCuda(cudaHostGetDevicePointer(&device_, memory, 0), "cudaHostGetDevicePointer");
  }

  std::byte* data() const { return memory_.get(); }
  size_t size() const { return bytes_; }
  uint64_t device_address() const { return reinterpret_cast<uint64_t>(device_); }

 private:
  struct Unmap {
    size_t bytes;
    void operator()(std::byte* memory) const { munmap(memory, bytes); }
  };
  struct Unregister {
    void operator()(void* memory) const { cudaHostUnregister(memory); }
  };
  size_t bytes_;
  std::unique_ptr<std::byte, Unmap> memory_;
  std::unique_ptr<void, Unregister> registered_;  // goes first
  void* device_ = nullptr;
};

}  // namespace vattn::bench

#endif  // VATTN_BENCH_CUDA_CUDA_MEMORY_H_
