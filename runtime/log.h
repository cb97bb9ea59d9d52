// Lines for the caller's logger, given out when no lock is held.
#ifndef VATTN_RUNTIME_LOG_H_
#define VATTN_RUNTIME_LOG_H_

#include <memory>
#include <string>

#include "runtime/options.h"

namespace vattn {

// Gives a line to a logger: at once, or where this thread holds lines back when the last LogHold of
// it goes. Lines that a logger itself causes, by calls that it makes, are dropped: nothing is
// called from within itself. What a logger throws, and want of memory for a line, end with the
// line.
void LogLine(const std::shared_ptr<const Logger>& logger, LogLevel level,
             std::string text) noexcept;

// Holds back the lines of this thread. Made before a lock is taken, so that it goes after the lock
// has.
class LogHold {
 public:
  LogHold();
  ~LogHold();
  LogHold(const LogHold&) = delete;
  LogHold& operator=(const LogHold&) = delete;
};

// VATTN_LOG_LEVEL: lines that say less than this are not given out. Unset or empty: all are.
// INVALID_ARGUMENT.
absl::Status ReadLogLevel(LogLevel* most);

}  // namespace vattn

#endif  // VATTN_RUNTIME_LOG_H_
