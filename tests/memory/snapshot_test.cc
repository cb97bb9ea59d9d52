#include "memory/snapshot.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <string>
#include <vector>

#include "memory/virtual_range.h"
#include "tests/memory/sanitizers.h"
#include "tests/memory/snapshot_files.h"

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

TEST_F(SnapshotTest, PartsAreGathered) {
  const Bytes all = Pattern(1000, 9);
  const std::span<const std::byte> whole(all);
  const std::vector<std::span<const std::byte>> parts = {whole.first(1), whole.subspan(1, 0),
                                                         whole.subspan(1, 700), whole.last(299)};
  absl::StatusOr<std::unique_ptr<SnapshotWriter>> writer =
      SnapshotWriter::Create(path_, kLayout, 0, {});
  ASSERT_TRUE(writer.ok()) << writer.status();
  ASSERT_TRUE((*writer)->Add(5, parts).ok());
  ASSERT_TRUE((*writer)->Commit().ok());
  EXPECT_EQ((*writer)->bytes_written(), std::filesystem::file_size(path_));
  EXPECT_EQ(CodeOf((*writer)->Add(5, whole)), Code::kInternal);
  EXPECT_EQ(CodeOf((*writer)->Commit()), Code::kInternal);
  EXPECT_EQ(*ReadRecords(path_), (Records{{5, all}}));
}

// Records of all sizes around a transfer's, read by themselves and in runs, by both engines,
// through the page cache and past it, into files of too little, too much and no expected bytes.
TEST_F(SnapshotTest, RunsOfRecords) {
  Records records;
  std::vector<size_t> sizes = {0, 1, 63, 64, 65, 4095, 4096, 4097, 8192, 20000, 0, 0, 100, 0};
  for (const size_t size : sizes)
    records.emplace_back(7, Pattern(size, static_cast<uint32_t>(size)));
  for (const bool uring : {false, true}) {
    for (const bool direct : {false, true}) {
      for (const uint64_t expected : {uint64_t{0}, uint64_t{5000}, uint64_t{1} << 20}) {
        const IoOptions io = {.uring = uring,
                              .direct = direct,
                              .depth = expected == 0 ? 1u : 3u,
                              .block_bytes = 4096};
        absl::StatusOr<std::unique_ptr<SnapshotWriter>> writer =
            SnapshotWriter::Create(path_, kLayout, expected, io);
        ASSERT_TRUE(writer.ok()) << writer.status();
        for (const auto& [type, payload] : records) ASSERT_TRUE((*writer)->Add(type, payload).ok());
        ASSERT_TRUE((*writer)->Commit().ok());
        ASSERT_EQ((*writer)->bytes_written(), std::filesystem::file_size(path_));
        absl::StatusOr<std::unique_ptr<SnapshotReader>> reader =
            SnapshotReader::Open(path_, kLayout, io);
        ASSERT_TRUE(reader.ok()) << reader.status();
        EXPECT_EQ((*reader)->file_bytes(), std::filesystem::file_size(path_));
        for (size_t first = 0; first < sizes.size(); ++first) {
          for (size_t count = 0; first + count <= sizes.size(); ++count) {
            std::vector<Bytes> read(count);
            std::vector<std::span<std::byte>> payloads;
            for (size_t i = 0; i < count; ++i) {
              read[i].resize(sizes[first + i]);
              payloads.emplace_back(read[i]);
            }
            const absl::Status status = (*reader)->Read(first, payloads);
            ASSERT_TRUE(status.ok()) << status;
            for (size_t i = 0; i < count; ++i) ASSERT_EQ(read[i], records[first + i].second);
          }
        }
        Bytes byte(1);
        EXPECT_EQ(CodeOf((*reader)->Read(0, byte)), Code::kInvalidArgument);
        EXPECT_EQ(CodeOf((*reader)->Read(sizes.size(), byte)), Code::kInvalidArgument);
      }
    }
  }
}

