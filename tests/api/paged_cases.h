// Pools and shapes that the test engine runs over, for its test and for its soak.
#ifndef VATTN_TESTS_API_PAGED_CASES_H_
#define VATTN_TESTS_API_PAGED_CASES_H_

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "tests/api/paged_engine.h"

namespace vattn::test {

struct PagedCase {
  const char* name;
  Shape shape;
  std::vector<int32_t> layer_heads;
  EngineOptions options;
};
inline void PrintTo(const PagedCase& one, std::ostream* out) { *out << one.name; }

// Those that the backend under test serves.
std::vector<PagedCase> PagedCases();

struct PagedRun {
  EngineTally engine;
  OracleTally oracle;
  vattn_stats stats;
};

// `steps` steps with this vattn_policy, then all requests to their end. Throws WrongAnswer or Error.
PagedRun RunPaged(const PagedCase& given, int32_t policy, int64_t steps, uint64_t seed,
                  Fault fault = Fault::kNone);

}  // namespace vattn::test

#endif  // VATTN_TESTS_API_PAGED_CASES_H_
