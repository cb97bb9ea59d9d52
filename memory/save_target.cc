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
  for (int links = 0;; ++links) {
    std::string to;
    if (ops.readlink(target.path.c_str(), &to) != 0) {
      if (errno == EINVAL || errno == ENOENT) break;  // no link, or nothing yet
      return SystemError("readlink", target.path, errno);
    }
    if (links == kMostLinks) return SystemError("readlink", path, ELOOP);
    target.path = !to.empty() && to[0] == '/' ? to : target.path.substr(0, target.path.rfind('/') + 1) + to;
  }
  if (ops.path_stat(target.path.c_str(), &target.like) != 0) {
    if (errno == ENOENT) return target;
    return SystemError("stat", target.path, errno);
  }
  target.exists = true;
  if (S_ISREG(target.like.st_mode)) return target;
  return InvalidArgumentError("path is ", path, ", which is ", KindOf(target.like.st_mode),
                              ", must be a plain file or nothing yet");
}

}  // namespace vattn
