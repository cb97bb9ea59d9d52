// Asynchronous transfers of the system: io_uring (ring_uring.cc), or none (ring_none.cc), where
// OpenRing fails with ENOSYS. These are entries of FileOps; transfer_queue.h is how they are used.
//
// Each function makes at most one system call and behaves like one: -1 and errno on failure.
#ifndef VATTN_MEMORY_RING_H_
#define VATTN_MEMORY_RING_H_

#include <cstddef>
#include <cstdint>

namespace vattn {

struct Ring;

// Between a buffer and a file.
struct RingTransfer {
  bool write;
  int fd;
  std::byte* data;
  size_t bytes;
  uint64_t offset;
  unsigned buffer;  // number of the registered buffer that data lies in
};

struct RingDone {
  unsigned buffer;
  int32_t result;  // bytes moved, or -errno
};

// Room for `entries` transfers under way.
int OpenRing(unsigned entries, Ring** out);
// Transfers under way are cancelled or end by themselves; nothing waits for them.
void CloseRing(Ring* ring);

// `count` buffers one after the other. Pins their pages, which counts against RLIMIT_MEMLOCK.
// Without it transfers name plain memory.
int RegisterBuffers(Ring* ring, std::byte* memory, size_t bytes_each, unsigned count);
// Without it transfers name the descriptor.
int RegisterFile(Ring* ring, int fd);

// Hands one transfer to the system; after a failure it is not under way and never will be.
int SubmitTransfer(Ring* ring, const RingTransfer& transfer);
// Waits for one transfer to end. ETIME: none did within timeout_ms.
int WaitTransfer(Ring* ring, int timeout_ms, RingDone* done);

}  // namespace vattn

#endif  // VATTN_MEMORY_RING_H_
