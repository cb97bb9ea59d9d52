// An engine's arrays in pinned and device memory, and its steps as graphs.
#include "tests/api/engine_device.h"

#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <vector>

#include "tests/api/backend.h"
#include "tests/cuda/cuda_calls.h"

namespace vattn::test {
namespace {

class CudaDevice : public EngineDevice {
 public:
  CudaDevice() : stream_(MakeStream()) {}
  ~CudaDevice() override {
    cudaStreamSynchronize(stream_.get());
    for (void* memory : pinned_) cudaFreeHost(memory);
    for (void* memory : device_) cudaFree(memory);
  }
  DeviceBytes Allocate(size_t size, Place place) override {
    void *host = nullptr, *at = nullptr;
    const size_t whole = size + (size == 0);
    CheckCuda(cudaHostAlloc(&host, whole, cudaHostAllocDefault), "taking pinned memory");
    pinned_.push_back(host);
    std::memset(host, 0, whole);
    at = host;
    if (place == Place::kDevice) {
      CheckCuda(cudaMalloc(&at, whole), "taking device memory");
      device_.push_back(at);
      CheckCuda(cudaMemset(at, 0, whole), "clearing device memory");
      // Streams of the library's do not wait for it.
      CheckCuda(cudaDeviceSynchronize(), "waiting for cleared memory");
    }
    return {static_cast<std::byte*>(host), static_cast<std::byte*>(at), size};
  }
  void Upload(const DeviceBytes& bytes, size_t size) override { Copy(bytes, size, true); }
  void Download(const DeviceBytes& bytes, size_t size) override { Copy(bytes, size, false); }
  void Run(int64_t shape, const std::function<void()>& work) override {
    OwnedGraph& graph = graphs_[shape];
    if (!graph) graph = Capture(stream_.get(), work);
    CheckCuda(cudaGraphLaunch(graph.get(), stream_.get()), "launching a step");
  }
  void Wait() override { CheckCuda(cudaStreamSynchronize(stream_.get()), "waiting for a step"); }
  CUstream_st* stream() override { return stream_.get(); }

 private:
  void Copy(const DeviceBytes& bytes, size_t size, bool up) {
    if (bytes.at == bytes.host) return;
    CheckCuda(cudaMemcpyAsync(up ? bytes.at : bytes.host, up ? bytes.host : bytes.at, size,
                              cudaMemcpyDefault, stream_.get()),
              "copying an array");
  }

  OwnedStream stream_;
  std::vector<void*> pinned_, device_;
  std::map<int64_t, OwnedGraph> graphs_;
};

}  // namespace

std::unique_ptr<EngineDevice> MakeEngineDevice() {
  return OnCuda() ? std::make_unique<CudaDevice>() : MakeHostDevice();
}

}  // namespace vattn::test
