// A build without CUDA: no device opens, so nothing else here is ever reached with one.
#include <utility>

#include "memory/device.h"
#include "memory/status.h"

namespace vattn {
namespace {

absl::Status NoCuda() { return NotSupportedError("this build has no CUDA backend"); }

}  // namespace

bool BuiltWithCuda() { return false; }

std::vector<DeviceFacts> ListDevices() { return {}; }

DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}
DeviceMemory::~DeviceMemory() = default;

DeviceEvent::DeviceEvent(DeviceEvent&& other) noexcept : handle_(other.handle_) {}
DeviceEvent& DeviceEvent::operator=(DeviceEvent&& other) noexcept {
  std::swap(handle_, other.handle_);
  return *this;
}
DeviceEvent::~DeviceEvent() = default;

absl::StatusOr<std::unique_ptr<Device>> Device::Open(int) { return NoCuda(); }
Device::~Device() = default;
absl::Status Device::Activate() { return NoCuda(); }
absl::StatusOr<std::byte*> Device::Register(std::byte*, uint64_t, uint64_t) { return NoCuda(); }
void Device::Unregister(std::byte*, uint64_t) {}
absl::StatusOr<DeviceMemory> Device::Allocate(uint64_t) { return NoCuda(); }
absl::StatusOr<DeviceMemory> Device::AllocatePinned(uint64_t) { return NoCuda(); }
absl::Status Device::Copy(void*, const void*, uint64_t, DeviceStream) { return NoCuda(); }
absl::Status Device::Fill(void*, int, uint64_t, DeviceStream) { return NoCuda(); }
absl::Status Device::CopyPieces(std::byte*, const std::byte*, uint64_t, uint64_t, int64_t,
                                DeviceStream) {
  return NoCuda();
}
absl::Status Device::Record(DeviceEvent&, DeviceStream) { return NoCuda(); }
absl::Status Device::Wait(const DeviceEvent&) { return NoCuda(); }
absl::Status Device::Follow(DeviceStream, const DeviceEvent&) { return NoCuda(); }
absl::Status Device::Synchronize(DeviceStream) { return NoCuda(); }
absl::Status Device::SynchronizeAll() { return NoCuda(); }
bool Device::CanFollow(const void*) const { return false; }
absl::Status Device::Check(int, const char*) { return NoCuda(); }

}  // namespace vattn
