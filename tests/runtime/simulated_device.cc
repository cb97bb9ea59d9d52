#include "tests/runtime/simulated_device.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#include "memory/page_ops.h"
#include "memory/status.h"
#include "tests/memory/host_pages.h"

namespace vattn::test {
namespace {

Simulation* current = nullptr;

}  // namespace

Simulation::Simulation(uint64_t seed, Lacks lacks) : lacks_(lacks), random_(seed) {
  constexpr double kEagerness[] = {0, .3, .8};
  eagerness_ = kEagerness[random_() % 3];
  current = this;
}

Simulation::~Simulation() { current = nullptr; }

Simulation& Simulation::Current() { return *current; }

DeviceStream Simulation::NewStream() {
  queues_.emplace_back();
  return reinterpret_cast<DeviceStream>(queues_.size());
}

void Simulation::RunOne(size_t stream) {
  Queue& queue = queues_[stream];
  const std::function<void()> operation = std::move(queue.waiting.front());
  queue.waiting.pop_front();
  operation();
  ++queue.done;
}

void Simulation::RunAny() {
  std::vector<size_t> ready;
  for (size_t i = 0; i < queues_.size(); ++i) {
    if (!queues_[i].waiting.empty()) ready.push_back(i);
  }
  if (!ready.empty()) RunOne(ready[random_() % ready.size()]);
}

void Simulation::Advance() {
  while (std::uniform_real_distribution<double>()(random_) < eagerness_) RunAny();
}

void Simulation::Enqueue(DeviceStream stream, std::function<void()> operation) {
  if (capturing_) {
    captured_.push_back(std::move(operation));
    return;
  }
  Queue& queue = queues_.at(Number(stream) - 1);
  queue.waiting.push_back(std::move(operation));
  ++queue.enqueued;
  Advance();
}

std::vector<std::function<void()>> Simulation::EndCapture() {
  capturing_ = false;
  return std::exchange(captured_, {});
}

void Simulation::RunUntil(DeviceStream stream, uint64_t place) {
  const size_t at = Number(stream) - 1;
  while (queues_.at(at).done < place) {
    RunOne(at);
    Advance();
  }
}

void Simulation::Finish(DeviceStream stream, uint64_t place) {
  const size_t at = Number(stream) - 1;
  while (queues_.at(at).done < place) RunOne(at);
}

void Simulation::Drain(DeviceStream stream) { RunUntil(stream, Of(stream).enqueued); }

void Simulation::DrainAll() {
  const auto left = [this] {
    for (const Queue& queue : queues_) {
      if (!queue.waiting.empty()) return true;
    }
    return false;
  };
  while (left()) RunAny();
}

bool Simulation::Holds(const std::map<uintptr_t, uint64_t>& ranges, const void* pointer) {
  auto next = ranges.upper_bound(Number(pointer));
  return next != ranges.begin() && Number(pointer) < (--next)->first + next->second;
}

bool Simulation::Reaches(const void* pointer, uint64_t bytes) {
  if (Holds(memory_, pointer)) return true;
  const uintptr_t last = (Number(pointer) + bytes - 1) / kSimulatedPageBytes;
  for (uintptr_t page = Number(pointer) / kSimulatedPageBytes; page <= last; ++page) {
    if (pages_.count(page * kSimulatedPageBytes) > 0) continue;
    ++faults_;
    return false;
  }
  return true;
}

}  // namespace vattn::test

namespace vattn {

using test::Lacks;
using test::Simulation;

constinit const PageOps kDevicePageOps = {
    .page_bytes = [](int) -> absl::StatusOr<uint64_t> { return test::kSimulatedPageBytes; },
    .reserve =
        [](uint64_t bytes) {
          absl::StatusOr<std::byte*> base = test::kHostPageOps.reserve(bytes);
          if (base.ok()) Simulation::Current().AddAddresses(*base, bytes);
          return base;
        },
    .release =
        [](std::byte* base, uint64_t bytes) {
          Simulation::Current().RemoveAddresses(base);
          test::kHostPageOps.release(base, bytes);
        },
    .create = [](int device, uint64_t bytes) { return test::kHostPageOps.create(device, bytes); },
    .destroy = [](uint64_t page) { test::kHostPageOps.destroy(page); },
    .map =
        [](int device, std::byte* at, uint64_t bytes, uint64_t page) {
          const absl::Status status = test::kHostPageOps.map(device, at, bytes, page);
          if (status.ok()) Simulation::Current().AddPage(at);
          return status;
        },
    .unmap =
        [](std::byte* at, uint64_t bytes) {
          Simulation::Current().RemovePage(at);
          return test::kHostPageOps.unmap(at, bytes);
        },
};

bool BuiltWithCuda() { return true; }

std::vector<DeviceFacts> ListDevices() {
  return {{.name = "simulated",
           .compute_major = 9,
           .compute_minor = 0,
           .multiprocessors = 4,
           .memory_bytes = uint64_t{1} << 30,
           .l2_bytes = 1 << 20,
           .driver = 13000,
           .runtime = 13000}};
}

DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  if (this == &other) return *this;
  Free();
  data_ = std::exchange(other.data_, nullptr);
  size_ = std::exchange(other.size_, 0);
  return *this;
}
DeviceMemory::~DeviceMemory() { Free(); }

