// Endurance of attention over an engine's paged KV: a test engine (paged_engine.h) over every kind
// of pool, with policies dense and verified in turn, each answer held to float64 attention.
//
//   paged_soak [--steps N] [--seed S] [--backend cpu|cuda]
//
// Steps are shared by the pools and policies. Prints one line for each; exit code 1 on a wrong
// answer, 77 without a device. ctest runs a short one; `paged_soak --steps 100000` takes minutes.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "tests/api/backend.h"
#include "tests/api/paged_cases.h"

namespace vattn::test {
namespace {

void Run(const PagedCase& one, int32_t policy, int64_t steps, uint64_t seed) {
  const auto start = std::chrono::steady_clock::now();
  const PagedRun run = RunPaged(one, policy, steps, seed);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  const EngineTally& e = run.engine;
  const OracleTally& o = run.oracle;
  std::printf(
      "paged_soak ok: %s, %s, %lld steps, seed %llu, %.1f s: %lld requests, %lld preempted, %lld "
      "blocks shared, %lld used again, %lld second turns, %lld chunks, %lld tokens decoded, %lld "
      "rejected; heads: %lld verified (%lld off by over epsilon, worst %.2f epsilon, of one token "
      "%.3f), %lld dense, %lld exact, %lld of prompts; read %.3f of the middle\n",
      one.name, policy == VATTN_POLICY_DENSE ? "dense" : "verified",
      static_cast<long long>(e.steps), static_cast<unsigned long long>(seed), seconds.count(),
      static_cast<long long>(e.finished), static_cast<long long>(e.preempted),
      static_cast<long long>(e.shared_blocks), static_cast<long long>(e.reused_blocks),
      static_cast<long long>(e.second_turns), static_cast<long long>(e.chunks),
      static_cast<long long>(e.decoded_tokens), static_cast<long long>(e.rejected_tokens),
      static_cast<long long>(o.verified), static_cast<long long>(o.failures), o.worst_verified,
      o.worst_needle, static_cast<long long>(o.dense), static_cast<long long>(o.exact),
      static_cast<long long>(o.prompt),
      static_cast<double>(run.stats.rows_selected) / static_cast<double>(run.stats.rows_middle));
  std::fflush(stdout);
}

}  // namespace
}  // namespace vattn::test

int main(int argc, char** argv) {
  int64_t steps = 100000;
  uint64_t seed = 1;
  for (int i = 1; i < argc; i += 2) {
    const bool has_value = i + 1 < argc;
    if (has_value && std::strcmp(argv[i], "--steps") == 0) {
      steps = std::strtoll(argv[i + 1], nullptr, 10);
    } else if (has_value && std::strcmp(argv[i], "--seed") == 0) {
      seed = std::strtoull(argv[i + 1], nullptr, 10);
    } else if (has_value && std::strcmp(argv[i], "--backend") == 0) {
      setenv("VATTN_BACKEND", argv[i + 1], /*overwrite=*/1);
    } else {
      std::fprintf(stderr, "usage: paged_soak [--steps N] [--seed S] [--backend cpu|cuda]\n");
      return 2;
    }
  }
  const std::string missing = vattn::test::OnCuda() ? vattn::test::NoCuda() : "";
  if (!missing.empty()) {
    std::fprintf(stderr, "skipped: %s\n", missing.c_str());
    return 77;
  }
  const std::vector<vattn::test::PagedCase> cases = vattn::test::PagedCases();
  const int64_t share = steps / static_cast<int64_t>(2 * cases.size()) + 1;
  for (const vattn::test::PagedCase& one : cases) {
    for (const int32_t policy : {VATTN_POLICY_DENSE, VATTN_POLICY_VERIFIED}) {
      try {
        vattn::test::Run(one, policy, share, seed);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "paged_soak failed (%s, policy %d, --seed %llu): %s\n", one.name,
                     static_cast<int>(policy), static_cast<unsigned long long>(seed), error.what());
        return 1;
      }
    }
  }
  return 0;
}
