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
#include <utility>
#include <vector>

#include "memory/snapshot.h"
#include "tests/memory/fault_file_ops.h"
#include "tests/memory/snapshot_files.h"

namespace vattn {
namespace {

const Records kOld = {{1, Pattern(100, 1)}};
const Records kNew = {{2, Pattern(5, 2)}, {3, Pattern(30000, 3)}};

// Several transfers for kNew; both engines, past the page cache and through it.
IoOptions FaultIo(bool uring, bool direct = true) {
  return {.ops = &kFaultFileOps,
          .uring = uring,
          .direct = direct,
          .depth = 3,
          .block_bytes = 8192,
          .timeout_ms = 30000};
}

// Failures of these cost speed alone.
bool IsOptional(const std::string& call) {
  return call == "set_direct" || call == "ring_open" || call == "ring_register_buffers" ||
         call == "ring_register_file" || call == "ring_submit";
}

int64_t OpenDescriptors() {
  const std::filesystem::directory_iterator descriptors("/proc/self/fd");
  return std::distance(begin(descriptors), end(descriptors));
}

// Parameter: by io_uring or by pread and pwrite.
class SnapshotFaultTest : public SnapshotFiles, public testing::WithParamInterface<bool> {
 protected:
  void SetUp() override {
    faults = {};
    ASSERT_TRUE(WriteRecords(path_, kOld, {.ops = &kFaultFileOps}).ok());
    old_ = ReadFile(path_);
    if (GetParam() && !HasRing()) GTEST_SKIP() << "io_uring is not to be had here";
  }

  static bool HasRing() {
    Ring* ring = nullptr;
    if (kSystemFileOps.ring_open(1, &ring) != 0) return false;
    kSystemFileOps.ring_close(ring);
    return true;
  }

  IoOptions Io(bool direct = true) const { return FaultIo(GetParam(), direct); }

  // kNew over kOld with a failing call: the file is one of both, whole, and nothing is left over.
  void CheckWrite(const absl::Status& status) {
    const std::string first = faults.failed.front();
    const bool renamed = faults.Called("rename") && !faults.Failed("rename");
    if (status.ok()) {
      // Of the rest only the close of the synced directory may be passed over, and an interruption.
      EXPECT_TRUE(first == "close" || IsOptional(first) || faults.error == EINTR) << first;
      EXPECT_TRUE(renamed);
    } else {
      EXPECT_EQ(CodeOf(status), Code::kIoError) << status;
      const std::string text(status.message());
      EXPECT_NE(text.find(directory_), std::string::npos) << text;
      EXPECT_EQ(renamed, faults.Failed("fsync")) << text;
    }
    const absl::StatusOr<Records> read = ReadRecords(path_);
    ASSERT_TRUE(read.ok()) << read.status();
    EXPECT_EQ(*read, renamed ? kNew : kOld);
    if (!faults.Failed("unlink")) {
      EXPECT_EQ(FilesThere(), std::vector<std::string>{"sequence"});
    }
    for (const std::string& name : FilesThere()) {
      if (name != "sequence") std::filesystem::remove(directory_ + "/" + name);
    }
  }

