#include "memory/transfer_queue.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <mutex>
#include <utility>

#include "memory/status.h"

namespace vattn {
namespace {

constexpr int kMostAgain = 1000;

// Memory that a transfer may still be touching: never freed.
void KeepForEver(VirtualRange memory) {
  static std::mutex* const mutex = new std::mutex;
  static std::vector<VirtualRange>* const kept = new std::vector<VirtualRange>;
  const std::lock_guard<std::mutex> lock(*mutex);
  kept->push_back(std::move(memory));
}

}  // namespace

absl::StatusOr<std::unique_ptr<TransferQueue>> TransferQueue::Create(int fd, uint64_t total_bytes,
                                                                     const IoOptions& io) {
  if (io.depth < 1 || io.depth > 256) return OutOfRangeError("io_depth", io.depth, 1, 256);
  constexpr uint32_t kMostBytes = uint32_t{1} << 28;
  if (io.block_bytes < kIoAlignment || io.block_bytes > kMostBytes ||
      io.block_bytes % kIoAlignment != 0) {
    return InvalidArgumentError("io_block_bytes is ", io.block_bytes, ", must be a multiple of ",
                                kIoAlignment, " from ", kIoAlignment, " to ", kMostBytes);
  }
  uint64_t block = io.block_bytes, depth = io.depth;
  if (total_bytes > 0 && total_bytes < block * depth) {
    block = std::min(block, (total_bytes + kIoAlignment - 1) / kIoAlignment * kIoAlignment);
    depth = std::min(depth, (total_bytes + block - 1) / block);
  }
  const uint64_t buffers = depth + 1;
  // A page shared with a forked child would be copied by the first write, away from the device.
  absl::StatusOr<VirtualRange> memory =
      VirtualRange::Reserve(block * buffers, {.dont_fork = true, .ops = io.memory_ops});
  if (!memory.ok()) return memory.status();
  std::unique_ptr<TransferQueue> queue(
      new TransferQueue(fd, io, *std::move(memory), static_cast<int>(buffers), block));
  queue->direct_ = io.direct && queue->ops_.set_direct(fd, true) == 0;
  // A file that stays O_NONBLOCK works as well, at times slower.
  if (!queue->direct_) (void)queue->ops_.set_direct(fd, false);
  if (io.uring) queue->OpenRing();
  return queue;
}

TransferQueue::TransferQueue(int fd, const IoOptions& io, VirtualRange memory, int buffers,
                             size_t block_bytes)
    : fd_(fd),
      ops_(*io.ops),
      timeout_ms_(io.timeout_ms),
      block_bytes_(block_bytes),
      memory_(std::move(memory)),
      slots_(static_cast<size_t>(buffers)) {}

TransferQueue::~TransferQueue() {
  FinishAll();
  if (ring_ != nullptr) ops_.ring_close(ring_);
  if (abandoned_ != 0) KeepForEver(std::move(memory_));
}

void TransferQueue::OpenRing() {
  const unsigned buffers = static_cast<unsigned>(slots_.size());
  if (ops_.ring_open(buffers, &ring_) != 0) {
    ring_ = nullptr;
    return;
  }
  ring_works_ = true;
  // Both are savings only; pinned memory in particular has a low limit in many places.
  (void)ops_.ring_register_buffers(ring_, memory_.data(), block_bytes_, buffers);
  (void)ops_.ring_register_file(ring_, fd_);
}

void TransferQueue::Start(int i, bool write, uint64_t offset, size_t bytes) {
  slots_[static_cast<size_t>(i)] = {.write = write,
                                    .under_way = abandoned_ == 0,
                                    .offset = offset,
                                    .bytes = bytes,
                                    .error = abandoned_};
  if (abandoned_ == 0) Continue(i);
}

ssize_t TransferQueue::MoveNow(int i) {
  const Slot& slot = slots_[static_cast<size_t>(i)];
  std::byte* data = buffer(i) + slot.moved;
  const size_t bytes = slot.bytes - slot.moved;
  const off_t at = static_cast<off_t>(slot.offset + slot.moved);
  const ssize_t moved =
      slot.write ? ops_.pwrite(fd_, data, bytes, at) : ops_.pread(fd_, data, bytes, at);
  return moved < 0 ? -errno : moved;
}

void TransferQueue::Continue(int i) {
  do {
    const Slot& slot = slots_[static_cast<size_t>(i)];
    if (ring_works_) {
      const RingTransfer rest = {.write = slot.write,
                                 .fd = fd_,
                                 .data = buffer(i) + slot.moved,
                                 .bytes = slot.bytes - slot.moved,
                                 .offset = slot.offset + slot.moved,
                                 .buffer = static_cast<unsigned>(i)};
      if (UntilNotInterrupted([&] { return ops_.ring_submit(ring_, rest); }) == 0) return;
      ring_works_ = false;  // what it refuses is moved here, what it has will be waited for
    }
  } while (!TakeIn(i, MoveNow(i)));
}

bool TransferQueue::TakeIn(int i, int64_t result) {
  Slot& slot = slots_[static_cast<size_t>(i)];
  const auto end = [&](int error) {
    slot.error = error;
    slot.under_way = false;
    return true;
  };
  if (result > 0) {
    slot.moved += static_cast<size_t>(result);
    slot.again = 0;
    return slot.moved < slot.bytes ? false : end(0);
  }
  // A file ends a read; a write of nothing is what no regular file does.
  if (result == 0) return end(slot.write ? EIO : 0);
  const int error = static_cast<int>(-result);
  if ((error == EINTR || error == EAGAIN) && ++slot.again < kMostAgain) return false;
  if (error == EINVAL && !slot.was_refused) {
    // Refused as direct: a file system that only pretends, a coarser device, or an odd end of file.
    slot.was_refused = true;
    direct_ = false;
    if (ops_.set_direct(fd_, false) == 0) return false;
  }
  return end(error);
}

void TransferQueue::WaitForOne() {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point deadline = Clock::now() + std::chrono::milliseconds(timeout_ms_);
  for (;;) {
    const int64_t left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    if (left <= 0) return Abandon(ETIMEDOUT);
    RingDone done;
    if (ops_.ring_wait(ring_, static_cast<int>(left), &done) == 0) {
      const size_t i = done.buffer;
      // The ring tells of what it was given, once.
      if (i >= slots_.size() || !slots_[i].under_way) return Abandon(EIO);
      if (!TakeIn(static_cast<int>(i), done.result)) Continue(static_cast<int>(i));
      return;
    }
    if (errno == ETIME) return Abandon(ETIMEDOUT);
    if (errno != EINTR && errno != EAGAIN) return Abandon(errno);
  }
}

void TransferQueue::Abandon(int error) {
  abandoned_ = error;
  for (Slot& slot : slots_) {
    if (!slot.under_way) continue;
    slot.error = error;
    slot.under_way = false;
  }
  ops_.ring_close(std::exchange(ring_, nullptr));
  ring_works_ = false;
}

int TransferQueue::Finish(int i, size_t* moved) {
  const Slot& slot = slots_[static_cast<size_t>(i)];
  while (slot.under_way) WaitForOne();
  if (moved != nullptr) *moved = slot.moved;
  return slot.error;
}

int TransferQueue::FinishAll() {
  int error = 0;
  for (int i = 0; i < num_buffers(); ++i) {
    const int ended = Finish(i);
    if (ended != 0) error = ended;
  }
  return error;
}

}  // namespace vattn
