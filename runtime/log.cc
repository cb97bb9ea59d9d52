#include "runtime/log.h"

#include <cstdlib>
#include <utility>
#include <vector>

#include "memory/status.h"

namespace vattn {
namespace {

struct Line {
  std::shared_ptr<const Logger> logger;
  LogLevel level;
  std::string text;
};

thread_local int holds = 0;
thread_local bool giving_out = false;
thread_local std::vector<Line> held;

void GiveOut(const Line& line) noexcept {
  giving_out = true;
  try {
    (*line.logger)(line.level, line.text);
  } catch (...) {
    // A logger's trouble is not that of the call that it reports.
  }
  giving_out = false;
}

}  // namespace

void LogLine(const std::shared_ptr<const Logger>& logger, LogLevel level,
             std::string text) noexcept {
  if (logger == nullptr || *logger == nullptr || giving_out) return;
  try {
    Line line = {logger, level, std::move(text)};
    if (holds > 0) {
      held.push_back(std::move(line));
    } else {
      GiveOut(line);
    }
  } catch (...) {
    // No memory for the line.
  }
}

LogHold::LogHold() { ++holds; }

LogHold::~LogHold() {
  if (--holds > 0 || giving_out || held.empty()) return;
  const std::vector<Line> lines = std::exchange(held, {});
  for (const Line& line : lines) GiveOut(line);
}

absl::Status ReadLogLevel(LogLevel* most) {
  *most = LogLevel::kDebug;
  const char* const given = std::getenv("VATTN_LOG_LEVEL");
  const std::string name = given == nullptr ? "" : given;
  const char* const names[] = {"error", "warning", "info", "debug"};
  for (int level = 0; level < 4; ++level) {
    if (name != names[level]) continue;
    *most = static_cast<LogLevel>(level);
    return absl::OkStatus();
  }
  if (name.empty()) return absl::OkStatus();
  return InvalidArgumentError("VATTN_LOG_LEVEL in the environment is \"", name.substr(0, 40),
                              "\", must be error, warning, info or debug");
}

}  // namespace vattn
