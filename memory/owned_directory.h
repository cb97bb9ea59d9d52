// A directory of files with one owner at a time, held by a lock on a file in it.
#ifndef VATTN_MEMORY_OWNED_DIRECTORY_H_
#define VATTN_MEMORY_OWNED_DIRECTORY_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory/file_ops.h"

namespace vattn {

// The lock ends with the process, however it ends. Thread-safe.
class OwnedDirectory {
 public:
  // Makes the directory (mode 0700) if only it is missing, and removes what writers that died left in
  // it (".vattn-*.tmp"). INVALID_ARGUMENT if it has an owner, in this process or another; IO_ERROR.
  static absl::StatusOr<std::unique_ptr<OwnedDirectory>> Open(std::string path, const FileOps& ops);
  ~OwnedDirectory();

  OwnedDirectory(const OwnedDirectory&) = delete;
  OwnedDirectory& operator=(const OwnedDirectory&) = delete;

  const std::string& path() const { return path_; }
  std::string PathOf(const std::string& name) const { return path_ + "/" + name; }
  // Names of everything in it but ".", ".." and the lock, sorted.
  absl::StatusOr<std::vector<std::string>> List() const;
  absl::StatusOr<uint64_t> FileBytes(const std::string& name) const;
  // Also OK if there is no such file.
  absl::Status Remove(const std::string& name) const;

 private:
  OwnedDirectory(std::string path, const FileOps& ops);

  const std::string path_;
  int lock_ = -1;  // descriptor of the locked file
  const FileOps& ops_;
};

}  // namespace vattn

#endif  // VATTN_MEMORY_OWNED_DIRECTORY_H_
