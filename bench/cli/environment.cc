#include "bench/cli/environment.h"

#include <sched.h>
#include <sys/utsname.h>

#include <algorithm>
#include <ctime>
#include <fstream>

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

// The text behind "key" and a colon in a /proc file; "" if it is not there.
std::string ProcField(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, key.size(), key) != 0) continue;
    const size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const size_t begin = line.find_first_not_of(" \t", colon + 1);
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return "";
}

uint64_t MemoryField(const std::string& key) {
  const std::string text = ProcField("/proc/meminfo", key);
  return text.empty() ? 0 : std::strtoull(text.c_str(), nullptr, 10) * 1024;
}

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
  const std::string model = ProcField("/proc/cpuinfo", "model name");
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
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

int ResolveThreads(int threads) { return threads > 0 ? threads : UsableCores(); }

uint64_t AvailableMemoryBytes() { return MemoryField("MemAvailable"); }

Json ResultHeader(const CommandLine& command) {
  return {{"schema_version", kSchemaVersion},
          {"environment",
           {{"version", vattn_version()},
            {"build", vattn_build_info()},
            {"date", Date()},
            {"cpu", CpuModel()},
            {"cores", UsableCores()},
            {"memory_bytes", MemoryField("MemTotal")},
            {"os", OperatingSystem()}}},
          {"command", command.Text()}};
}

std::string EnvironmentLine() {
  return std::string("vattn ") + vattn_version() + ", " + CpuModel() + ", " +
         std::to_string(UsableCores()) + " cores, " +
         Bytes(static_cast<double>(MemoryField("MemTotal"))) + ", " + Date();
}

void WriteJson(const std::string& path, const Json& json) {
  // Text of foreign files may end up in a value: never throw over a byte that is no UTF-8.
  WriteFile(path, json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
}

void WriteFile(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  file.close();
  if (!file) throw Failure("cannot write " + path);
}

}  // namespace vattn::bench
