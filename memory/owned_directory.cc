#include "memory/owned_directory.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <mutex>
#include <system_error>
#include <utility>

#include "absl/strings/match.h"
#include "memory/file_errors.h"

namespace vattn {
namespace {

constexpr char kLockName[] = ".vattn-lock";

// Descriptors of all locks of the process. A child that is forked closes its copies at once: it
// would hold the locks on when their owner is gone.
class LocksAtFork {
 public:
  static LocksAtFork& Of() {
    static LocksAtFork* const locks = new LocksAtFork;  // outlives every directory
    return *locks;
  }
  void Add(int* descriptor) {
    const std::lock_guard<std::mutex> lock(mutex_);
    descriptors_.push_back(descriptor);
  }
  void Remove(int* descriptor) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::erase(descriptors_, descriptor);
  }

 private:
  LocksAtFork() {
    pthread_atfork([] { Of().mutex_.lock(); }, [] { Of().mutex_.unlock(); },
                   [] {
                     for (int* const descriptor : Of().descriptors_) {
                       if (*descriptor >= 0) close(*descriptor);
                       *descriptor = -1;
                     }
                     Of().mutex_.unlock();
                   });
  }

  std::mutex mutex_;
  std::vector<int*> descriptors_;
};

bool LocksNoDirectories(int error) {
  return error == EBADF || error == EINVAL || error == EISDIR || error == ENOSYS ||
         error == EOPNOTSUPP;
}

}  // namespace

absl::StatusOr<std::unique_ptr<OwnedDirectory>> OwnedDirectory::Open(std::string path,
                                                                     const FileOps& ops) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  if (path.empty()) return InvalidArgumentError("the directory's path is empty, must name one");
  if (ops.mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return SystemError("mkdir", path, errno);
  }
  std::error_code error;
  const std::filesystem::path real = std::filesystem::canonical(path, error);
  if (error) return IoError(path, ": realpath: ", error.message());
  std::unique_ptr<OwnedDirectory> directory(new OwnedDirectory(real.string(), ops));
  VATTN_RETURN_IF_ERROR(directory->Lock());
  const absl::StatusOr<std::vector<std::string>> names = directory->List();
  if (!names.ok()) return names.status();
  for (const std::string& name : *names) {
    if (!absl::StartsWith(name, ".vattn-") || !absl::EndsWith(name, ".tmp")) continue;
    VATTN_RETURN_IF_ERROR(directory->Remove(name));
  }
  return directory;
}

OwnedDirectory::OwnedDirectory(std::string path, const FileOps& ops)
    : path_(std::move(path)), ops_(ops) {
  for (int& lock : locks_) LocksAtFork::Of().Add(&lock);
}

OwnedDirectory::~OwnedDirectory() {
  for (int& lock : locks_) {
    LocksAtFork::Of().Remove(&lock);
    if (lock < 0) continue;
    // Also where a copy of the descriptor lives on in a process that was not made by fork().
    if (IsHere()) ops_.unlock(lock);
    CloseFile(ops_, lock);
  }
}

absl::Status OwnedDirectory::Lock() {
  const std::string lock_path = PathOf(kLockName);
  const auto lock = [&](int descriptor) {
    return UntilNotInterrupted([&] { return ops_.flock(descriptor); }) == 0 ? 0 : errno;
  };
  const auto refused = [&](int error, const std::string& path) {
    return error == EWOULDBLOCK
               ? InvalidArgumentError("directory ", path_,
                                      " is in use by another runtime, must be one runtime's alone")
               : SystemError("flock", path, error);
  };
  locks_[0] = OpenFile(ops_, path_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
  if (locks_[0] < 0) return SystemError("open", path_, errno);
  if (ops_.fstat(locks_[0], &opened_) != 0) return SystemError("fstat", path_, errno);
  int error = lock(locks_[0]);
  by_file_ = LocksNoDirectories(error);
  if (error != 0 && !by_file_) return refused(error, path_);
  locks_[1] = OpenFile(ops_, lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (locks_[1] < 0) return SystemError("open", lock_path, errno);
  error = lock(locks_[1]);
  return error == 0 ? absl::OkStatus() : refused(error, lock_path);
}

absl::Status OwnedDirectory::CheckOwned() const {
  if (!IsHere()) {
    return InvalidArgumentError(
        "directory ", path_, " belongs to process ", home_.id(), " and may not be used by process ",
        getpid(),
        ", which was forked from it: make a runtime with a directory of its own after the "
        "fork");
  }
  struct stat now = {};
  if (ops_.path_stat(path_.c_str(), &now) != 0) return SystemError("stat", path_, errno);
  if (now.st_dev != opened_.st_dev || now.st_ino != opened_.st_ino) {
    return IoError(
        path_, ": is not the directory any more that was opened there: it was moved or replaced");
  }
  if (!by_file_) return absl::OkStatus();
  if (ops_.fstat(locks_[1], &now) != 0) return SystemError("fstat", PathOf(kLockName), errno);
  if (now.st_nlink > 0) return absl::OkStatus();
  return IoError(PathOf(kLockName),
                 ": was removed, so that others may take the directory for theirs");
}

absl::StatusOr<std::vector<std::string>> OwnedDirectory::List() const {
  std::vector<std::string> names;
  if (ops_.list(path_.c_str(), &names) != 0) return SystemError("readdir", path_, errno);
  std::erase_if(names, [](const std::string& name) {
    return name == "." || name == ".." || name == kLockName;
  });
  std::sort(names.begin(), names.end());
  return names;
}

absl::StatusOr<uint64_t> OwnedDirectory::FileBytes(const std::string& name) const {
  const std::string path = PathOf(name);
  const int fd = OpenFile(ops_, path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK, 0);
  if (fd < 0) return SystemError("open", path, errno);
  struct stat stat = {};
  const int error = ops_.fstat(fd, &stat) == 0 ? 0 : errno;
  CloseFile(ops_, fd);
  if (error != 0) return SystemError("fstat", path, error);
  return static_cast<uint64_t>(stat.st_size);
}

absl::Status OwnedDirectory::Remove(const std::string& name) const {
  if (!IsHere()) return CheckOwned();
  const std::string path = PathOf(name);
  if (ops_.unlink(path.c_str()) == 0 || errno == ENOENT) return absl::OkStatus();
  return SystemError("unlink", path, errno);
}

}  // namespace vattn