void DeviceMemory::Free() {
  if (data_ == nullptr) return;
  Simulation::Current().DrainAll();
  Simulation::Current().RemoveMemory(data_);
  std::free(data_);
  data_ = nullptr;
  size_ = 0;
}

// The handle is a stream and a place in it.
using Place = std::pair<DeviceStream, uint64_t>;

DeviceEvent::DeviceEvent(DeviceEvent&& other) noexcept
    : handle_(std::exchange(other.handle_, nullptr)) {}
DeviceEvent& DeviceEvent::operator=(DeviceEvent&& other) noexcept {
  std::swap(handle_, other.handle_);
  return *this;
}
DeviceEvent::~DeviceEvent() { delete static_cast<Place*>(handle_); }

absl::StatusOr<std::unique_ptr<Device>> Device::Open(int ordinal) {
  std::unique_ptr<Device> device(new Device);
  device->ordinal_ = ordinal;
  device->facts_ = ListDevices()[0];
  device->stream_ = Simulation::Current().NewStream();
  device->copy_stream_ = Simulation::Current().NewStream();
  return device;
}

Device::~Device() {
  for (const Piece& piece : registered_) Simulation::Current().RemoveMemory(piece.begin);
}

absl::Status Device::Activate() { return absl::OkStatus(); }

absl::StatusOr<std::byte*> Device::Register(std::byte* base, uint64_t bytes, uint64_t) {
  Simulation::Current().AddMemory(base, bytes);
  registered_.push_back({base, base + bytes});
  return base;
}

void Device::Unregister(std::byte* base, uint64_t) {
  std::erase_if(registered_, [base](const Piece& piece) { return piece.begin == base; });
}

absl::StatusOr<DeviceMemory> Device::Allocate(uint64_t bytes) {
  const uint64_t room = (bytes + 255) / 256 * 256;
  std::byte* const data = static_cast<std::byte*>(std::aligned_alloc(256, room == 0 ? 256 : room));
  std::memset(data, test::kUnset, room);
  Simulation::Current().AddMemory(data, room);
  return DeviceMemory(data, bytes, ordinal_, false);
}

absl::StatusOr<DeviceMemory> Device::AllocatePinned(uint64_t bytes) { return Allocate(bytes); }

absl::Status Device::Copy(void* to, const void* from, uint64_t bytes, DeviceStream stream) {
  Simulation& s = Simulation::Current();
  std::shared_ptr<std::vector<std::byte>> staged;
  if (!s.IsFollowed(from)) {
    const std::byte* const first = static_cast<const std::byte*>(from);
    staged = std::make_shared<std::vector<std::byte>>(first, first + bytes);
  }
  s.Enqueue(stream, [&s, staged, to, from, bytes] {
    if (s.IsPaged(to) && !s.Reaches(to, bytes)) return;
    std::memcpy(to, staged ? staged->data() : from, bytes);
  });
  return absl::OkStatus();
}

absl::Status Device::Fill(void* to, int byte, uint64_t bytes, DeviceStream stream) {
  Simulation& s = Simulation::Current();
  if (s.lacks() == Lacks::kPageFills && s.IsPaged(to)) return absl::OkStatus();
  s.Enqueue(stream, [&s, to, byte, bytes] {
    if (s.Reaches(to, bytes)) std::memset(to, byte, bytes);
  });
  return absl::OkStatus();
}

absl::Status Device::CopyPieces(std::byte* to, const std::byte* from, uint64_t pitch,
                                uint64_t bytes, int64_t count, DeviceStream stream) {
  for (int64_t i = 0; i < count; ++i, to += bytes, from += pitch)
    VATTN_RETURN_IF_ERROR(Copy(to, from, bytes, stream));
  return absl::OkStatus();
}

absl::Status Device::Record(DeviceEvent& event, DeviceStream stream) {
  if (event.handle_ == nullptr) event.handle_ = new Place;
  *static_cast<Place*>(event.handle_) = {stream, Simulation::Current().Enqueued(stream)};
  return absl::OkStatus();
}

absl::Status Device::Wait(const DeviceEvent& event) {
  if (event.handle_ == nullptr || Simulation::Current().lacks() == Lacks::kEventWaits)
    return absl::OkStatus();
  const auto [stream, place] = *static_cast<Place*>(event.handle_);
  Simulation::Current().RunUntil(stream, place);
  return absl::OkStatus();
}

absl::Status Device::Follow(DeviceStream stream, const DeviceEvent& event) {
  if (event.handle_ == nullptr || Simulation::Current().lacks() == Lacks::kEventWaits)
    return absl::OkStatus();
  const auto [other, place] = *static_cast<Place*>(event.handle_);
  Simulation::Current().Enqueue(
      stream, [other = other, place = place] { Simulation::Current().Finish(other, place); });
  return absl::OkStatus();
}

absl::Status Device::Synchronize(DeviceStream stream) {
  Simulation::Current().Drain(stream);
  return absl::OkStatus();
}

absl::Status Device::SynchronizeAll() {
  if (Simulation::Current().lacks() != Lacks::kSynchronizeAll) Simulation::Current().DrainAll();
  return absl::OkStatus();
}

bool Device::CanFollow(const void* pointer) const {
  return Simulation::Current().IsFollowed(pointer);
}

absl::Status Device::Check(int error, const char* what) {
  if (error == 0) return absl::OkStatus();
  return DeviceError("the simulated device failed in ", what, ": ", error);
}

}  // namespace vattn
