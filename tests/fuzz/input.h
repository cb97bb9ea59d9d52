// The bytes of one run of a fuzzer, taken from the front.
#ifndef VATTN_TESTS_FUZZ_INPUT_H_
#define VATTN_TESTS_FUZZ_INPUT_H_

#include <stdlib.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

namespace vattn::test {

class Input {
 public:
  Input(const uint8_t* data, size_t size) : at_(data), left_(size) {}

  bool empty() const { return left_ == 0; }
  // 0 when nothing is left.
  uint8_t Byte() {
    if (left_ == 0) return 0;
    --left_;
    return *at_++;
  }
  // As many bytes as hold end - 1, little-endian; a number below end.
  uint32_t Below(uint32_t end) {
    uint64_t value = 0;
    for (int shift = 0; shift < 32 && (uint64_t{end} - 1) >> shift > 0; shift += 8) {
      value |= uint64_t{Byte()} << shift;
    }
    return static_cast<uint32_t>(value % end);
  }
  // Zeros after the last byte.
  std::vector<std::byte> Take(size_t count) {
    std::vector<std::byte> bytes(count);
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(Byte());
    return bytes;
  }

 private:
  const uint8_t* at_;
  size_t left_;
};

// What a fuzzer must not see ends the process.
inline void Require(bool right, const std::string& what) {
  if (right) return;
  std::fprintf(stderr, "fuzz: %s\n", what.c_str());
  abort();
}

// One for the process, removed at its end.
inline const std::string& ScratchFolder() {
  static const struct Folder {
    Folder() : path(std::filesystem::temp_directory_path() / "vattn_fuzz_XXXXXX") {
      Require(mkdtemp(path.data()) != nullptr, "no folder " + path);
    }
    ~Folder() { std::filesystem::remove_all(path); }
    std::string path;
  } folder;
  return folder.path;
}

}  // namespace vattn::test

#endif  // VATTN_TESTS_FUZZ_INPUT_H_
