// A CUDA device as bytes: memory on it, host memory that it can follow, copies. The one place in
// memory that knows CUDA is device_cuda.cc; a build without CUDA has device_none.cc, where Open
// says so.
#ifndef VATTN_MEMORY_DEVICE_H_
#define VATTN_MEMORY_DEVICE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

struct CUstream_st;  // what cudaStream_t points to

namespace vattn {

struct DeviceFacts {
  std::string name;
  int32_t compute_major = 0, compute_minor = 0;
  int32_t multiprocessors = 0;
  uint64_t memory_bytes = 0;
  int32_t l2_bytes = 0;
  int32_t driver = 0, runtime = 0;  // CUDA versions, 13000 for 13.0
};

// False in a build without CUDA.
bool BuiltWithCuda();

// Devices that this process may use; empty without CUDA, a driver or a device.
std::vector<DeviceFacts> ListDevices();

// A cudaStream_t; null: the default stream of CUDA, or none.
using DeviceStream = CUstream_st*;

// Move-only owner of memory on a device, or of pinned host memory that it can follow.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(DeviceMemory&& other) noexcept;
  DeviceMemory& operator=(DeviceMemory&& other) noexcept;
  ~DeviceMemory();

  std::byte* data() const { return data_; }
  uint64_t size() const { return size_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  friend class Device;
  DeviceMemory(std::byte* data, uint64_t size, int device, bool pinned)
      : data_(data), size_(size), device_(device), pinned_(pinned) {}
  void Free();

  std::byte* data_ = nullptr;
  uint64_t size_ = 0;
  [[maybe_unused]] int device_ = 0;  // Only a build with CUDA frees anything.
  [[maybe_unused]] bool pinned_ = false;
};

// Marks a place in a stream.
class DeviceEvent {
 public:
  DeviceEvent() = default;
  DeviceEvent(DeviceEvent&& other) noexcept;
  DeviceEvent& operator=(DeviceEvent&& other) noexcept;
  ~DeviceEvent();

 private:
  friend class Device;
  void* handle_ = nullptr;
};

// Thread-safe. After an error that the device does not recover from (a failed kernel, a lost
// device) every call answers DEVICE_LOST; memory may still be freed.
class Device {
 public:
  // NOT_SUPPORTED without CUDA in this build, a driver, or such a device.
  static absl::StatusOr<std::unique_ptr<Device>> Open(int ordinal);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  int ordinal() const { return ordinal_; }
  const DeviceFacts& facts() const { return facts_; }
  // A stream of the device's own, for calls that come without one.
  DeviceStream stream() const { return stream_; }
  // A second one, for copies beside what that one works on.
  DeviceStream copy_stream() const { return copy_stream_; }

  // Makes the device the calling thread's own. First in every call that reaches CUDA.
  absl::Status Activate();

  // Lets the device follow [base, base + bytes); returns its address there. Pins every page. Drivers
  // take it in pieces, and no copy may cross the end of one: they end where a unit of so many bytes
  // does.
  absl::StatusOr<std::byte*> Register(std::byte* base, uint64_t bytes, uint64_t unit);
  // Takes that back; no work that follows the memory may be under way. Without it, it lasts as long as
  // the device's owner.
  void Unregister(std::byte* base, uint64_t bytes);

  absl::StatusOr<DeviceMemory> Allocate(uint64_t bytes);
  absl::StatusOr<DeviceMemory> AllocatePinned(uint64_t bytes);

  // Enqueued; host memory that is not pinned is copied before the call returns.
  absl::Status Copy(void* to, const void* from, uint64_t bytes, DeviceStream stream);
  absl::Status Fill(void* to, int byte, uint64_t bytes, DeviceStream stream);
  // Copies `count` pieces of `bytes` from registered memory, each in a unit of its own and `pitch`
  // bytes, less than 2 GiB, behind the one before, to device memory where they follow each other.
  absl::Status CopyPieces(std::byte* to, const std::byte* from, uint64_t pitch, uint64_t bytes,
                          int64_t count, DeviceStream stream);

  absl::Status Record(DeviceEvent& event, DeviceStream stream);
  // Blocks until the device has passed the event; at once if it was never recorded.
  absl::Status Wait(const DeviceEvent& event);
  // What is enqueued on the stream from now on begins when the device has passed the event.
  absl::Status Follow(DeviceStream stream, const DeviceEvent& event);
  absl::Status Synchronize(DeviceStream stream);
  // Everything on the device.
  absl::Status SynchronizeAll();

  // True for memory that kernels can follow: on a device, managed, or pinned.
  bool CanFollow(const void* pointer) const;

  // The status of a cudaError_t; `what` was tried. Notes whether the device is lost.
  absl::Status Check(int error, const char* what);
  bool lost() const { return lost_.load(std::memory_order_relaxed); }

 private:
  Device() = default;

  int ordinal_ = 0;
  DeviceFacts facts_;
  DeviceStream stream_ = nullptr, copy_stream_ = nullptr;
  struct Piece {
    std::byte* begin;
    std::byte* end;
  };
  mutable std::mutex registered_mutex_;
  std::vector<Piece> registered_;  // in the order of addresses, of each Register
  std::atomic<bool> lost_{false};
};

}  // namespace vattn

#endif  // VATTN_MEMORY_DEVICE_H_
