// A device made of queues, in the place of memory/device_cuda.cc and kernels/cuda: what is enqueued
// on a stream runs later, in the order of its stream and in no order beside the other streams, as a
// seed decides. What a caller may count on is what CUDA promises, and no more: Synchronize and Wait
// bring a stream up to date, memory that is neither pinned nor the device's own is read before Copy
// returns, and freeing memory waits for everything.
//
// Operations are those of kernels/cuda/launch.h (simulated_launch.cc) and run whole. Attention is
// exact and is read through the device's own tables, ring, hot set, codes and controller states:
// any of them that is stale, or a buffer that was used again too early, changes the answer.
#ifndef VATTN_TESTS_RUNTIME_SIMULATED_DEVICE_H_
#define VATTN_TESTS_RUNTIME_SIMULATED_DEVICE_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "memory/device.h"

namespace vattn::test {

constexpr uint64_t kSimulatedPageBytes = 4096;

// What attention writes into the arrays of a call beside its answer: a number that says which array
// and which entry of it this is.
enum class Reported { kVerdict = 1, kSelected, kFetched, kLooks, kMiddle };
constexpr int32_t ReportOf(Reported array, int64_t place) {
  return static_cast<int32_t>(array) * 1000 + static_cast<int32_t>(place);
}

// What the device leaves out, to show that somebody notices.
enum class Lacks { kNothing, kEventWaits, kSynchronizeAll, kPageFills };

// The device of this process while it lives; one at a time. Used by one thread.
class Simulation {
 public:
  explicit Simulation(uint64_t seed, Lacks lacks = Lacks::kNothing);
  ~Simulation();
  static Simulation& Current();

  DeviceStream NewStream();
  void Enqueue(DeviceStream stream, std::function<void()> operation);
  // Between them operations are collected in place of being enqueued, as in the capture of a graph.
  void BeginCapture() { capturing_ = true; }
  std::vector<std::function<void()>> EndCapture();
  // Until everything on the stream, or on all of them, has run.
  void Drain(DeviceStream stream);
  void DrainAll();
  // A place in a stream.
  uint64_t Enqueued(DeviceStream stream) const { return Of(stream).enqueued; }
  void RunUntil(DeviceStream stream, uint64_t place);
  // The same and nothing beside it: part of an operation of another stream, which waits for it.
  void Finish(DeviceStream stream, uint64_t place);

  Lacks lacks() const { return lacks_; }
  // True for memory that an operation can use; freed memory and reserved addresses without a page
  // are a fault, after which a device would be lost.
  bool Reaches(const void* pointer, uint64_t bytes);
  int64_t faults() const { return faults_; }

  void AddMemory(const void* base, uint64_t bytes) { memory_[Number(base)] = bytes; }
  void RemoveMemory(const void* base) { memory_.erase(Number(base)); }
  bool IsFollowed(const void* pointer) const { return Holds(memory_, pointer) || IsPaged(pointer); }
  // True in reserved addresses.
  bool IsPaged(const void* pointer) const { return Holds(addresses_, pointer); }
  void AddPage(const std::byte* at) { pages_.insert(Number(at)); }
  void RemovePage(const std::byte* at) { pages_.erase(Number(at)); }
  void AddAddresses(const std::byte* base, uint64_t bytes) { addresses_[Number(base)] = bytes; }
  void RemoveAddresses(const std::byte* base) { addresses_.erase(Number(base)); }

 private:
  struct Queue {
    std::deque<std::function<void()>> waiting;
    uint64_t enqueued = 0, done = 0;
  };
  static uintptr_t Number(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }
  static bool Holds(const std::map<uintptr_t, uint64_t>& ranges, const void* pointer);
  const Queue& Of(DeviceStream stream) const { return queues_.at(Number(stream) - 1); }
  // Runs the next operation of a stream, or of one that has any.
  void RunOne(size_t stream);
  void RunAny();
  // As many operations as the seed says.
  void Advance();

  const Lacks lacks_;
  std::mt19937_64 random_;
  double eagerness_;           // probability that one more operation runs at a call
  std::vector<Queue> queues_;  // stream n is n - 1 here
  std::map<uintptr_t, uint64_t> memory_, addresses_;
  std::set<uintptr_t> pages_;
  int64_t faults_ = 0;
  bool capturing_ = false;
  std::vector<std::function<void()>> captured_;
};

}  // namespace vattn::test

#endif  // VATTN_TESTS_RUNTIME_SIMULATED_DEVICE_H_
