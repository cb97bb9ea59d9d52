// A directory of files with one owner at a time, held by a lock on a file in it.
#ifndef VATTN_MEMORY_OWNED_DIRECTORY_H_
#define VATTN_MEMORY_OWNED_DIRECTORY_H_

#include <sys/stat.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory/file_ops.h"
#include "memory/process.h"

namespace vattn {

// The directory itself is locked, not a file in it, which whoever cleans up old files might remove;
// only where a file system locks no directories (NFS) it is a file. The lock ends with the process,
// however it ends, and no process that was forked from it has a part in it. Thread-safe.
class OwnedDirectory {
 public:
  // Makes the directory (mode 0700) if only it is missing, and removes what writers that died left
  // in it (".vattn-*.tmp"). INVALID_ARGUMENT if it has an owner, in this process or another;
  // IO_ERROR.
  static absl::StatusOr<std::unique_ptr<OwnedDirectory>> Open(std::string path, const FileOps& ops);
  ~OwnedDirectory();

  OwnedDirectory(const OwnedDirectory&) = delete;
  OwnedDirectory& operator=(const OwnedDirectory&) = delete;

  // From the root on, links followed: a change of directory or of links leads nowhere else.
  const std::string& path() const { return path_; }
  std::string PathOf(const std::string& name) const { return path_ + "/" + name; }
  // False in a process that was forked from the owner: nothing there is to be removed or written by
  // it.
  bool IsHere() const { return home_.IsHere(); }
  // Whether files may be written and removed: INVALID_ARGUMENT in a forked process; IO_ERROR where
  // the path leads to another directory by now, or the lock was taken away.
  absl::Status CheckOwned() const;
  // Names of everything in it but ".", ".." and the lock, sorted.
  absl::StatusOr<std::vector<std::string>> List() const;
  absl::StatusOr<uint64_t> FileBytes(const std::string& name) const;
  // Also OK if there is no such file. Refused in a forked process, as by CheckOwned.
  absl::Status Remove(const std::string& name) const;

 private:
  OwnedDirectory(std::string path, const FileOps& ops);
  absl::Status Lock();

  std::string path_;
  const FileOps& ops_;
  const HomeProcess home_;
  struct stat opened_ = {};  // the directory's
  int locks_[2] = {-1, -1};  // descriptors of the directory and of the file that are locked
  bool by_file_ = false;     // the directory could not be
};

}  // namespace vattn

#endif  // VATTN_MEMORY_OWNED_DIRECTORY_H_
