// Snapshots while the system's calls fail: at every call, once and for ever, the file at the path
// is the old one or the new one, whole.
#include <fcntl.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <string>
#include <vector>

#include "memory/snapshot.h"
#include "tests/fault_file_ops.h"
#include "tests/snapshot_files.h"

namespace vattn {
namespace {

const Records kOld = {{1, Pattern(100, 1)}};
const Records kNew = {{2, Pattern(5, 2)}, {3, Pattern(3000, 3)}};

int64_t OpenDescriptors() {
  const std::filesystem::directory_iterator descriptors("/proc/self/fd");
  return std::distance(begin(descriptors), end(descriptors));
}

class SnapshotFaultTest : public SnapshotFiles {
 protected:
  void SetUp() override {
    faults = {};
    ASSERT_TRUE(WriteRecords(path_, kOld).ok());
  }
};

TEST_F(SnapshotFaultTest, WriterSurvivesEveryFailingCall) {
  const int64_t descriptors = OpenDescriptors();
  for (const int error : {EIO, ENOSPC}) {
    for (const bool for_ever : {false, true}) {
      int64_t failures = 0;
      for (int64_t n = 1;; ++n) {
        SCOPED_TRACE(testing::Message()
                     << std::strerror(error) << " at call " << n << (for_ever ? " and after" : ""));
        ASSERT_TRUE(WriteRecords(path_, kOld).ok());
        faults = {.fail_at = n, .for_ever = for_ever, .error = error};
        const absl::Status status = WriteRecords(path_, kNew, kFaultFileOps);
        if (faults.failed.empty()) {
          ASSERT_TRUE(status.ok()) << status;
          break;
        }
        ++failures;
        const std::string first = faults.failed.front();
        const bool renamed =
            std::find(faults.calls.begin(), faults.calls.end(), "rename") != faults.calls.end() &&
            !faults.Failed("rename");
        if (status.ok()) {
          // Nothing but the close of the synced directory may be passed over.
          EXPECT_EQ(first, "close");
          EXPECT_TRUE(renamed);
        } else {
          EXPECT_EQ(CodeOf(status), Code::kIoError) << status;
          const std::string text(status.message());
          EXPECT_NE(text.find(directory_), std::string::npos) << text;
          EXPECT_NE(text.find(std::strerror(error)), std::string::npos) << text;
          EXPECT_NE(text.find(first), std::string::npos) << text;
          EXPECT_EQ(renamed, first == "fsync");
        }
        const absl::StatusOr<Records> read = ReadRecords(path_);
        ASSERT_TRUE(read.ok()) << read.status();
        EXPECT_EQ(*read, renamed ? kNew : kOld);
        EXPECT_EQ(OpenDescriptors(), descriptors);
        if (!faults.Failed("unlink")) {
          EXPECT_EQ(FilesThere(), std::vector<std::string>{"sequence"});
        }
        for (const std::string& name : FilesThere()) {
          if (name != "sequence") std::filesystem::remove(directory_ + "/" + name);
        }
      }
      // open, writes, fdatasync, close, open, rename, fsync, close at least.
      EXPECT_GE(failures, 10);
    }
  }
}

TEST_F(SnapshotFaultTest, ReaderReportsEveryFailingCall) {
  const int64_t descriptors = OpenDescriptors();
  for (const bool for_ever : {false, true}) {
    for (int64_t n = 1;; ++n) {
      SCOPED_TRACE(testing::Message() << "call " << n << (for_ever ? " and after" : ""));
      faults = {.fail_at = n, .for_ever = for_ever, .error = EIO};
      const absl::StatusOr<Records> read = ReadRecords(path_, kFaultFileOps);
      EXPECT_EQ(OpenDescriptors(), descriptors);
      if (faults.failed.empty()) {
        EXPECT_GE(n, 6);  // open, fstat, three reads, close
        break;
      }
      if (faults.failed.front() == "close") {
        EXPECT_TRUE(read.ok()) << read.status();
        continue;
      }
      EXPECT_EQ(CodeOf(read.status()), Code::kIoError) << read.status();
      const std::string text(read.status().message());
      EXPECT_NE(text.find(path_), std::string::npos) << text;
      EXPECT_NE(text.find(std::strerror(EIO)), std::string::npos) << text;
    }
  }
}

TEST_F(SnapshotFaultTest, ShortTransfersAndInterruptsAreNoErrors) {
  for (const size_t max_io : {size_t{0}, size_t{1}, size_t{7}, size_t{100}}) {
    for (const bool interrupt : {false, true}) {
      SCOPED_TRACE(testing::Message() << max_io << " bytes a call, interrupts " << interrupt);
      faults = {.max_io = max_io, .interrupt = interrupt};
      const absl::Status status = WriteRecords(path_, kNew, kFaultFileOps);
      ASSERT_TRUE(status.ok()) << status;
      const absl::StatusOr<Records> read = ReadRecords(path_, kFaultFileOps);
      ASSERT_TRUE(read.ok()) << read.status();
      EXPECT_EQ(*read, kNew);
      EXPECT_EQ(*ReadRecords(path_), kNew);
    }
  }
}

TEST_F(SnapshotFaultTest, AFailedAddFailsEverythingAfterIt) {
  faults = {};
  absl::StatusOr<std::unique_ptr<SnapshotWriter>> writer =
      SnapshotWriter::Create(path_, kLayout, kFaultFileOps);
  ASSERT_TRUE(writer.ok()) << writer.status();
  faults.fail_at = 2;
  faults.error = ENOSPC;
  EXPECT_EQ(CodeOf((*writer)->Add(1, Pattern(10, 1))), Code::kIoError);
  EXPECT_EQ(CodeOf((*writer)->Add(1, Pattern(10, 1))), Code::kIoError);
  EXPECT_EQ(CodeOf((*writer)->Commit()), Code::kIoError);
  EXPECT_EQ(faults.calls.size(), 2u);
  EXPECT_EQ(*ReadRecords(path_), kOld);
}

// What a power cut leaves is right only in this order.
TEST_F(SnapshotFaultTest, DataIsDurableBeforeTheNameAndTheNameBeforeSuccess) {
  faults = {};
  ASSERT_TRUE(WriteRecords(path_, kNew, kFaultFileOps).ok());
  std::vector<std::string> order = faults.calls;
  order.erase(std::unique(order.begin(), order.end()), order.end());
  EXPECT_EQ(order, (std::vector<std::string>{"open", "pwrite", "fdatasync", "close", "open",
                                             "rename", "fsync", "close"}));
}

TEST_F(SnapshotFaultTest, TheTemporaryIsNewPrivateAndRandom) {
  static std::vector<std::string> opened;
  opened.clear();
  FileOps ops = kSystemFileOps;
  ops.open = [](const char* path, int flags, mode_t mode) {
    if ((flags & O_DIRECTORY) == 0) {
      EXPECT_EQ(flags & (O_CREAT | O_EXCL | O_TRUNC), O_CREAT | O_EXCL);
      EXPECT_EQ(mode, 0600u);
      opened.emplace_back(path);
    }
    return kSystemFileOps.open(path, flags, mode);
  };
  ASSERT_TRUE(WriteRecords(path_, kNew, ops).ok());
  ASSERT_TRUE(WriteRecords(path_, kNew, ops).ok());
  ASSERT_EQ(opened.size(), 2u);
  EXPECT_NE(opened[0], opened[1]);
  // 128 bits in hexadecimal between the fixed ends.
  EXPECT_EQ(opened[0].size(), directory_.size() + std::string("/.vattn-.tmp").size() + 32);
}

}  // namespace
}  // namespace vattn
