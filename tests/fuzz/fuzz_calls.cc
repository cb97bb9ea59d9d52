// Sequences of calls of the C API against a model of every row (tests/api/pool_world.h): the bytes
// choose what is called with what.
#include <filesystem>
#include <stdexcept>

#include "tests/api/pool_world.h"
#include "tests/fuzz/input.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using vattn::test::PoolWorld;
  using vattn::test::PoolWorldOptions;
  static int runs = 0;
  const std::string folder = vattn::test::ScratchFolder() + "/" + std::to_string(runs++);
  std::filesystem::create_directory(folder);
  vattn::test::Input input(data, size);
  try {
    const PoolWorldOptions options = {.folder = folder,
                                      .most_sequences = 4,
                                      .most_tokens = 700,
                                      .scarcity = 2,
                                      .spill = input.Byte() % 2 == 1};
    PoolWorld world(options, [&](uint32_t end) { return input.Below(end); });
    while (!input.empty()) world.Operate();
    world.Empty();
  } catch (const std::exception& error) {
    vattn::test::Require(false, error.what());
  }
  std::filesystem::remove_all(folder);
  return 0;
}
