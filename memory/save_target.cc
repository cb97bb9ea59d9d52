#include "memory/save_target.h"

#include <cerrno>
#include <filesystem>
#include <system_error>

#include "memory/file_errors.h"

namespace vattn {
namespace {

constexpr int kMostLinks = 40;  // as Linux

const char* KindOf(mode_t mode) {
  if (S_ISDIR(mode)) return "a directory";
  if (S_ISFIFO(mode)) return "a named pipe";
  if (S_ISSOCK(mode)) return "a socket";
  return "a device";
}

}  // namespace

absl::StatusOr<std::string> AbsolutePath(const std::string& path) {
  if (path.empty()) return InvalidArgumentError("path is empty, must name a file");
  if (path[0] == '/') return path;
  std::error_code error;
  const std::filesystem::path here = std::filesystem::current_path(error);
  if (error) return IoError(path, ": the current directory: ", error.message());
  return here.string() + "/" + path;
}

absl::StatusOr<SaveTarget> FindSaveTarget(const std::string& path, const FileOps& ops) {
  absl::StatusOr<std::string> absolute = AbsolutePath(path);
  if (!absolute.ok()) return absolute.status();
  SaveTarget target;
  target.path = *std::move(absolute);
  target.exists = ops.path_stat(target.path.c_str(), &target.like) == 0;
  if (!target.exists && errno != ENOENT) return SystemError("stat", path, errno);
  if (target.exists && !S_ISREG(target.like.st_mode)) {
    return InvalidArgumentError("path is ", path, ", which is ", KindOf(target.like.st_mode),
                                ", must be a plain file or nothing yet");
  }
  int links = 0;
  for (std::string to; ops.readlink(target.path.c_str(), &to) == 0; ++links) {
    if (links == kMostLinks) return SystemError("readlink", path, ELOOP);
    target.path =
        !to.empty() && to[0] == '/' ? to : target.path.substr(0, target.path.rfind('/') + 1) + to;
  }
  // No link, or nothing yet
  if (errno != EINVAL && errno != ENOENT) return SystemError("readlink", path, errno);
  if (links == 0 || !target.exists) return target;
  // A link of /proc to an open file leads to it also where no path does.
  struct stat found = {};
  if (ops.path_stat(target.path.c_str(), &found) != 0 && errno != ENOENT)
    return SystemError("stat", path, errno);
  if (found.st_dev == target.like.st_dev && found.st_ino == target.like.st_ino) return target;
  return InvalidArgumentError(
      "path is ", path,
      ", which is an open file without a name, must be a plain file or nothing yet");
}

}  // namespace vattn
