// One line on stderr that is rewritten in place; nothing at all when stderr is no terminal.
#ifndef VATTN_BENCH_CLI_PROGRESS_H_
#define VATTN_BENCH_CLI_PROGRESS_H_

#include <unistd.h>

#include <cstdio>
#include <string>

namespace vattn::bench {

class Progress {
 public:
  Progress() : terminal_(isatty(STDERR_FILENO) != 0) {}
  ~Progress() { Clear(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // What is being done; shown at once and put before every Count.
  void Begin(std::string subject) {
    subject_ = std::move(subject);
    Show(subject_);
  }
  void Count(int64_t done, int64_t total) {
    if (terminal_) Show(subject_ + " " + std::to_string(done) + "/" + std::to_string(total));
  }
  void Clear() { Show(""); }

 private:
  void Show(const std::string& text) {
    if (terminal_) std::fprintf(stderr, "\r\033[K%s", text.c_str());
  }

  bool terminal_;
  std::string subject_;
};

}  // namespace vattn::bench

#endif  // VATTN_BENCH_CLI_PROGRESS_H_
