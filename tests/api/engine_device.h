// Where a test engine's arrays lie and how its steps run: called on the CPU, captured once for each
// shape and replayed on CUDA.
#ifndef VATTN_TESTS_API_ENGINE_DEVICE_H_
#define VATTN_TESTS_API_ENGINE_DEVICE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "api/vattn.h"

namespace vattn::test {

enum class Place { kPinned, kDevice };

// Bytes that host code fills and reads at `host` and calls are given at `at`; one place on the CPU.
struct DeviceBytes {
  std::byte* host = nullptr;
  std::byte* at = nullptr;
  size_t size = 0;
};

class EngineDevice {
 public:
  virtual ~EngineDevice() = default;

  // Zeros, page-aligned; freed with the device.
  virtual DeviceBytes Allocate(size_t size, Place place) = 0;
  // Enqueue copies of the first `size` bytes; nothing to do where host and at are one place.
  virtual void Upload(const DeviceBytes& bytes, size_t size) = 0;
  virtual void Download(const DeviceBytes& bytes, size_t size) = 0;
  // Enqueues `work`, whose calls are the same each time for a shape.
  virtual void Run(int64_t shape, const std::function<void()>& work) = 0;
  virtual void Wait() = 0;
  virtual CUstream_st* stream() = 0;
};

std::unique_ptr<EngineDevice> MakeHostDevice();
// That of the backend under test (tests/api/backend.h).
std::unique_ptr<EngineDevice> MakeEngineDevice();

}  // namespace vattn::test

#endif  // VATTN_TESTS_API_ENGINE_DEVICE_H_
