// What is being done, on stderr: one line that is rewritten in place on a terminal, elsewhere a
// line now and then.
#ifndef VATTN_BENCH_CLI_PROGRESS_H_
#define VATTN_BENCH_CLI_PROGRESS_H_

#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>

namespace vattn::bench {

class Progress {
 public:
  using Clock = std::chrono::steady_clock;

  // Off a terminal short runs say nothing, and long ones fill no log.
  explicit Progress(std::chrono::milliseconds between_lines = std::chrono::seconds(10))
      : terminal_(isatty(STDERR_FILENO) != 0),
        between_lines_(between_lines),
        shown_(Clock::now()),
        started_(shown_) {}
  ~Progress() { Clear(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // What is being done; shown at once on a terminal, and put before every Count.
  void Begin(std::string subject) {
    subject_ = std::move(subject);
    if (terminal_ || Due()) Show(subject_);
  }
  void Count(int64_t done, int64_t total) {
    if (terminal_ || Due())
      Show(subject_ + " " + std::to_string(done) + "/" + std::to_string(total));
  }
  void Clear() {
    if (terminal_) Show("");
  }

 private:
  bool Due() const { return Clock::now() - shown_ >= between_lines_; }
  void Show(const std::string& text) {
    if (terminal_) {
      std::fprintf(stderr, "\r\033[K%s", text.c_str());
      return;
    }
    shown_ = Clock::now();
    const auto seconds =
        std::chrono::duration_cast<std::chrono::seconds>(shown_ - started_).count();
    std::fprintf(stderr, "vattn: %s, after %lld s\n", text.c_str(),
                 static_cast<long long>(seconds));
  }

  const bool terminal_;
  const std::chrono::milliseconds between_lines_;
  Clock::time_point shown_, started_;
  std::string subject_;
};

}  // namespace vattn::bench

#endif  // VATTN_BENCH_CLI_PROGRESS_H_
