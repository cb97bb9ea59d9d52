// Where a file that a caller named is to be written.
#ifndef VATTN_MEMORY_SAVE_TARGET_H_
#define VATTN_MEMORY_SAVE_TARGET_H_

#include <string>

#include "absl/status/statusor.h"
#include "memory/file_ops.h"

namespace vattn {

struct SaveTarget {
  std::string path;  // absolute, links followed: means the same after a change of directory
  bool exists = false;
  struct stat like = {};  // of what exists
};

// What a rename to the path would put in place of a device, a pipe, a socket or a folder is refused
// with INVALID_ARGUMENT: only a plain file, or nothing yet, is written over. IO_ERROR.
absl::StatusOr<SaveTarget> FindSaveTarget(const std::string& path, const FileOps& ops);

// The path from the root on, without the links in it being followed.
absl::StatusOr<std::string> AbsolutePath(const std::string& path);

}  // namespace vattn

#endif  // VATTN_MEMORY_SAVE_TARGET_H_
