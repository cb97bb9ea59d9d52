// Random operations on sequences that ask for ten times what the pool has: every refusal is a FULL
// with its numbers, every row read back is the one written, and now and then everything is
// destroyed and the pool is whole again (pool_world.h).
//
//   pool_soak [--operations N] [--seed S] [--spill 0|1] [--folder DIR]
//
// Files go to a new folder in DIR (that of temporary files). Prints one line; exit code 1 on any
// mismatch, with the seed. ctest runs a short one; `pool_soak --operations 1000000` takes minutes.
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <iomanip>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>

#include "tests/api/pool_world.h"

namespace vattn::test {
namespace {

constexpr int64_t kEmptyEvery = 5000;

class Folder {
 public:
  explicit Folder(const std::string& parent) : path_(parent + "/pool_soak_XXXXXX") {
    if (mkdtemp(path_.data()) == nullptr) throw std::runtime_error("cannot make " + path_);
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

void Print(const PoolWorld& world, int64_t operations, uint64_t seed, double seconds) {
  const PoolWorldTally& t = world.tally();
  std::ostringstream text;
  text << std::fixed << std::setprecision(1) << "pool_soak ok: " << operations
       << " operations, seed " << seed << ", " << seconds << " s: " << t.created << " created, "
       << t.appended << " appended (" << t.tokens_appended << " tokens), " << t.forked
       << " forked, " << t.truncated << " truncated, " << t.destroyed << " destroyed, " << t.saved
       << " saved, " << t.restored << " restored, " << t.hibernated << " hibernated, " << t.woken
       << " woken, " << t.reserved << " reserved, " << t.covered << " covered, " << t.kept
       << " prefixes kept, " << t.begun << " begun from, " << world.Stats().memory_prefixes_evicted
       << " let go, " << world.Stats().spills << " spilled, " << t.steps << " steps, "
       << t.rows_read << " rows read back, " << t.misused << " misuses, " << t.refused
       << " refused as full (" << t.over_quota << " for a quota); demand "
       << t.demand / static_cast<double>(operations) << " times the pool";
  std::puts(text.str().c_str());
}

void Run(int64_t operations, uint64_t seed, bool spill, const std::string& parent) {
  const auto start = std::chrono::steady_clock::now();
  const Folder folder(parent);
  std::mt19937_64 engine(seed);
  PoolWorld world({.folder = folder.path(), .spill = spill},
                  [&](uint32_t end) { return static_cast<uint32_t>(engine() % end); });
  for (int64_t i = 0; i < operations; ++i) {
    try {
      world.Operate();
      if (i % kEmptyEvery == kEmptyEvery - 1) world.Empty();
    } catch (const std::exception& error) {
      throw std::runtime_error("operation " + std::to_string(i) + ": " + error.what());
    }
  }
  world.Empty();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  Print(world, operations, seed, seconds.count());
}

}  // namespace
}  // namespace vattn::test

int main(int argc, char** argv) {
  int64_t operations = 1000000;
  uint64_t seed = 1;
  bool spill = false;
  std::string folder = std::filesystem::temp_directory_path();
  for (int i = 1; i < argc; i += 2) {
    const bool has_value = i + 1 < argc;
    if (has_value && std::strcmp(argv[i], "--operations") == 0) {
      operations = std::strtoll(argv[i + 1], nullptr, 10);
    } else if (has_value && std::strcmp(argv[i], "--seed") == 0) {
      seed = std::strtoull(argv[i + 1], nullptr, 10);
    } else if (has_value && std::strcmp(argv[i], "--spill") == 0) {
      spill = std::strcmp(argv[i + 1], "0") != 0;
    } else if (has_value && std::strcmp(argv[i], "--folder") == 0) {
      folder = argv[i + 1];
    } else {
      std::fprintf(stderr,
                   "usage: pool_soak [--operations N] [--seed S] [--spill 0|1] [--folder DIR]\n");
      return 2;
    }
  }
  try {
    vattn::test::Run(operations, seed, spill, folder);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "pool_soak failed (--seed %llu): %s\n",
                 static_cast<unsigned long long>(seed), error.what());
    return 1;
  }
}
