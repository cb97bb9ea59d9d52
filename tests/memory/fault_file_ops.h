// A FileOps table over the system's that fails on demand. One set of faults per process.
#ifndef VATTN_TESTS_MEMORY_FAULT_FILE_OPS_H_
#define VATTN_TESTS_MEMORY_FAULT_FILE_OPS_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "memory/file_ops.h"

namespace vattn {

struct FileFaults {
  int64_t fail_at = 0;     // the call to fail, from 1; 0: none
  bool for_ever = false;   // and every call after it
  int error = 0;           // its errno
  size_t max_io = 0;       // most bytes that one transfer moves; 0: any
  bool interrupt = false;  // every other call that may is interrupted first; close always is

  std::vector<std::string> calls = {};   // names of all calls so far
  std::vector<std::string> failed = {};  // of those that were made to fail
  bool interrupted_last = false;

  bool Failed(const std::string& name) const {
    return std::find(failed.begin(), failed.end(), name) != failed.end();
  }

  bool Called(const std::string& name) const {
    return std::find(calls.begin(), calls.end(), name) != calls.end();
  }

  // Counts a call; true if it is to fail, with errno set.
  bool Fails(const char* name) {
    calls.emplace_back(name);
    const int64_t number = static_cast<int64_t>(calls.size());
    if (fail_at == 0 || number < fail_at || (number > fail_at && !for_ever)) return false;
    failed.emplace_back(name);
    errno = error;
    return true;
  }

  bool Interrupts() {
    interrupted_last = interrupt && !interrupted_last;
    if (interrupted_last) errno = EINTR;
    return interrupted_last;
  }

  size_t Limit(size_t bytes) const { return max_io == 0 ? bytes : std::min(bytes, max_io); }
};

inline FileFaults faults;

// A sync takes as long as the disk likes and changes nothing that these tests can see: they end
// processes, not machines.
inline int SyncNothing(int fd) {
  struct stat stat;
  return kSystemFileOps.fstat(fd, &stat);
}

inline constexpr FileOps kFaultFileOps = {
    .open =
        [](const char* path, int flags, mode_t mode) {
          if (faults.Fails("open") || faults.Interrupts()) return -1;
          return kSystemFileOps.open(path, flags, mode);
        },
    .pwrite = [](int fd, const void* data, size_t bytes, off_t offset) -> ssize_t {
      if (faults.Fails("pwrite") || faults.Interrupts()) return -1;
      return kSystemFileOps.pwrite(fd, data, faults.Limit(bytes), offset);
    },
    .pread = [](int fd, void* data, size_t bytes, off_t offset) -> ssize_t {
      if (faults.Fails("pread") || faults.Interrupts()) return -1;
      return kSystemFileOps.pread(fd, data, faults.Limit(bytes), offset);
    },
    .fdatasync =
        [](int fd) {
          return faults.Fails("fdatasync") || faults.Interrupts() ? -1 : SyncNothing(fd);
        },
    .fsync =
        [](int fd) { return faults.Fails("fsync") || faults.Interrupts() ? -1 : SyncNothing(fd); },
    .rename =
        [](const char* from, const char* to) {
          return faults.Fails("rename") ? -1 : kSystemFileOps.rename(from, to);
        },
    .unlink =
        [](const char* path) { return faults.Fails("unlink") ? -1 : kSystemFileOps.unlink(path); },
    .fstat =
        [](int fd, struct stat* stat) {
          return faults.Fails("fstat") ? -1 : kSystemFileOps.fstat(fd, stat);
        },
    .path_stat =
        [](const char* path, struct stat* stat) {
          return faults.Fails("stat") ? -1 : kSystemFileOps.path_stat(path, stat);
        },
    .readlink =
        [](const char* path, std::string* to) {
          return faults.Fails("readlink") ? -1 : kSystemFileOps.readlink(path, to);
        },
    .link =
        [](int fd, const char* path) {
          return faults.Fails("link") ? -1 : kSystemFileOps.link(fd, path);
        },
    .take_access =
        [](int fd, const struct stat& like) {
          return faults.Fails("take_access") ? -1 : kSystemFileOps.take_access(fd, like);
        },
    // A failing close lets go of the descriptor all the same, as Linux does.
    .close =
        [](int fd) {
          EXPECT_EQ(kSystemFileOps.close(fd), 0) << "closed twice: " << std::strerror(errno);
          if (faults.Fails("close")) return -1;
          if (!faults.interrupt) return 0;
          errno = EINTR;
          return -1;
        },
    .set_direct =
        [](int fd, bool on) {
          return faults.Fails("set_direct") ? -1 : kSystemFileOps.set_direct(fd, on);
        },
    .fallocate =
        [](int fd, off_t bytes) {
          if (faults.Fails("fallocate") || faults.Interrupts()) return -1;
          return kSystemFileOps.fallocate(fd, bytes);
        },
    .ftruncate =
        [](int fd, off_t bytes) {
          if (faults.Fails("ftruncate") || faults.Interrupts()) return -1;
          return kSystemFileOps.ftruncate(fd, bytes);
        },
    .flock = [](int fd) { return faults.Fails("flock") ? -1 : kSystemFileOps.flock(fd); },
    .unlock = [](int fd) { return faults.Fails("unlock") ? -1 : kSystemFileOps.unlock(fd); },
    .mkdir =
        [](const char* path, mode_t mode) {
          return faults.Fails("mkdir") ? -1 : kSystemFileOps.mkdir(path, mode);
        },
    .list =
        [](const char* path, std::vector<std::string>* names) {
          return faults.Fails("list") ? -1 : kSystemFileOps.list(path, names);
        },
    .ring_open =
        [](unsigned entries, Ring** out) {
          return faults.Fails("ring_open") ? -1 : kSystemFileOps.ring_open(entries, out);
        },
    .ring_register_buffers =
        [](Ring* ring, std::byte* memory, size_t bytes_each, unsigned count) {
          if (faults.Fails("ring_register_buffers")) return -1;
          return kSystemFileOps.ring_register_buffers(ring, memory, bytes_each, count);
        },
    .ring_register_file =
        [](Ring* ring, int fd) {
          if (faults.Fails("ring_register_file")) return -1;
          return kSystemFileOps.ring_register_file(ring, fd);
        },
    .ring_submit =
        [](Ring* ring, const RingTransfer& transfer) {
          if (faults.Fails("ring_submit") || faults.Interrupts()) return -1;
          RingTransfer shorter = transfer;
          shorter.bytes = faults.Limit(transfer.bytes);
          return kSystemFileOps.ring_submit(ring, shorter);
        },
    // The wait itself, and what the transfer came to.
    .ring_wait =
        [](Ring* ring, int timeout_ms, RingDone* done) {
          if (faults.Fails("ring_wait") || faults.Interrupts()) return -1;
          if (kSystemFileOps.ring_wait(ring, timeout_ms, done) != 0) return -1;
          if (faults.Fails("ring_result")) done->result = -errno;
          return 0;
        },
    .ring_close = [](Ring* ring) { kSystemFileOps.ring_close(ring); },
};

}  // namespace vattn

#endif  // VATTN_TESTS_MEMORY_FAULT_FILE_OPS_H_
