#include "bench/cli/environment.h"

#include <sys/utsname.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>

#include "api/vattn.h"
#include "bench/cli/failure.h"
#include "bench/cli/text.h"

namespace vattn::bench {
namespace {

std::string Quote(const std::string& word) {
  constexpr char kPlain[] =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+=.,:/@%";
  if (!word.empty() && word.find_first_not_of(kPlain) == std::string::npos) return word;
  std::string quoted = "'";
  for (const char c : word) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return quoted + "'";
}

// What the library says of this machine: one place knows of affinity, containers and their limits.
Json Machine() {
  size_t needed = 0;
  std::string text;
  do {  // it may have become longer between two calls
    text.resize(needed + 1);
    if (vattn_doctor(text.data(), text.size(), &needed) != VATTN_OK)
      throw Failure(vattn_last_error());
  } while (needed >= text.size());
  text.resize(needed);
  return Json::parse(text);
}

uint64_t MemoryBytes() { return Machine()["memory"]["total_bytes"].get<uint64_t>(); }

std::string Date() {
  const std::time_t now = std::time(nullptr);
  std::tm utc;
  gmtime_r(&now, &utc);
  char text[32];
  std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text;
}

std::string OperatingSystem() {
  utsname name;
  if (uname(&name) != 0) return "";
  return std::string(name.sysname) + " " + name.release + " " + name.machine;
}

std::string CpuModel() {
  const std::string model = Machine()["cpu"]["model"].get<std::string>();
  return model.empty() ? "unknown CPU" : model;
}

}  // namespace

std::string CommandLine::Text() const {
  std::string text;
  for (const std::string& word : words_) {
    if (!text.empty()) text += ' ';
    text += Quote(word);
  }
  return text;
}

std::string CommandLine::Reproduce(uint64_t seed) const {
  const bool given = std::any_of(words_.begin(), words_.end(), [](const std::string& word) {
    return word == "--seed" || word.compare(0, 7, "--seed=") == 0;
  });
  return Text() + (given ? "" : " --seed " + std::to_string(seed));
}

int UsableCores() {
  static const int cores = Machine()["cpu"]["cpus"].get<int>();
  return cores;
}

int ResolveThreads(int threads) { return threads > 0 ? threads : UsableCores(); }

uint64_t AvailableMemoryBytes() { return Machine()["memory"]["available_bytes"].get<uint64_t>(); }

Json ResultHeader(const CommandLine& command) {
  return {{"schema_version", kSchemaVersion},
          {"environment",
           {{"version", vattn_version()},
            {"build", vattn_build_info()},
            {"date", Date()},
            {"cpu", CpuModel()},
            {"cores", UsableCores()},
            {"memory_bytes", MemoryBytes()},
            {"os", OperatingSystem()}}},
          {"command", command.Text()}};
}

std::string EnvironmentLine() {
  return std::string("vattn ") + vattn_version() + ", " + CpuModel() + ", " +
         std::to_string(UsableCores()) + " cores, " + Bytes(static_cast<double>(MemoryBytes())) +
         ", " + Date();
}

void WriteJson(const std::string& path, const Json& json) {
  // Text of foreign files may end up in a value: never throw over a byte that is no UTF-8.
  WriteFile(path, json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
}

void WriteFile(const std::string& path, const std::string& text) {
  std::FILE* const file = std::fopen(path.c_str(), "wb");
  bool done = file != nullptr && std::fwrite(text.data(), 1, text.size(), file) == text.size() &&
              std::fflush(file) == 0;
  int error = errno;
  // A full disk may show no earlier than here.
  if (file != nullptr && std::fclose(file) != 0 && done) {
    done = false;
    error = errno;
  }
  if (!done) throw Failure("cannot write " + path + ": " + std::strerror(error));
}

}  // namespace vattn::bench
