// Transfers by io_uring.
#include "memory/ring.h"

#include <liburing.h>
#include <sys/uio.h>

#include <cerrno>
#include <memory>
#include <vector>

namespace vattn {
namespace {

// Marks a slot of the submission queue whose transfer was taken back.
constexpr uint64_t kTakenBack = ~uint64_t{0};

// liburing answers 0 or more, or -errno.
int Answer(int result) {
  if (result >= 0) return 0;
  errno = -result;
  return -1;
}

}  // namespace

struct Ring {
  io_uring uring;
  bool has_buffers = false, has_file = false;
};

int OpenRing(unsigned entries, Ring** out) {
  auto ring = std::make_unique<Ring>();
  if (Answer(io_uring_queue_init(entries, &ring->uring, 0)) != 0) return -1;
  *out = ring.release();
  return 0;
}

void CloseRing(Ring* ring) {
  io_uring_queue_exit(&ring->uring);
  delete ring;
}

int RegisterBuffers(Ring* ring, std::byte* memory, size_t bytes_each, unsigned count) {
  std::vector<iovec> buffers;
  for (unsigned i = 0; i < count; ++i) buffers.push_back({memory + i * bytes_each, bytes_each});
  if (Answer(io_uring_register_buffers(&ring->uring, buffers.data(), count)) != 0) return -1;
  ring->has_buffers = true;
  return 0;
}

int RegisterFile(Ring* ring, int fd) {
  if (Answer(io_uring_register_files(&ring->uring, &fd, 1)) != 0) return -1;
  ring->has_file = true;
  return 0;
}

int SubmitTransfer(Ring* ring, const RingTransfer& t) {
  io_uring_sqe* entry = io_uring_get_sqe(&ring->uring);
  if (entry == nullptr) {
    errno = EBUSY;
    return -1;
  }
  const int fd = ring->has_file ? 0 : t.fd;
  const unsigned bytes = static_cast<unsigned>(t.bytes);
  const int buffer = static_cast<int>(t.buffer);
  if (ring->has_buffers && t.write) {
    io_uring_prep_write_fixed(entry, fd, t.data, bytes, t.offset, buffer);
  } else if (ring->has_buffers) {
    io_uring_prep_read_fixed(entry, fd, t.data, bytes, t.offset, buffer);
  } else if (t.write) {
    io_uring_prep_write(entry, fd, t.data, bytes, t.offset);
  } else {
    io_uring_prep_read(entry, fd, t.data, bytes, t.offset);
  }
  if (ring->has_file) io_uring_sqe_set_flags(entry, IOSQE_FIXED_FILE);
  entry->user_data = t.buffer;
  const int submitted = io_uring_submit(&ring->uring);
  if (submitted >= 0 && io_uring_sq_ready(&ring->uring) == 0) return 0;
  // The entry stays in the queue and goes out with a later one: then it must do nothing, for its
  // buffer will hold something else.
  io_uring_prep_nop(entry);
  entry->user_data = kTakenBack;
  return Answer(submitted < 0 ? submitted : -EAGAIN);
}

int WaitTransfer(Ring* ring, int timeout_ms, RingDone* done) {
  __kernel_timespec limit = {.tv_sec = timeout_ms / 1000, .tv_nsec = timeout_ms % 1000 * 1000000ll};
  for (;;) {
    io_uring_cqe* entry = nullptr;
    if (Answer(io_uring_wait_cqe_timeout(&ring->uring, &entry, &limit)) != 0) return -1;
    const uint64_t which = entry->user_data;
    *done = {.buffer = static_cast<unsigned>(which), .result = entry->res};
    io_uring_cqe_seen(&ring->uring, entry);
    if (which != kTakenBack) return 0;
  }
}

}  // namespace vattn
