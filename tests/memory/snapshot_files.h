// A scratch directory and small snapshots for the tests of memory/snapshot.h.
#ifndef VATTN_TESTS_MEMORY_SNAPSHOT_FILES_H_
#define VATTN_TESTS_MEMORY_SNAPSHOT_FILES_H_

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "memory/snapshot.h"
#include "memory/status.h"

namespace vattn {

inline constexpr uint64_t kLayout = 0x1122334455667788;

using Bytes = std::vector<std::byte>;
using Records = std::vector<std::pair<uint32_t, Bytes>>;  // {type, payload}

class SnapshotFiles : public testing::Test {
 protected:
  SnapshotFiles() {
    std::string pattern = testing::TempDir() + "vattn_snapshot_XXXXXX";
    EXPECT_NE(mkdtemp(pattern.data()), nullptr);
    directory_ = pattern;
    path_ = pattern + "/sequence";
  }
  ~SnapshotFiles() override { std::filesystem::remove_all(directory_); }

  std::vector<std::string> FilesThere() const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(directory_)) {
      names.push_back(entry.path().filename());
    }
    return names;
  }

  std::string directory_, path_;
};

inline Bytes Pattern(size_t size, uint32_t seed) {
  Bytes bytes(size);
  for (std::byte& byte : bytes) {
    seed = seed * 1664525 + 1013904223;
    byte = static_cast<std::byte>(seed >> 24);
  }
  return bytes;
}

inline absl::Status WriteRecords(const std::string& path, const Records& records,
                                 const IoOptions& io = {}) {
  absl::StatusOr<std::unique_ptr<SnapshotWriter>> writer =
      SnapshotWriter::Create(path, kLayout, 0, io);
  VATTN_RETURN_IF_ERROR(writer.status());
  for (const auto& [type, payload] : records) {
    VATTN_RETURN_IF_ERROR((*writer)->Add(type, payload));
  }
  return (*writer)->Commit();
}

inline absl::StatusOr<Records> ReadRecords(const std::string& path, const IoOptions& io = {}) {
  absl::StatusOr<std::unique_ptr<SnapshotReader>> reader = SnapshotReader::Open(path, kLayout, io);
  VATTN_RETURN_IF_ERROR(reader.status());
  Records records;
  for (const SnapshotRecord& record : (*reader)->records()) {
    records.emplace_back(record.type, Bytes(record.bytes));
    VATTN_RETURN_IF_ERROR((*reader)->Read(records.size() - 1, records.back().second));
  }
  return records;
}

inline std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

inline void WriteFile(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

}  // namespace vattn

#endif  // VATTN_TESTS_MEMORY_SNAPSHOT_FILES_H_
