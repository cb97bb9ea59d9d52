#include "memory/snapshot.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <array>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <string>
#include <vector>

#include "memory/virtual_range.h"
#include "tests/snapshot_files.h"

namespace vattn {
namespace {

const Records kSmall = {{1, Pattern(5, 1)}, {2, {}}, {7, Pattern(64, 2)}, {7, Pattern(130, 3)}};

using SnapshotTest = SnapshotFiles;

TEST_F(SnapshotTest, RoundTrip) {
  const Records records = {
      {3, Pattern(10, 1)}, {4, {}}, {4000000000, Pattern((3 << 20) + 5, 2)}, {0, Pattern(64, 3)}};
  ASSERT_TRUE(WriteRecords(path_, records).ok());
  const absl::StatusOr<Records> read = ReadRecords(path_);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(*read, records);
  EXPECT_EQ(FilesThere(), std::vector<std::string>{"sequence"});
  struct stat stat = {};
  ASSERT_EQ(::stat(path_.c_str(), &stat), 0);
  EXPECT_EQ(stat.st_mode & 0777, 0600u);
}

TEST_F(SnapshotTest, NoRecordsIsAFileToo) {
  ASSERT_TRUE(WriteRecords(path_, {}).ok());
  const absl::StatusOr<Records> read = ReadRecords(path_);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_TRUE(read->empty());
}

TEST_F(SnapshotTest, PartsAreGatheredAndScattered) {
  const Bytes all = Pattern(1000, 9);
  const std::span<const std::byte> whole(all);
  const std::vector<std::span<const std::byte>> parts = {whole.first(1), whole.subspan(1, 0),
                                                         whole.subspan(1, 700), whole.last(299)};
  absl::StatusOr<std::unique_ptr<SnapshotWriter>> writer = SnapshotWriter::Create(path_, kLayout);
  ASSERT_TRUE(writer.ok()) << writer.status();
  ASSERT_TRUE((*writer)->Add(5, parts).ok());
  ASSERT_TRUE((*writer)->Commit().ok());
  EXPECT_EQ((*writer)->bytes_written(), std::filesystem::file_size(path_));
  EXPECT_EQ(CodeOf((*writer)->Add(5, whole)), Code::kInternal);
  EXPECT_EQ(CodeOf((*writer)->Commit()), Code::kInternal);

  absl::StatusOr<std::unique_ptr<SnapshotReader>> reader = SnapshotReader::Open(path_, kLayout);
  ASSERT_TRUE(reader.ok()) << reader.status();
  Bytes first(333), second(667);
  const std::array<std::span<std::byte>, 2> into = {first, second};
  ASSERT_TRUE((*reader)->Read(0, into).ok());
  first.insert(first.end(), second.begin(), second.end());
  EXPECT_EQ(first, all);

  EXPECT_EQ(CodeOf((*reader)->Read(0, second)), Code::kInvalidArgument);
  EXPECT_EQ(CodeOf((*reader)->Read(1, second)), Code::kInvalidArgument);
}

TEST_F(SnapshotTest, WithoutCommitNothingIsLeft) {
  ASSERT_TRUE(WriteRecords(path_, kSmall).ok());
  {
    absl::StatusOr<std::unique_ptr<SnapshotWriter>> writer = SnapshotWriter::Create(path_, kLayout);
    ASSERT_TRUE(writer.ok()) << writer.status();
    ASSERT_TRUE((*writer)->Add(1, Pattern(100, 1)).ok());
    EXPECT_EQ(FilesThere().size(), 2u);
  }
  EXPECT_EQ(FilesThere(), std::vector<std::string>{"sequence"});
  EXPECT_EQ(*ReadRecords(path_), kSmall);
}

TEST_F(SnapshotTest, CommitReplacesAnOlderFile) {
  ASSERT_TRUE(WriteRecords(path_, kSmall).ok());
  ASSERT_TRUE(WriteRecords(path_, {{1, Pattern(3, 3)}}).ok());
  EXPECT_EQ(*ReadRecords(path_), (Records{{1, Pattern(3, 3)}}));
}

TEST_F(SnapshotTest, PathsWithoutADirectoryAreInTheWorkingOne) {
  const std::filesystem::path before = std::filesystem::current_path();
  std::filesystem::current_path(directory_);
  const absl::Status status = WriteRecords("plain", kSmall);
  std::filesystem::current_path(before);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(*ReadRecords(directory_ + "/plain"), kSmall);
}

TEST_F(SnapshotTest, CodesTellMissingForeignAndRefused) {
  const absl::Status missing = ReadRecords(path_).status();
  EXPECT_EQ(CodeOf(missing), Code::kNotFound);
  EXPECT_NE(std::string(missing.message()).find(path_), std::string::npos) << missing;

  EXPECT_EQ(CodeOf(ReadRecords(directory_).status()), Code::kDataLoss);
  ASSERT_EQ(mkfifo((path_ + ".pipe").c_str(), 0600), 0);
  EXPECT_EQ(CodeOf(ReadRecords(path_ + ".pipe").status()), Code::kDataLoss);
  WriteFile(path_, std::string(1000, 'x'));
  EXPECT_EQ(CodeOf(ReadRecords(path_).status()), Code::kDataLoss);

  const absl::Status refused = WriteRecords(directory_ + "/none/sequence", kSmall);
  EXPECT_EQ(CodeOf(refused), Code::kIoError);
  EXPECT_NE(std::string(refused.message()).find("No such file"), std::string::npos) << refused;
  EXPECT_EQ(CodeOf(SnapshotWriter::Create("", kLayout).status()), Code::kInvalidArgument);
}

TEST_F(SnapshotTest, AnotherLayoutIsRefused) {
  ASSERT_TRUE(WriteRecords(path_, kSmall).ok());
  const absl::Status status = SnapshotReader::Open(path_, kLayout + 1).status();
  EXPECT_EQ(CodeOf(status), Code::kDataLoss);
  EXPECT_NE(std::string(status.message()).find("another layout"), std::string::npos) << status;
}

TEST_F(SnapshotTest, EveryFlippedBitIsRefused) {
  ASSERT_TRUE(WriteRecords(path_, kSmall).ok());
  static int64_t flipped_byte;
  static int flipped_bit;
  FileOps ops = kSystemFileOps;
  ops.pread = [](int fd, void* data, size_t bytes, off_t offset) {
    const ssize_t got = kSystemFileOps.pread(fd, data, bytes, offset);
    if (flipped_byte >= offset && flipped_byte < offset + got) {
      static_cast<std::byte*>(data)[flipped_byte - offset] ^= std::byte{1} << flipped_bit;
    }
    return got;
  };
  const int64_t file_bytes = static_cast<int64_t>(std::filesystem::file_size(path_));
  for (flipped_byte = 0; flipped_byte < file_bytes; ++flipped_byte) {
    for (flipped_bit = 0; flipped_bit < 8; ++flipped_bit) {
      ASSERT_EQ(CodeOf(ReadRecords(path_, ops).status()), Code::kDataLoss)
          << "byte " << flipped_byte << ", bit " << flipped_bit;
    }
  }
  ASSERT_TRUE(ReadRecords(path_, ops).ok());  // flipped_byte is past the end
}

TEST_F(SnapshotTest, EveryOtherLengthIsRefused) {
  ASSERT_TRUE(WriteRecords(path_, kSmall).ok());
  const std::string good = ReadFile(path_);
  for (size_t length = 0; length < good.size(); ++length) {
    WriteFile(path_, good.substr(0, length));
    ASSERT_EQ(CodeOf(ReadRecords(path_).status()), Code::kDataLoss) << length << " bytes";
  }
  for (const size_t more : {1, 64, 4096}) {
    WriteFile(path_, good + std::string(more, '\0'));
    ASSERT_EQ(CodeOf(ReadRecords(path_).status()), Code::kDataLoss) << more << " bytes more";
  }
}

TEST_F(SnapshotTest, AFileThatShrinksAfterOpenIsRefused) {
  ASSERT_TRUE(WriteRecords(path_, {{1, Pattern(500, 1)}}).ok());
  absl::StatusOr<std::unique_ptr<SnapshotReader>> reader = SnapshotReader::Open(path_, kLayout);
  ASSERT_TRUE(reader.ok()) << reader.status();
  std::filesystem::resize_file(path_, 200);
  Bytes payload(500);
  EXPECT_EQ(CodeOf((*reader)->Read(0, payload)), Code::kDataLoss);
}

TEST_F(SnapshotTest, ARecordOfAnotherFileIsRefused) {
  ASSERT_TRUE(WriteRecords(path_, kSmall).ok());
  const std::string first = ReadFile(path_);
  ASSERT_TRUE(WriteRecords(path_, kSmall).ok());
  const std::string second = ReadFile(path_);
  ASSERT_EQ(first.size(), second.size());
  WriteFile(path_, first.substr(0, 64) + second.substr(64));
  EXPECT_EQ(CodeOf(ReadRecords(path_).status()), Code::kDataLoss);
}

// Headers whose checksums are right and whose numbers are not: refused by Open, before a caller
// could allocate for them.
TEST_F(SnapshotTest, LyingHeadersAreRefused) {
  const auto text = [](const SnapshotHeaderBytes& bytes) {
    return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  };
  struct Claims {
    uint64_t records = 1, payload_bytes = 128, offset = 64;
    size_t really = 128;  // payload bytes in the file
  };
  const auto open = [&](const Claims& claims) {
    WriteFile(
        path_,
        text(Encode(SnapshotFileHeader{
            kLayout, 2 * kSnapshotHeaderBytes + claims.really, claims.records, {}})) +
            text(Encode(SnapshotRecordHeader{1, claims.offset, claims.payload_bytes, 0, {}})) +
            std::string(claims.really, '\0'));
    return CodeOf(SnapshotReader::Open(path_, kLayout).status());
  };
  ASSERT_EQ(open({}), Code::kOk);

  const uint64_t max = std::numeric_limits<uint64_t>::max();
  for (const uint64_t records : {uint64_t{0}, uint64_t{2}, uint64_t{3}, max / 64, max}) {
    EXPECT_EQ(open({.records = records}), Code::kDataLoss) << records << " records";
  }
  for (const uint64_t bytes : {uint64_t{64}, uint64_t{129}, (uint64_t{1} << 32) + 128, max / 2,
                               max - 127, max - 62, max}) {
    EXPECT_EQ(open({.payload_bytes = bytes}), Code::kDataLoss) << bytes << " bytes";
    EXPECT_EQ(open({.payload_bytes = bytes, .really = 0}), Code::kDataLoss) << bytes << " bytes";
  }
  for (const uint64_t offset : {uint64_t{0}, uint64_t{128}, max}) {
    EXPECT_EQ(open({.offset = offset}), Code::kDataLoss) << "at " << offset;
  }
}

// The first record is larger than 32 bits can say. Its zeros are not written, so the file is a
// hole.
TEST_F(SnapshotTest, OffsetsPast32BitsAreRight) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "half a minute of checksums on one thread";
#endif
  FileOps ops = kSystemFileOps;
  ops.pwrite = [](int fd, const void* data, size_t bytes, off_t offset) -> ssize_t {
    return bytes == 1 << 20 ? 1 << 20 : kSystemFileOps.pwrite(fd, data, bytes, offset);
  };
  const uint64_t part_bytes = uint64_t{256} << 20;
  absl::StatusOr<VirtualRange> zeros = VirtualRange::Reserve(part_bytes, {});
  ASSERT_TRUE(zeros.ok()) << zeros.status();
  const Bytes tail = Pattern(77, 1);
  std::vector<std::span<const std::byte>> parts(17, {zeros->data(), part_bytes});
  parts.push_back(tail);
  absl::StatusOr<std::unique_ptr<SnapshotWriter>> writer =
      SnapshotWriter::Create(path_, kLayout, ops);
  ASSERT_TRUE(writer.ok()) << writer.status();
  ASSERT_TRUE((*writer)->Add(1, parts).ok());
  ASSERT_TRUE((*writer)->Add(2, tail).ok());
  const absl::Status committed = (*writer)->Commit();
  if (!committed.ok()) GTEST_SKIP() << committed;

  absl::StatusOr<std::unique_ptr<SnapshotReader>> reader = SnapshotReader::Open(path_, kLayout);
  ASSERT_TRUE(reader.ok()) << reader.status();
  ASSERT_EQ((*reader)->records().size(), 2u);
  EXPECT_EQ((*reader)->records()[0].bytes, 17 * part_bytes + 77);
  Bytes payload(77);
  ASSERT_TRUE((*reader)->Read(1, payload).ok());
  EXPECT_EQ(payload, tail);
}

}  // namespace
}  // namespace vattn
