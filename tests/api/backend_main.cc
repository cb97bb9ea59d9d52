// main of the tests that run on either backend, the CPU unless VATTN_BACKEND says "cuda". Exit code
// 77: skipped, there is no device.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>

#include "tests/api/backend.h"

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  setenv("VATTN_BACKEND", "cpu", /*overwrite=*/0);
  const std::string missing = vattn::test::OnCuda() ? vattn::test::NoCuda() : "";
  if (!missing.empty()) {
    std::fprintf(stderr, "skipped: %s\n", missing.c_str());
    return 77;
  }
  return RUN_ALL_TESTS();
}
