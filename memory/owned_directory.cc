#include "memory/owned_directory.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "absl/strings/match.h"
#include "memory/file_errors.h"

namespace vattn {
namespace {

constexpr char kLockName[] = ".vattn-lock";

}  // namespace

absl::StatusOr<std::unique_ptr<OwnedDirectory>> OwnedDirectory::Open(std::string path,
                                                                     const FileOps& ops) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  if (path.empty()) return InvalidArgumentError("the directory's path is empty, must name one");
  if (ops.mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return SystemError("mkdir", path, errno);
  }
  const std::string lock_path = path + "/" + kLockName;
  std::unique_ptr<OwnedDirectory> directory(new OwnedDirectory(path, ops));
  directory->lock_ = OpenFile(ops, lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (directory->lock_ < 0) return SystemError("open", lock_path, errno);
  if (UntilNotInterrupted([&] { return ops.flock(directory->lock_); }) != 0) {
    if (errno != EWOULDBLOCK) return SystemError("flock", lock_path, errno);
    return InvalidArgumentError("directory ", path, " is in use, must be one runtime's alone");
  }
  const absl::StatusOr<std::vector<std::string>> names = directory->List();
  if (!names.ok()) return names.status();
  for (const std::string& name : *names) {
    if (!absl::StartsWith(name, ".vattn-") || !absl::EndsWith(name, ".tmp")) continue;
    VATTN_RETURN_IF_ERROR(directory->Remove(name));
  }
  return directory;
}

OwnedDirectory::OwnedDirectory(std::string path, const FileOps& ops)
    : path_(std::move(path)), ops_(ops) {}

OwnedDirectory::~OwnedDirectory() {
  if (lock_ >= 0) CloseFile(ops_, lock_);
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
  const std::string path = PathOf(name);
  if (ops_.unlink(path.c_str()) == 0 || errno == ENOENT) return absl::OkStatus();
  return SystemError("unlink", path, errno);
}

}  // namespace vattn
