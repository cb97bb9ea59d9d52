// The files of a command: options that name them, and what is checked about them before any work.
#ifndef VATTN_BENCH_CLI_FILE_ARGUMENTS_H_
#define VATTN_BENCH_CLI_FILE_ARGUMENTS_H_

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

namespace vattn::bench {

// Options that name files, by path. Lives as long as their texts.
class FileArguments {
 public:
  explicit FileArguments(CLI::App* app) : app_(app) {}

  // An empty path is refused: "" as a value is a variable that was not set.
  CLI::Option* AddInput(const std::string& name, std::string* path, const std::string& help);
  CLI::Option* AddOutput(const std::string& name, std::string* path, const std::string& help,
                         const std::string& type = "FILE");
  // --json, which every command has.
  CLI::Option* AddJson(std::string* path) {
    return AddOutput("--json", path, "Write everything to this file");
  }

  // After parsing. UsageError where an output is a file that is read, whatever its name (links,
  // relative paths), or that of another output; Failure where it cannot be written. Changes no
  // file.
  void Check() const;

 private:
  struct Named {
    std::string option;
    const std::string* path;
  };

  CLI::App* const app_;
  std::vector<Named> inputs_, outputs_;
};

}  // namespace vattn::bench

#endif  // VATTN_BENCH_CLI_FILE_ARGUMENTS_H_
