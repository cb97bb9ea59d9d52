// The system calls behind files, as a table that tests replace to inject failures.
#ifndef VATTN_MEMORY_FILE_OPS_H_
#define VATTN_MEMORY_FILE_OPS_H_

#include <sys/stat.h>
#include <sys/types.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "memory/ring.h"

namespace vattn {

// Each entry behaves as the call of its name: -1 and errno on failure.
struct FileOps {
  int (*open)(const char* path, int flags, mode_t mode);
  ssize_t (*pwrite)(int fd, const void* data, size_t bytes, off_t offset);
  ssize_t (*pread)(int fd, void* data, size_t bytes, off_t offset);
  int (*fdatasync)(int fd);
  int (*fsync)(int fd);
  int (*rename)(const char* from, const char* to);
  int (*unlink)(const char* path);
  int (*fstat)(int fd, struct stat* stat);
  int (*path_stat)(const char* path, struct stat* stat);  // stat
  int (*readlink)(const char* path, std::string* to);
  int (*link)(int fd, const char* path);  // linkat: a name for a file that was opened without one
  // Fchmod, and fchown as far as that is allowed
  int (*take_access)(int fd, const struct stat& like);
  int (*close)(int fd);
  int (*set_direct)(int fd, bool on);     // fcntl: O_DIRECT on or off, O_NONBLOCK off
  int (*fallocate)(int fd, off_t bytes);  // from 0, as the file's size
  int (*ftruncate)(int fd, off_t bytes);
  int (*flock)(int fd);   // LOCK_EX | LOCK_NB
  int (*unlock)(int fd);  // flock: LOCK_UN
  int (*mkdir)(const char* path, mode_t mode);
  int (*list)(const char* path, std::vector<std::string>* names);  // opendir, readdir, closedir
  // Asynchronous transfers (ring.h).
  int (*ring_open)(unsigned entries, Ring** out);
  int (*ring_register_buffers)(Ring* ring, std::byte* memory, size_t bytes_each, unsigned count);
  int (*ring_register_file)(Ring* ring, int fd);
  int (*ring_submit)(Ring* ring, const RingTransfer& transfer);
  int (*ring_wait)(Ring* ring, int timeout_ms, RingDone* done);
  void (*ring_close)(Ring* ring);
};

extern const FileOps kSystemFileOps;

// Calls over a table that go on after EINTR, a thousand times at most. 0 or errno, but for
// OpenFile.

// The descriptor, or -1 and errno.
int OpenFile(const FileOps& ops, const char* path, int flags, mode_t mode);
int SyncFileData(const FileOps& ops, int fd);
int SyncFile(const FileOps& ops, int fd);
// EINTR counts as done: Linux has let go of the descriptor by then.
int CloseFile(const FileOps& ops, int fd);

// Calls `call` until it is not interrupted: its result, -1 and errno on failure.
template <class Call>
auto UntilNotInterrupted(Call&& call) {
  auto result = call();
  for (int again = 0; result < 0 && errno == EINTR && again < 1000; ++again) result = call();
  return result;
}

}  // namespace vattn

#endif  // VATTN_MEMORY_FILE_OPS_H_
