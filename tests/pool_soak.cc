// Random operations on sequences that ask for ten times what the pool has: every refusal is a FULL
// with its numbers, every row read back is the one written, and now and then everything is
// destroyed and the pool is whole again (pool_world.h).
//
//   pool_soak [--operations N] [--seed S] [--folder DIR]
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
#include <random>
#include <string>

#include "tests/pool_world.h"

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

PoolWorldTally Run(int64_t operations, uint64_t seed, const std::string& parent) {
  const Folder folder(parent);
  std::mt19937_64 engine(seed);
  PoolWorld world({.folder = folder.path()},
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
  return world.tally();
}

void Print(const PoolWorldTally& t, int64_t operations, uint64_t seed, double seconds) {
  const auto number = [](int64_t n) { return static_cast<long long>(n); };
  std::printf(
      "pool_soak ok: %lld operations, seed %llu, %.0f s: %lld created, %lld appended (%lld "
      "tokens), "
      "%lld forked, %lld truncated, %lld destroyed, %lld saved, %lld restored, %lld hibernated, "
      "%lld "
      "woken, %lld steps, %lld rows read back, %lld misuses, %lld refused as full; demand %.1f "
      "times "
      "the pool\n",
      number(operations), static_cast<unsigned long long>(seed), seconds, number(t.created),
      number(t.appended), number(t.tokens_appended), number(t.forked), number(t.truncated),
      number(t.destroyed), number(t.saved), number(t.restored), number(t.hibernated),
      number(t.woken), number(t.steps), number(t.rows_read), number(t.misused), number(t.refused),
      t.demand / static_cast<double>(operations));
}

}  // namespace
}  // namespace vattn::test

int main(int argc, char** argv) {
  int64_t operations = 1000000;
  uint64_t seed = 1;
  std::string folder = std::filesystem::temp_directory_path();
  for (int i = 1; i < argc; i += 2) {
    const bool has_value = i + 1 < argc;
    if (has_value && std::strcmp(argv[i], "--operations") == 0) {
      operations = std::strtoll(argv[i + 1], nullptr, 10);
    } else if (has_value && std::strcmp(argv[i], "--seed") == 0) {
      seed = std::strtoull(argv[i + 1], nullptr, 10);
    } else if (has_value && std::strcmp(argv[i], "--folder") == 0) {
      folder = argv[i + 1];
    } else {
      std::fprintf(stderr, "usage: pool_soak [--operations N] [--seed S] [--folder DIR]\n");
      return 2;
    }
  }
  try {
    const auto start = std::chrono::steady_clock::now();
    const vattn::test::PoolWorldTally tally = vattn::test::Run(operations, seed, folder);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    vattn::test::Print(tally, operations, seed, seconds.count());
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "pool_soak failed (--seed %llu): %s\n",
                 static_cast<unsigned long long>(seed), error.what());
    return 1;
  }
}