// On file systems with files that have no name, and on others.
TEST_F(SnapshotTest, WithoutCommitNothingIsLeft) {
  ASSERT_TRUE(WriteRecords(path_, kSmall).ok());
  FileOps named = kSystemFileOps;
  named.open = [](const char* path, int flags, mode_t mode) {
    if ((flags & O_TMPFILE) != O_TMPFILE) return kSystemFileOps.open(path, flags, mode);
    errno = EOPNOTSUPP;
    return -1;
  };
  for (const FileOps* ops : {&kSystemFileOps, const_cast<const FileOps*>(&named)}) {
    {
      absl::StatusOr<std::unique_ptr<SnapshotWriter>> writer =
          SnapshotWriter::Create(path_, kLayout, 0, {.ops = ops});
      ASSERT_TRUE(writer.ok()) << writer.status();
      ASSERT_TRUE((*writer)->Add(1, Pattern(100, 1)).ok());
      if (ops == &named) {
        EXPECT_EQ(FilesThere().size(), 2u);
      }
    }
    EXPECT_EQ(FilesThere(), std::vector<std::string>{"sequence"});
    EXPECT_EQ(*ReadRecords(path_), kSmall);
    ASSERT_TRUE(WriteRecords(path_, kSmall, {.ops = ops}).ok());
    EXPECT_EQ(*ReadRecords(path_), kSmall);
  }
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
  EXPECT_EQ(CodeOf(SnapshotWriter::Create("", kLayout, 0, {}).status()), Code::kInvalidArgument);
}

TEST_F(SnapshotTest, AnotherLayoutIsRefused) {
  ASSERT_TRUE(WriteRecords(path_, kSmall).ok());
  const absl::Status status = SnapshotReader::Open(path_, kLayout + 1, {}).status();
  EXPECT_EQ(CodeOf(status), Code::kDataLoss);
  EXPECT_NE(std::string(status.message()).find("another layout"), std::string::npos) << status;
}

// Every bit of both kinds of headers and of the payloads, and one bit of every byte between them.
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
  const IoOptions io = {.ops = &ops, .uring = false, .direct = false};
  const int64_t file_bytes = static_cast<int64_t>(std::filesystem::file_size(path_));
  ASSERT_EQ(file_bytes, 4096);
  const auto in_gap = [&](int64_t byte) {
    return byte >= 64 + 64 + 64 + 192 && byte < 4096 - 4 * 64;
  };
  for (flipped_byte = 0; flipped_byte < file_bytes; ++flipped_byte) {
    for (flipped_bit = 0; flipped_bit < 8; ++flipped_bit) {
      if (in_gap(flipped_byte) && flipped_bit != flipped_byte % 8) continue;
      ASSERT_EQ(CodeOf(ReadRecords(path_, io).status()), Code::kDataLoss)
          << "byte " << flipped_byte << ", bit " << flipped_bit;
    }
  }
  ASSERT_TRUE(ReadRecords(path_, io).ok());  // flipped_byte is past the end
}

TEST_F(SnapshotTest, EveryOtherLengthIsRefused) {
  ASSERT_TRUE(WriteRecords(path_, kSmall).ok());
  const std::string good = ReadFile(path_);
  for (size_t length = 0; length < good.size(); length += 7) {
    WriteFile(path_, good.substr(0, length));
    ASSERT_EQ(CodeOf(ReadRecords(path_).status()), Code::kDataLoss) << length << " bytes";
  }
  for (const size_t more : {1, 64, 4096}) {
    WriteFile(path_, good + std::string(more, '\0'));
    ASSERT_EQ(CodeOf(ReadRecords(path_).status()), Code::kDataLoss) << more << " bytes more";
  }
}

TEST_F(SnapshotTest, AFileThatShrinksAfterOpenIsRefused) {
  ASSERT_TRUE(WriteRecords(path_, {{1, Pattern(50000, 1)}}).ok());
  absl::StatusOr<std::unique_ptr<SnapshotReader>> reader = SnapshotReader::Open(path_, kLayout, {});
  ASSERT_TRUE(reader.ok()) << reader.status();
  std::filesystem::resize_file(path_, 20000);
  Bytes payload(50000);
  EXPECT_EQ(CodeOf((*reader)->Read(0, payload)), Code::kDataLoss);
}

TEST_F(SnapshotTest, ARecordOfAnotherFileIsRefused) {
  ASSERT_TRUE(WriteRecords(path_, kSmall).ok());
  const std::string first = ReadFile(path_);
  ASSERT_TRUE(WriteRecords(path_, kSmall).ok());
  const std::string second = ReadFile(path_);
  ASSERT_EQ(first.size(), second.size());
  WriteFile(path_, first.substr(0, first.size() - 256) + second.substr(second.size() - 256));
  EXPECT_EQ(CodeOf(ReadRecords(path_).status()), Code::kDataLoss);
}

