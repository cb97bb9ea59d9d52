// A folder of its own for files that are gone when the command ends, also by a signal that stops
// it.
#ifndef VATTN_BENCH_CLI_SCRATCH_FOLDER_H_
#define VATTN_BENCH_CLI_SCRATCH_FOLDER_H_

#include <string>
#include <vector>

namespace vattn::bench {

// One at a time. SIGINT, SIGTERM and SIGHUP remove it before they end the process.
class ScratchFolder {
 public:
  // Made in `directory`, with these files to be put into it. Failure where it cannot be.
  ScratchFolder(const std::string& directory, const std::vector<std::string>& files);
  ~ScratchFolder();
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;

  // Of the i-th file.
  const std::string& path(size_t i) const { return paths_[i]; }

 private:
  void Register(const std::string& folder, const std::vector<std::string>& files);

  std::vector<std::string> paths_;  // the folder last
};

}  // namespace vattn::bench

#endif  // VATTN_BENCH_CLI_SCRATCH_FOLDER_H_
