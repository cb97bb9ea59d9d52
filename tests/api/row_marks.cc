#include "tests/api/row_marks.h"

#include <cstring>
#include <fstream>
#include <iterator>

namespace vattn::test {
namespace {

constexpr uint32_t kMark = 0x40e80001, kAuthors = 0x40e90000;  // 7.25 and on, as fp32

float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Counts marks in bytes, looking at every `step`-th.
void Count(const char* bytes, size_t size, size_t step, MarkCounts& counts) {
  for (size_t at = 0; at + 8 <= size; at += step) {
    uint32_t words[2];
    std::memcpy(words, bytes + at, 8);
    if (words[0] == kMark && words[1] >> 16 == kAuthors >> 16) ++counts[words[1] - kAuthors];
  }
}

}  // namespace

void MarkRows(uint32_t author, int dim, std::vector<float>& rows) {
  for (size_t at = 0; at < rows.size(); at += static_cast<size_t>(dim)) {
    rows[at] = FromBits(kMark);
    rows[at + 1] = FromBits(kAuthors + author);
  }
}

void CountMarks(const std::vector<float>& rows, MarkCounts& counts) {
  Count(reinterpret_cast<const char*>(rows.data()), rows.size() * 4, 4, counts);
}

MarkCounts CountMarksOfFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  MarkCounts counts;
  Count(bytes.data(), bytes.size(), 1, counts);
  return counts;
}

}  // namespace vattn::test
