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

int ReadLink(const char* path, std::string* to) {
  char text[4096];
  const ssize_t size = ::readlink(path, text, sizeof(text));
  if (size < 0) return -1;
  if (size == sizeof(text)) {
    errno = ENAMETOOLONG;
    return -1;
  }
  to->assign(text, static_cast<size_t>(size));
  return 0;
}

int LinkOpenFile(int fd, const char* path) {
  const std::string by_number = "/proc/self/fd/" + std::to_string(fd);
  return linkat(AT_FDCWD, by_number.c_str(), AT_FDCWD, path, AT_SYMLINK_FOLLOW);
}

int TakeAccess(int fd, const struct stat& like) {
  struct stat now;
  if (::fstat(fd, &now) != 0) return -1;
  const bool same_owner = now.st_uid == like.st_uid && now.st_gid == like.st_gid;
  // A file that may not be given away stays the writer's own, with the same mode.
  if (!same_owner) (void)!::fchown(fd, like.st_uid, like.st_gid);
  return ::fchmod(fd, like.st_mode & 0777);
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
    .path_stat = [](const char* path, struct stat* stat) { return ::stat(path, stat); },
    .readlink = ReadLink,
    .link = LinkOpenFile,
    .take_access = TakeAccess,
    .close = ::close,
    .set_direct = SetDirect,
    .fallocate = [](int fd, off_t bytes) { return ::fallocate(fd, 0, 0, bytes); },
    .ftruncate = ::ftruncate,
    .flock = [](int fd) { return ::flock(fd, LOCK_EX | LOCK_NB); },
    .unlock = [](int fd) { return ::flock(fd, LOCK_UN); },
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