// Headers whose checksums are right and whose numbers are not: refused by Open, before a caller
// could allocate for them.
TEST_F(SnapshotTest, LyingHeadersAreRefused) {
  const auto text = [](const SnapshotHeaderBytes& bytes) {
    return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  };
  struct Claims {
    uint64_t records = 1, payload_bytes = 128, offset = 64, number = 0, file_bytes = 4096;
    size_t zeros = 4096 - 128;  // between the headers
  };
  const auto open = [&](const Claims& claims) {
    const SnapshotRecordHeader record = {.type = 1,
                                         .offset = claims.offset,
                                         .bytes = claims.payload_bytes,
                                         .payload_checksum = 0,
                                         .number = claims.number,
                                         .file_id = {}};
    WriteFile(path_,
              text(Encode(SnapshotFileHeader{kLayout, claims.file_bytes, claims.records, {}})) +
                  std::string(claims.zeros, '\0') + text(Encode(record)));
    return CodeOf(SnapshotReader::Open(path_, kLayout, {}).status());
  };
  // Payloads may end anywhere less than 4096 bytes before the record headers.
  ASSERT_EQ(open({}), Code::kOk);
  ASSERT_EQ(open({.payload_bytes = 4096 - 128}), Code::kOk);

  const uint64_t max = std::numeric_limits<uint64_t>::max();
  for (const uint64_t records : {uint64_t{0}, uint64_t{2}, uint64_t{64}, max / 64, max}) {
    EXPECT_EQ(open({.records = records}), Code::kDataLoss) << records << " records";
  }
  for (const uint64_t bytes :
       {uint64_t{4096 - 127}, (uint64_t{1} << 32) + 128, max / 2, max - 127, max - 62, max}) {
    EXPECT_EQ(open({.payload_bytes = bytes}), Code::kDataLoss) << bytes << " bytes";
  }
  for (const uint64_t offset : {uint64_t{0}, uint64_t{128}, max}) {
    EXPECT_EQ(open({.offset = offset}), Code::kDataLoss) << "at " << offset;
  }
  EXPECT_EQ(open({.number = 1}), Code::kDataLoss);
  EXPECT_EQ(open({.file_bytes = 8192}), Code::kDataLoss);
  EXPECT_EQ(open({.file_bytes = 4095, .zeros = 4095 - 128}), Code::kDataLoss);
  EXPECT_EQ(open({.payload_bytes = 64, .file_bytes = 8192, .zeros = 8192 - 128}), Code::kDataLoss);
}

// The first record is larger than 32 bits can say. Its zeros are not written, so the file is a
// hole.
TEST_F(SnapshotTest, OffsetsPast32BitsAreRight) {
  if (test::kThreadSanitizer) GTEST_SKIP() << "half a minute of checksums on one thread";
  FileOps ops = kSystemFileOps;
  ops.pwrite = [](int fd, const void* data, size_t bytes, off_t offset) -> ssize_t {
    const bool zeros = bytes == 1 << 20 && offset > 0 && offset < off_t{4351} << 20;
    return zeros ? 1 << 20 : kSystemFileOps.pwrite(fd, data, bytes, offset);
  };
  const uint64_t part_bytes = uint64_t{256} << 20;
  absl::StatusOr<VirtualRange> zeros = VirtualRange::Reserve(part_bytes, {});
  ASSERT_TRUE(zeros.ok()) << zeros.status();
  const Bytes tail = Pattern(77, 1);
  std::vector<std::span<const std::byte>> parts(17, {zeros->data(), part_bytes});
  parts.push_back(tail);
  absl::StatusOr<std::unique_ptr<SnapshotWriter>> writer =
      SnapshotWriter::Create(path_, kLayout, 0, {.ops = &ops, .uring = false});
  ASSERT_TRUE(writer.ok()) << writer.status();
  ASSERT_TRUE((*writer)->Add(1, parts).ok());
  ASSERT_TRUE((*writer)->Add(2, tail).ok());
  const absl::Status committed = (*writer)->Commit();
  if (!committed.ok()) GTEST_SKIP() << committed;

  absl::StatusOr<std::unique_ptr<SnapshotReader>> reader = SnapshotReader::Open(path_, kLayout, {});
  ASSERT_TRUE(reader.ok()) << reader.status();
  ASSERT_EQ((*reader)->records().size(), 2u);
  EXPECT_EQ((*reader)->records()[0].bytes, 17 * part_bytes + 77);
  Bytes payload(77);
  ASSERT_TRUE((*reader)->Read(1, payload).ok());
  EXPECT_EQ(payload, tail);
}

}  // namespace
}  // namespace vattn
