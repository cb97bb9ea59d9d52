#include <cuda_runtime.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "memory/device.h"
#include "memory/status.h"

namespace vattn {
namespace {

// Drivers refuse very large single registrations
constexpr uint64_t kRegisterChunk = uint64_t{8} << 30;
constexpr uint64_t kHostPageBytes = 4096;

// Errors after which nothing works on the device until the process ends.
bool IsFinal(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorLaunchFailure:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorDevicesUnavailable:
    case cudaErrorContained:
    case cudaErrorUnknown:
      return true;
    default:
      return false;
  }
}

DeviceFacts ReadFacts(int ordinal) {
  DeviceFacts facts;
  cudaDeviceProp p;
  if (cudaGetDeviceProperties(&p, ordinal) != cudaSuccess) {
    cudaGetLastError();
    return facts;
  }
  facts.name = p.name;
  facts.compute_major = p.major;
  facts.compute_minor = p.minor;
  facts.multiprocessors = p.multiProcessorCount;
  facts.memory_bytes = p.totalGlobalMem;
  facts.l2_bytes = p.l2CacheSize;
  cudaDriverGetVersion(&facts.driver);
  cudaRuntimeGetVersion(&facts.runtime);
  return facts;
}

}  // namespace

bool BuiltWithCuda() { return true; }

std::vector<DeviceFacts> ListDevices() {
  int count = 0;
  std::vector<DeviceFacts> devices;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return devices;
  }
  for (int i = 0; i < count; ++i) devices.push_back(ReadFacts(i));
  return devices;
}

DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }

DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  if (this == &other) return *this;
  Free();
  data_ = std::exchange(other.data_, nullptr);
  size_ = std::exchange(other.size_, 0);
  device_ = other.device_;
  pinned_ = other.pinned_;
  return *this;
}

DeviceMemory::~DeviceMemory() { Free(); }

void DeviceMemory::Free() {
  if (data_ == nullptr) return;
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(device_);
  // A lost device or a driver that is shutting down frees it with the process.
  if (pinned_) {
    cudaFreeHost(data_);
  } else {
    cudaFree(data_);
  }
  cudaSetDevice(before);
  cudaGetLastError();
  data_ = nullptr;
  size_ = 0;
}

DeviceEvent::DeviceEvent(DeviceEvent&& other) noexcept
    : handle_(std::exchange(other.handle_, nullptr)) {}

DeviceEvent& DeviceEvent::operator=(DeviceEvent&& other) noexcept {
  std::swap(handle_, other.handle_);
  return *this;
}

DeviceEvent::~DeviceEvent() {
  if (handle_ != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(handle_));
}

absl::StatusOr<std::unique_ptr<Device>> Device::Open(int ordinal) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    cudaGetLastError();
    return NotSupportedError("no CUDA device can be used: ",
                             error == cudaSuccess ? "none is there" : cudaGetErrorString(error));
  }
  if (ordinal < 0 || ordinal >= count) return OutOfRangeError("device", ordinal, 0, count - 1);
  std::unique_ptr<Device> device(new Device);
  device->ordinal_ = ordinal;
  VATTN_RETURN_IF_ERROR(device->Activate());
  device->facts_ = ReadFacts(ordinal);
  if (device->facts_.compute_major < 8) {
    return NotSupportedError("device ", ordinal, " (", device->facts_.name,
                             ") has compute capability ", device->facts_.compute_major, ".",
                             device->facts_.compute_minor, ", must have 8.0 or more");
  }
  for (DeviceStream* made : {&device->stream_, &device->copy_stream_}) {
    cudaStream_t stream;
    VATTN_RETURN_IF_ERROR(device->Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking),
                                        "creating a stream"));
    *made = stream;
  }
  return device;
}

Device::~Device() {
  cudaSetDevice(ordinal_);
  for (const Piece& piece : registered_) cudaHostUnregister(piece.begin);
  for (const DeviceStream stream : {stream_, copy_stream_}) {
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
  cudaGetLastError();
}

absl::Status Device::Activate() {
  if (lost())
    return DeviceLostError("device ", ordinal_,
                           " failed earlier; sequences can be saved, nothing else");
  return Check(cudaSetDevice(ordinal_), "choosing the device");
}

void Device::Unregister(std::byte* base, uint64_t bytes) {
  if (!Activate().ok()) return;
  const std::lock_guard<std::mutex> lock(registered_mutex_);
  std::erase_if(registered_, [&](const Piece& piece) {
    if (piece.begin < base || piece.begin >= base + bytes) return false;
    cudaHostUnregister(piece.begin);
    return true;
  });
  cudaGetLastError();
}

absl::StatusOr<std::byte*> Device::Register(std::byte* base, uint64_t bytes, uint64_t unit) {
  VATTN_RETURN_IF_ERROR(Activate());
  std::byte* mapped = nullptr;
  const uint64_t whole = std::lcm(unit, kHostPageBytes),
                 most = std::max(kRegisterChunk / whole, uint64_t{1}) * whole;
  for (uint64_t at = 0; at < bytes; at += most) {
    const uint64_t size = std::min(most, bytes - at);
    const cudaError_t error =
        cudaHostRegister(base + at, size, cudaHostRegisterMapped | cudaHostRegisterPortable);
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      return OutOfMemoryError("a host pool of ", bytes,
                              " bytes is to be pinned, and the system would pin only ", at,
                              " bytes of them");
    }
    VATTN_RETURN_IF_ERROR(Check(error, "pinning the host pool"));
    {
      const std::lock_guard<std::mutex> lock(registered_mutex_);
      registered_.push_back({base + at, base + at + size});
    }
    void* device = nullptr;
    VATTN_RETURN_IF_ERROR(
        Check(cudaHostGetDevicePointer(&device, base + at, 0), "mapping the host pool"));
    if (at == 0) mapped = static_cast<std::byte*>(device);
    if (static_cast<std::byte*>(device) != mapped + at) {
      return NotSupportedError("device ", ordinal_, " does not map host memory in one piece");
    }
  }
  return mapped;
}