  std::string old_;  // bytes of the file with kOld
};

INSTANTIATE_TEST_SUITE_P(Engines, SnapshotFaultTest, testing::Bool(),
                         [](const auto& info) { return info.param ? "Uring" : "Pread"; });

TEST_P(SnapshotFaultTest, WriterSurvivesEveryFailingCall) {
  const int64_t descriptors = OpenDescriptors();
  for (const int error : {EIO, ENOSPC, EINTR}) {
    for (const bool for_ever : {false, true}) {
      if (error == EINTR && for_ever && GetParam()) continue;  // a wait of its own: WaitsEnd
      int64_t failures = 0, refusals = 0;
      for (int64_t n = 1;; ++n) {
        SCOPED_TRACE(testing::Message()
                     << std::strerror(error) << " at call " << n << (for_ever ? " and after" : ""));
        WriteFile(path_, old_);
        faults = {.fail_at = n, .for_ever = for_ever, .error = error};
        const absl::Status status = WriteRecords(path_, kNew, Io());
        if (faults.failed.empty()) {
          ASSERT_TRUE(status.ok()) << status;
          break;
        }
        ++failures;
        if (!status.ok()) {
          ++refusals;
          EXPECT_NE(status.message().find(std::strerror(error)), absl::string_view::npos) << status;
        }
        CheckWrite(status);
        EXPECT_EQ(OpenDescriptors(), descriptors);
      }
      // open, writes, fdatasync, close, open, rename, fsync, close at least.
      EXPECT_GE(failures, 10);
      EXPECT_GE(refusals, error == EIO ? 8 : 0);
    }
  }
}

TEST_P(SnapshotFaultTest, ReaderReportsEveryFailingCall) {
  ASSERT_TRUE(WriteRecords(path_, kNew, Io()).ok());
  const int64_t descriptors = OpenDescriptors();
  for (const bool for_ever : {false, true}) {
    for (int64_t n = 1;; ++n) {
      SCOPED_TRACE(testing::Message() << "call " << n << (for_ever ? " and after" : ""));
      faults = {.fail_at = n, .for_ever = for_ever, .error = EIO};
      const absl::StatusOr<Records> read = ReadRecords(path_, Io());
      EXPECT_EQ(OpenDescriptors(), descriptors);
      if (faults.failed.empty()) {
        EXPECT_GE(n, 9);  // open, fstat, reads of both headers, the gap and the payloads, close
        break;
      }
      const std::string first = faults.failed.front();
      if (first == "close" || (IsOptional(first) && !for_ever)) {
        ASSERT_TRUE(read.ok()) << read.status();
        EXPECT_EQ(*read, kNew);
        continue;
      }
      EXPECT_EQ(CodeOf(read.status()), Code::kIoError) << read.status();
      const std::string text(read.status().message());
      EXPECT_NE(text.find(path_), std::string::npos) << text;
      EXPECT_NE(text.find(std::strerror(EIO)), std::string::npos) << text;
    }
  }
}

TEST_P(SnapshotFaultTest, ShortTransfersAndInterruptsAreNoErrors) {
  for (const bool direct : {false, true}) {
    for (const size_t max_io : {size_t{0}, size_t{13}, size_t{100}, size_t{4096}, size_t{5000}}) {
      for (const bool interrupt : {false, true}) {
        SCOPED_TRACE(testing::Message() << max_io << " bytes a call, interrupts " << interrupt);
        faults = {.max_io = max_io, .interrupt = interrupt};
        const absl::Status status = WriteRecords(path_, kNew, Io(direct));
        ASSERT_TRUE(status.ok()) << status;
        const absl::StatusOr<Records> read = ReadRecords(path_, Io(direct));
        ASSERT_TRUE(read.ok()) << read.status();
        EXPECT_EQ(*read, kNew);
        EXPECT_EQ(*ReadRecords(path_), kNew);
      }
    }
  }
}

// A file system that takes O_DIRECT and then refuses the transfers.
TEST_P(SnapshotFaultTest, RefusedDirectTransfersGoThroughThePageCache) {
  static bool direct, refused;
  FileOps ops = kSystemFileOps;
  ops.set_direct = [](int fd, bool on) {
    direct = on;
    return kSystemFileOps.set_direct(fd, on);
  };
  const auto refuses = [] {
    refused = refused || direct;
    errno = EINVAL;
    return direct;
  };
  static constexpr auto kRefuses = refuses;
  ops.pwrite = [](int fd, const void* data, size_t bytes, off_t offset) -> ssize_t {
    return kRefuses() ? -1 : kSystemFileOps.pwrite(fd, data, bytes, offset);
  };
  ops.pread = [](int fd, void* data, size_t bytes, off_t offset) -> ssize_t {
    return kRefuses() ? -1 : kSystemFileOps.pread(fd, data, bytes, offset);
  };
  ops.ring_wait = [](Ring* ring, int timeout_ms, RingDone* done) {
    if (kSystemFileOps.ring_wait(ring, timeout_ms, done) != 0) return -1;
    if (kRefuses()) done->result = -EINVAL;
    return 0;
  };
  IoOptions io = Io();
  io.ops = &ops;
  ASSERT_TRUE(WriteRecords(path_, kNew, io).ok());
  EXPECT_TRUE(std::exchange(refused, false));
  EXPECT_EQ(*ReadRecords(path_, io), kNew);
  EXPECT_TRUE(refused);
}

TEST_P(SnapshotFaultTest, AFailedAddFailsEverythingAfterIt) {
  faults = {};
  absl::StatusOr<std::unique_ptr<SnapshotWriter>> writer =
      SnapshotWriter::Create(path_, kLayout, 0, Io());
  ASSERT_TRUE(writer.ok()) << writer.status();
  faults.fail_at = static_cast<int64_t>(faults.calls.size()) + 1;
  faults.for_ever = true;
  faults.error = ENOSPC;
  EXPECT_EQ(CodeOf((*writer)->Add(1, Pattern(100000, 1))), Code::kIoError);
  const size_t calls = faults.calls.size();
  EXPECT_EQ(CodeOf((*writer)->Add(1, Pattern(100000, 1))), Code::kIoError);
  EXPECT_EQ(CodeOf((*writer)->Commit()), Code::kIoError);
  EXPECT_EQ(faults.calls.size(), calls);
  faults = {};
  writer->reset();
  EXPECT_EQ(*ReadRecords(path_), kOld);
}

// What a power cut leaves is right only in this order.
TEST_P(SnapshotFaultTest, DataIsDurableBeforeTheNameAndTheNameBeforeSuccess) {
  faults = {};
  ASSERT_TRUE(WriteRecords(path_, kNew, Io()).ok());
  std::vector<std::string> order;
  for (const std::string& call : faults.calls) {
    const bool moves = call == "pwrite" || call == "ring_wait" || call == "ring_result";
    if (!IsOptional(call)) order.push_back(moves ? "transfer" : call);
  }
  order.erase(std::unique(order.begin(), order.end()), order.end());
  std::erase(order, "link");  // with files without a name
  EXPECT_EQ(order, (std::vector<std::string>{"open", "transfer", "fdatasync", "close", "open",
                                             "rename", "fsync", "close"}));
}

// A system that takes transfers and never ends them, and one whose waits are always interrupted.
TEST_P(SnapshotFaultTest, WaitsEnd) {
  if (!GetParam()) GTEST_SKIP() << "the kernel alone ends a pread or pwrite";
  static int error;
  FileOps ops = kSystemFileOps;
  ops.ring_wait = [](Ring*, int timeout_ms, RingDone*) {
    EXPECT_LE(timeout_ms, 30);
    errno = error;
    return -1;
  };
  IoOptions io = Io();
  io.ops = &ops;
  io.timeout_ms = 30;
  for (const int each : {ETIME, EINTR, EAGAIN}) {
    error = each;
    const absl::Status written = WriteRecords(path_, kNew, io);
    EXPECT_EQ(CodeOf(written), Code::kIoError);
    EXPECT_NE(written.message().find(std::strerror(ETIMEDOUT)), absl::string_view::npos) << written;
    EXPECT_EQ(CodeOf(ReadRecords(path_, io).status()), Code::kIoError);
    EXPECT_EQ(*ReadRecords(path_), kOld);
  }
}

TEST_P(SnapshotFaultTest, TheTemporaryIsNewPrivateAndRandom) {
  static std::vector<std::string> opened;
  opened.clear();
  FileOps ops = kSystemFileOps;
  ops.open = [](const char* path, int flags, mode_t mode) {
    if ((flags & O_TMPFILE) == O_TMPFILE) {  // a file system without files that have no name
      errno = EOPNOTSUPP;
      return -1;
    }
    if ((flags & O_DIRECTORY) == 0) {
      EXPECT_EQ(flags & (O_CREAT | O_EXCL | O_TRUNC), O_CREAT | O_EXCL);
      EXPECT_EQ(mode, 0600u);
      opened.emplace_back(path);
    }
    return kSystemFileOps.open(path, flags, mode);
  };
  ASSERT_TRUE(WriteRecords(path_, kNew, {.ops = &ops}).ok());
  ASSERT_TRUE(WriteRecords(path_, kNew, {.ops = &ops}).ok());
  ASSERT_EQ(opened.size(), 2u);
  EXPECT_NE(opened[0], opened[1]);
  // 128 bits in hexadecimal between the fixed ends.
  EXPECT_EQ(opened[0].size(), directory_.size() + std::string("/.vattn-.tmp").size() + 32);
}

}  // namespace
}  // namespace vattn
