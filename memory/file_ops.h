// The system calls behind files, as a table that tests replace to inject failures.
#ifndef VATTN_MEMORY_FILE_OPS_H_
#define VATTN_MEMORY_FILE_OPS_H_

#include <sys/stat.h>
#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <span>

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
  int (*close)(int fd);
};

extern const FileOps kSystemFileOps;

// Calls over a table that go on after EINTR. 0 or errno, but for OpenFile and ReadFully.

// The descriptor, or -1 and errno.
int OpenFile(const FileOps& ops, const char* path, int flags, mode_t mode);
// Goes on after short writes.
int WriteFully(const FileOps& ops, int fd, uint64_t offset, std::span<const std::byte> data);
// Goes on after short reads. *got < data.size() with result 0: the file ended.
int ReadFully(const FileOps& ops, int fd, uint64_t offset, std::span<std::byte> data, size_t* got);
int SyncFileData(const FileOps& ops, int fd);
int SyncFile(const FileOps& ops, int fd);
// EINTR counts as done: Linux has let go of the descriptor by then.
int CloseFile(const FileOps& ops, int fd);

}  // namespace vattn

#endif  // VATTN_MEMORY_FILE_OPS_H_