absl::StatusOr<DeviceMemory> Device::Allocate(uint64_t bytes) {
  VATTN_RETURN_IF_ERROR(Activate());
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, std::max<uint64_t>(bytes, 256));
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    return OutOfMemoryError("device ", ordinal_, " has no ", bytes, " bytes left: ", free, " of ",
                            total, " are free");
  }
  VATTN_RETURN_IF_ERROR(Check(error, "allocating device memory"));
  return DeviceMemory(static_cast<std::byte*>(data), bytes, ordinal_, false);
}

absl::StatusOr<DeviceMemory> Device::AllocatePinned(uint64_t bytes) {
  VATTN_RETURN_IF_ERROR(Activate());
  void* data = nullptr;
  const cudaError_t error =
      cudaHostAlloc(&data, std::max<uint64_t>(bytes, 256), cudaHostAllocPortable);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return OutOfMemoryError("the system has no ", bytes, " bytes of pinned memory left");
  }
  VATTN_RETURN_IF_ERROR(Check(error, "allocating pinned memory"));
  return DeviceMemory(static_cast<std::byte*>(data), bytes, ordinal_, true);
}

absl::Status Device::Copy(void* to, const void* from, uint64_t bytes, DeviceStream stream) {
  if (bytes == 0) return absl::OkStatus();
  return Check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream), "copying");
}

absl::Status Device::Fill(void* to, int byte, uint64_t bytes, DeviceStream stream) {
  if (bytes == 0) return absl::OkStatus();
  return Check(cudaMemsetAsync(to, byte, bytes, stream), "filling memory");
}

absl::Status Device::CopyPieces(std::byte* to, const std::byte* from, uint64_t pitch,
                                uint64_t bytes, int64_t count, DeviceStream stream) {
  const std::lock_guard<std::mutex> lock(registered_mutex_);
  while (count > 0) {
    const auto piece = std::find_if(registered_.begin(), registered_.end(), [&](const Piece& p) {
      return from >= p.begin && from < p.end;
    });
    // So many lie in one registration.
    int64_t here = count;
    if (piece != registered_.end() && pitch > 0) {
      const uint64_t left = static_cast<uint64_t>(piece->end - from);
      here = std::min<int64_t>(count, static_cast<int64_t>((left - 1) / pitch) + 1);
    }
    VATTN_RETURN_IF_ERROR(
        Check(cudaMemcpy2DAsync(to, bytes, from, here == 1 ? bytes : pitch, bytes,
                                static_cast<size_t>(here), cudaMemcpyDefault, stream),
              "copying pieces"));
    to += static_cast<uint64_t>(here) * bytes;
    from += static_cast<uint64_t>(here) * pitch;
    count -= here;
  }
  return absl::OkStatus();
}

absl::Status Device::Record(DeviceEvent& event, DeviceStream stream) {
  if (event.handle_ == nullptr) {
    cudaEvent_t made;
    VATTN_RETURN_IF_ERROR(
        Check(cudaEventCreateWithFlags(&made, cudaEventDisableTiming), "creating an event"));
    event.handle_ = made;
  }
  return Check(cudaEventRecord(static_cast<cudaEvent_t>(event.handle_), stream),
               "recording an event");
}

absl::Status Device::Wait(const DeviceEvent& event) {
  if (event.handle_ == nullptr) return absl::OkStatus();
  return Check(cudaEventSynchronize(static_cast<cudaEvent_t>(event.handle_)),
               "waiting for an event");
}

absl::Status Device::Follow(DeviceStream stream, const DeviceEvent& event) {
  if (event.handle_ == nullptr) return absl::OkStatus();
  return Check(cudaStreamWaitEvent(stream, static_cast<cudaEvent_t>(event.handle_), 0),
               "letting a stream wait for an event");
}

absl::Status Device::Synchronize(DeviceStream stream) {
  return Check(cudaStreamSynchronize(stream), "waiting for a stream");
}

absl::Status Device::SynchronizeAll() {
  return Check(cudaDeviceSynchronize(), "waiting for the device");
}

bool Device::CanFollow(const void* pointer) const {
  cudaPointerAttributes attributes;
  if (cudaPointerGetAttributes(&attributes, pointer) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  if (attributes.type != cudaMemoryTypeHost) return attributes.type != cudaMemoryTypeUnregistered;
  // Pages are pinned whole. What else lies in the first or last page of memory that we pinned is no
  // array that a kernel can follow to its end.
  const std::byte* const at = static_cast<const std::byte*>(pointer);
  const auto page_of = [](const std::byte* address) {
    return reinterpret_cast<uintptr_t>(address) / kHostPageBytes;
  };
  const std::lock_guard<std::mutex> lock(registered_mutex_);
  bool beside = false;
  for (const Piece& piece : registered_) {
    if (at >= piece.begin && at < piece.end) return true;
    beside |= page_of(at) == page_of(piece.begin) || page_of(at) == page_of(piece.end - 1);
  }
  return !beside;
}

absl::Status Device::Check(int error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  const cudaError_t code = static_cast<cudaError_t>(error);
  cudaGetLastError();
  if (IsFinal(code)) {
    lost_.store(true, std::memory_order_relaxed);
    return DeviceLostError("device ", ordinal_, " failed in ", what, ": ",
                           cudaGetErrorString(code));
  }
  return DeviceError("device ", ordinal_, " failed in ", what, ": ", cudaGetErrorString(code));
}

}  // namespace vattn
