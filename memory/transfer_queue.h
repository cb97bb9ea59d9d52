// Transfers between a few buffers and one file, several under way at a time: by io_uring with
// registered buffers and file, or by pread and pwrite where it is not to be had; past the page
// cache (O_DIRECT) where the file system allows it.
#ifndef VATTN_MEMORY_TRANSFER_QUEUE_H_
#define VATTN_MEMORY_TRANSFER_QUEUE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "memory/file_ops.h"
#include "memory/virtual_range.h"

namespace vattn {

// Offsets, sizes and buffers that O_DIRECT takes on all common devices.
inline constexpr uint64_t kIoAlignment = 4096;

struct IoOptions {
  const FileOps* ops = &kSystemFileOps;  // outlives everything that uses it, as do memory_ops
  const MemoryOps* memory_ops = &kSystemMemoryOps;
  bool uring = true;               // false: pread and pwrite
  bool direct = true;              // false: through the page cache
  uint32_t depth = 8;              // transfers under way at most, 1 to 256
  uint32_t block_bytes = 1 << 20;  // of a transfer at most; a multiple of kIoAlignment
  int timeout_ms = 60000;          // longest wait for io_uring to finish any transfer
};

// Nothing here waits for ever, but for a pread or pwrite that the kernel does not end. A transfer
// that did not end in time fails with ETIMEDOUT; as the system may still touch its buffer, the
// memory of that queue then stays with the process.
//
// One thread at a time. An error of a transfer is told by the Finish of its buffer.
class TransferQueue {
 public:
  // The file stays the caller's and open. total_bytes: as much as will be moved, 0 if unknown;
  // spares buffers.
  static absl::StatusOr<std::unique_ptr<TransferQueue>> Create(int fd, uint64_t total_bytes,
                                                               const IoOptions& io);
  // Waits for what is under way.
  ~TransferQueue();

  TransferQueue(const TransferQueue&) = delete;
  TransferQueue& operator=(const TransferQueue&) = delete;

  // One more than depth, so that as many transfers are under way while one buffer is worked on; at
  // least 2.
  int num_buffers() const { return static_cast<int>(slots_.size()); }
  size_t block_bytes() const { return block_bytes_; }
  std::byte* buffer(int i) const { return memory_.data() + static_cast<size_t>(i) * block_bytes_; }

  // Moves the first `bytes` of buffer i, which nothing else uses until Finish(i). Multiples of
  // kIoAlignment stay direct.
  void Start(int i, bool write, uint64_t offset, size_t bytes);
  // Waits until buffer i is free: 0, or the errno that ended its transfer. *moved (may be null) is
  // less than was asked for when the file ended.
  int Finish(int i, size_t* moved = nullptr);
  // All of them: 0, or an errno that one of them ended with.
  int FinishAll();

  bool uses_uring() const { return ring_ != nullptr; }
  bool uses_direct() const { return direct_; }

 private:
  struct Slot {
    bool write = false, under_way = false;
    uint64_t offset = 0;
    size_t bytes = 0, moved = 0;
    int error = 0;
    int again = 0;             // times in a row that the system moved nothing and is asked again
    bool was_refused = false;  // as direct
  };

  TransferQueue(int fd, const IoOptions& io, VirtualRange memory, int buffers, size_t block_bytes);

  void OpenRing();
  // Hands the rest of slot i to the ring, or moves it here.
  void Continue(int i);
  ssize_t MoveNow(int i);
  // Takes in that a transfer moved `result` bytes or failed (-errno). False: its slot goes on.
  bool TakeIn(int i, int64_t result);
  void WaitForOne();
  // Everything under way, and all that is started later, fails with `error`.
  void Abandon(int error);

  const int fd_;
  const FileOps& ops_;
  const int timeout_ms_;
  const size_t block_bytes_;
  VirtualRange memory_;
  std::vector<Slot> slots_;
  Ring* ring_ = nullptr;
  bool ring_works_ = false;  // false with a ring: nothing new is handed to it
  bool direct_ = false;
  int abandoned_ = 0;  // the errno that everything fails with from then on
};

}  // namespace vattn

#endif  // VATTN_MEMORY_TRANSFER_QUEUE_H_
