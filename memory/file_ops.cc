#include "memory/file_ops.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>

namespace vattn {
namespace {

static_assert(sizeof(off_t) == 8, "files over 2 GiB need 64-bit offsets");

template <class Call>
auto UntilNotInterrupted(Call&& call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
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
};

int OpenFile(const FileOps& ops, const char* path, int flags, mode_t mode) {
  return UntilNotInterrupted([&] { return ops.open(path, flags, mode); });
}

int WriteFully(const FileOps& ops, int fd, uint64_t offset, std::span<const std::byte> data) {
  while (!data.empty()) {
    const ssize_t wrote = UntilNotInterrupted(
        [&] { return ops.pwrite(fd, data.data(), data.size(), static_cast<off_t>(offset)); });
    if (wrote < 0) return errno;
    if (wrote == 0) return EIO;  // a regular file never does this; do not spin on one that does
    data = data.subspan(static_cast<size_t>(wrote));
    offset += static_cast<uint64_t>(wrote);
  }
  return 0;
}

int ReadFully(const FileOps& ops, int fd, uint64_t offset, std::span<std::byte> data, size_t* got) {
  *got = 0;
  while (*got < data.size()) {
    const ssize_t read = UntilNotInterrupted([&] {
      return ops.pread(fd, data.data() + *got, data.size() - *got,
                       static_cast<off_t>(offset + *got));
    });
    if (read < 0) return errno;
    if (read == 0) return 0;
    *got += static_cast<size_t>(read);
  }
  return 0;
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
