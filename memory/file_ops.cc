#include "memory/file_ops.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cstdio>
#include <memory>

namespace vattn {
namespace {

static_assert(sizeof(off_t) == 8, "files over 2 GiB need 64-bit offsets");

int SetDirect(int fd, bool on) {
  const int flags = fcntl(fd, F_GETFL);
  if (flags < 0) return -1;
  return fcntl(fd, F_SETFL, (flags & ~(O_DIRECT | O_NONBLOCK)) | (on ? O_DIRECT : 0));
}

struct CloseDirectory {
  void operator()(DIR* directory) const { closedir(directory); }
};

int ListDirectory(const char* path, std::vector<std::string>* names) {
  std::unique_ptr<DIR, CloseDirectory> directory(opendir(path));
  if (directory == nullptr) return -1;
  errno = 0;
  while (const dirent* entry = readdir(directory.get())) names->emplace_back(entry->d_name);
  const int error = errno;
  directory.reset();
  errno = error;
  return error == 0 ? 0 : -1;
}

}  // namespace

constinit const FileOps kSystemFileOps = {
    .open = [](const char* path, int flags, mode_t mode) { return ::open(path, flags, mode); },
    .pwrite = ::pwrite,
    .pread = ::pread,
    .fdatasync = ::fdatasync,
    .fsync = ::fsync,
    .rename = std::rename,
    .unlink = ::unlink,
    .fstat = [](int fd, struct stat* stat) { return ::fstat(fd, stat); },
    .close = ::close,
    .set_direct = SetDirect,
    .fallocate = [](int fd, off_t bytes) { return ::fallocate(fd, 0, 0, bytes); },
    .ftruncate = ::ftruncate,
    .flock = [](int fd) { return ::flock(fd, LOCK_EX | LOCK_NB); },
    .mkdir = ::mkdir,
    .list = ListDirectory,
    .ring_open = OpenRing,
    .ring_register_buffers = RegisterBuffers,
    .ring_register_file = RegisterFile,
    .ring_submit = SubmitTransfer,
    .ring_wait = WaitTransfer,
    .ring_close = CloseRing,
};

int OpenFile(const FileOps& ops, const char* path, int flags, mode_t mode) {
  return UntilNotInterrupted([&] { return ops.open(path, flags, mode); });
}

int SyncFileData(const FileOps& ops, int fd) {
  return UntilNotInterrupted([&] { return ops.fdatasync(fd); }) == 0 ? 0 : errno;
}

int SyncFile(const FileOps& ops, int fd) {
  return UntilNotInterrupted([&] { return ops.fsync(fd); }) == 0 ? 0 : errno;
}

int CloseFile(const FileOps& ops, int fd) {
  return ops.close(fd) == 0 || errno == EINTR ? 0 : errno;
}

}  // namespace vattn
