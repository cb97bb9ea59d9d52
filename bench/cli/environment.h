// What a result depends on beside its settings, captured in every JSON file.
#ifndef VATTN_BENCH_CLI_ENVIRONMENT_H_
#define VATTN_BENCH_CLI_ENVIRONMENT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "bench/cli/json.h"

namespace vattn::bench {

inline constexpr int kSchemaVersion = 1;  // of every JSON file; raised when a key changes meaning

// The command line as it was given, quoted for a POSIX shell.
class CommandLine {
 public:
  CommandLine(int argc, const char* const* argv) : words_(argv, argv + argc) {}

  std::string Text() const;
  // The same with the seed spelled out.
  std::string Reproduce(uint64_t seed) const;

 private:
  std::vector<std::string> words_;
};

// Cores that this process may use: by affinity and by the quota of its container.
int UsableCores();
// threads, or every usable core for 0.
int ResolveThreads(int threads);
// Of the machine and of the process's container, whichever has less; 0 if the system does not say.
uint64_t AvailableMemoryBytes();

// {schema_version, environment: {version, build, date, cpu, cores, memory_bytes, os}, command}
Json ResultHeader(const CommandLine& command);
// The same in one line of text.
std::string EnvironmentLine();

// Writes json and a newline. Throws Failure.
void WriteJson(const std::string& path, const Json& json);
void WriteFile(const std::string& path, const std::string& text);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_CLI_ENVIRONMENT_H_
