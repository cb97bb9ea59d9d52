#include "tests/api/engine_device.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

namespace vattn::test {
namespace {

struct Free {
  void operator()(std::byte* memory) const { std::free(memory); }
};

class HostDevice : public EngineDevice {
 public:
  DeviceBytes Allocate(size_t size, Place) override {
    const size_t whole = (size + 4095) / 4096 * 4096;
    auto* memory = static_cast<std::byte*>(std::aligned_alloc(4096, whole));
    if (memory == nullptr) throw std::bad_alloc();
    owned_.emplace_back(memory);
    std::memset(memory, 0, whole);
    return {memory, memory, size};
  }
  void Upload(const DeviceBytes&, size_t) override {}
  void Download(const DeviceBytes&, size_t) override {}
  void Run(int64_t, const std::function<void()>& work) override { work(); }
  void Wait() override {}
  CUstream_st* stream() override { return nullptr; }

 private:
  std::vector<std::unique_ptr<std::byte, Free>> owned_;
};

}  // namespace

std::unique_ptr<EngineDevice> MakeHostDevice() { return std::make_unique<HostDevice>(); }

}  // namespace vattn::test
