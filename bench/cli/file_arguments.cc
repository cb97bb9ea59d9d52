#include "bench/cli/file_arguments.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "bench/cli/failure.h"

namespace vattn::bench {
namespace {

// True if both paths lead to one file. Devices and pipes hold nothing that could be overwritten.
bool SameFile(const std::string& a, const std::string& b) {
  struct stat one, other;
  const bool there = stat(a.c_str(), &one) == 0, too = stat(b.c_str(), &other) == 0;
  if (there && too)
    return S_ISREG(one.st_mode) && one.st_dev == other.st_dev && one.st_ino == other.st_ino;
  if (there || too) return false;
  std::error_code error;
  const auto resolved =
      [&error](const std::string& path) {  // absolute first: "x" alone would stay relative
        const std::filesystem::path whole =
            error ? std::filesystem::path() : std::filesystem::absolute(path, error);
        return error ? std::filesystem::path() : std::filesystem::weakly_canonical(whole, error);
      };
  const std::filesystem::path first = resolved(a), second = resolved(b);
  return !error && first == second;
}

// Why the file cannot be written, or "". What is there stays as it is; what is not is made and
// removed again.
std::string WhyNotWritable(const std::string& path) {
  struct stat there;
  if (stat(path.c_str(), &there) == 0) {
    if (S_ISFIFO(there.st_mode) || S_ISSOCK(there.st_mode)) return "";  // who reads may come later
    const int fd = open(path.c_str(), O_WRONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) return std::strerror(errno);
    close(fd);
    return "";
  }
  // Without O_EXCL: through a link, too
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
  if (fd < 0) return std::strerror(errno);
  close(fd);
  std::error_code error;
  const std::filesystem::path made = std::filesystem::canonical(path, error);
  unlink(error ? path.c_str() : made.c_str());
  return "";
}

}  // namespace

CLI::Option* FileArguments::AddInput(const std::string& name, std::string* path,
                                     const std::string& help) {
  inputs_.push_back({name, path});
  return app_->add_option(name, *path, help)
      ->type_name("FILE")
      ->check(CLI::Validator(
          [](std::string& text) {
            return text.empty() ? std::string("the path is empty, must name a file") : "";
          },
          ""));
}

CLI::Option* FileArguments::AddOutput(const std::string& name, std::string* path,
                                      const std::string& help, const std::string& type) {
  CLI::Option* const option = AddInput(name, path, help)->type_name(type);
  outputs_.push_back(inputs_.back());
  inputs_.pop_back();
  return option;
}

void FileArguments::Check() const {
  for (size_t i = 0; i < outputs_.size(); ++i) {
    const Named& output = outputs_[i];
    if (output.path->empty()) continue;
    for (const Named& input : inputs_) {
      if (input.path->empty() || !SameFile(*output.path, *input.path)) continue;
      throw UsageError(output.option + ": " + *output.path + " is the file of " + input.option +
                       ", which would be overwritten");
    }
    for (size_t j = 0; j < i; ++j) {
      if (outputs_[j].path->empty() || !SameFile(*output.path, *outputs_[j].path)) continue;
      throw UsageError(output.option + ": " + *output.path + " is also the file of " +
                       outputs_[j].option);
    }
    const std::string why = WhyNotWritable(*output.path);
    if (!why.empty()) throw Failure(output.option + ": cannot write " + *output.path + ": " + why);
  }
}

}  // namespace vattn::bench
