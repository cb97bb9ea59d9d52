// A FileOps table over the system's that fails on demand. One set of faults per process.
#ifndef VATTN_TESTS_FAULT_FILE_OPS_H_
#define VATTN_TESTS_FAULT_FILE_OPS_H_

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
  size_t max_io = 0;       // most bytes that one pread or pwrite moves; 0: any
  bool interrupt = false;  // every other call that may is interrupted first; close always is

  std::vector<std::string> calls = {};   // names of all calls so far
  std::vector<std::string> failed = {};  // of those that were made to fail
  bool interrupted_last = false;

  bool Failed(const std::string& name) const {
    return std::find(failed.begin(), failed.end(), name) != failed.end();
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
          if (faults.Fails("fdatasync") || faults.Interrupts()) return -1;
          return kSystemFileOps.fdatasync(fd);
        },
    .fsync =
        [](int fd) {
          if (faults.Fails("fsync") || faults.Interrupts()) return -1;
          return kSystemFileOps.fsync(fd);
        },
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
    // A failing close lets go of the descriptor all the same, as Linux does.
    .close =
        [](int fd) {
          EXPECT_EQ(kSystemFileOps.close(fd), 0) << "closed twice: " << std::strerror(errno);
          if (faults.Fails("close")) return -1;
          if (!faults.interrupt) return 0;
          errno = EINTR;
          return -1;
        },
};

}  // namespace vattn

#endif  // VATTN_TESTS_FAULT_FILE_OPS_H_
