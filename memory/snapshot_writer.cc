#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <random>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/string_view.h"
#include "memory/file_errors.h"
#include "memory/snapshot.h"

namespace vattn {
namespace {

// Bytes checksummed and then copied at a time: they stay in the cache between.
constexpr size_t kPieceBytes = size_t{128} << 10;

SnapshotFileId RandomFileId() {
  std::random_device random;
  SnapshotFileId id;
  for (std::byte& byte : id) byte = static_cast<std::byte>(random() & 0xff);
  return id;
}

// With the slash at its end.
std::string DirectoryOf(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "./" : path.substr(0, slash + 1);
}

}  // namespace

absl::StatusOr<std::unique_ptr<SnapshotWriter>> SnapshotWriter::Create(std::string path,
                                                                       uint64_t layout,
                                                                       uint64_t expected_bytes,
                                                                       const IoOptions& io) {
  if (path.empty()) return InvalidArgumentError("path is empty, must name a file");
  const SnapshotFileId file_id = RandomFileId();
  std::string directory = DirectoryOf(path);
  std::string temporary =
      absl::StrCat(directory, ".vattn-",
                   absl::BytesToHexString(absl::string_view(
                       reinterpret_cast<const char*>(file_id.data()), file_id.size())),
                   ".tmp");
  std::unique_ptr<SnapshotWriter> writer(new SnapshotWriter(
      std::move(path), std::move(directory), std::move(temporary), layout, file_id, *io.ops));
  VATTN_RETURN_IF_ERROR(writer->OpenTemporary());
  VATTN_RETURN_IF_ERROR(writer->Prepare(expected_bytes, io));
  return writer;
}

absl::StatusOr<std::unique_ptr<SnapshotWriter>> SnapshotWriter::Create(const SaveTarget& target,
                                                                       uint64_t layout,
                                                                       uint64_t expected_bytes,
                                                                       const IoOptions& io) {
  absl::StatusOr<std::unique_ptr<SnapshotWriter>> writer =
      Create(target.path, layout, expected_bytes, io);
  if (!writer.ok() || !target.exists) return writer;
  // EPERM: a file system without modes.
  if (io.ops->take_access((*writer)->fd_, target.like) != 0 && errno != EPERM) {
    return SystemError("fchmod", target.path, errno);
  }
  return writer;
}

absl::Status SnapshotWriter::OpenTemporary() {
  // Through which Commit names the file
  static const bool has_proc = access("/proc/self/fd", X_OK) == 0;
  if (has_proc) {
    fd_ = OpenFile(ops_, directory_.c_str(), O_WRONLY | O_TMPFILE | O_CLOEXEC, 0600);
    nameless_ = fd_ >= 0;
    if (nameless_) return absl::OkStatus();
    // Not by this file system, or a kernel that takes the flags for a directory's.
    if (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL)
      return SystemError("open", directory_, errno);
  }
  fd_ = OpenFile(ops_, temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd_ < 0) return SystemError("open", temporary_, errno);
  has_temporary_ = true;
  return absl::OkStatus();
}

SnapshotWriter::SnapshotWriter(std::string path, std::string directory, std::string temporary,
                               uint64_t layout, const SnapshotFileId& file_id, const FileOps& ops)
    : path_(std::move(path)),
      directory_(std::move(directory)),
      temporary_(std::move(temporary)),
      layout_(layout),
      file_id_(file_id),
      ops_(ops) {}

SnapshotWriter::~SnapshotWriter() {
  queue_.reset();
  if (fd_ >= 0) CloseFile(ops_, fd_);
  if (has_temporary_) ops_.unlink(temporary_.c_str());
  // Rows, which do not belong into the heap
  explicit_bzero(first_block_.data(), first_block_.size());
}

absl::Status SnapshotWriter::Prepare(uint64_t expected_bytes, const IoOptions& io) {
  if (expected_bytes > 0) {
    const uint64_t bytes = RoundUp(expected_bytes, kSnapshotFileAlignment);
    if (UntilNotInterrupted([&] { return ops_.fallocate(fd_, static_cast<off_t>(bytes)); }) == 0) {
      allocated_ = bytes;
    } else if (errno != EOPNOTSUPP && errno != ENOSYS) {
      return SystemError("fallocate", path_, errno);
    }
  }
  absl::StatusOr<std::unique_ptr<TransferQueue>> queue =
      TransferQueue::Create(fd_, expected_bytes, io);
  if (!queue.ok()) return InFile(path_, queue.status());
  queue_ = *std::move(queue);
  const std::array<std::byte, kSnapshotHeaderBytes> header{};  // WriteHeaders has the true one
  return Append(header, nullptr);
}

absl::Status SnapshotWriter::Append(std::span<const std::byte> bytes, Checksum* checksum) {
  while (!bytes.empty()) {
    const size_t filled = end_ - start_;
    const size_t room = queue_->block_bytes() - filled;
    const std::span<const std::byte> piece =
        bytes.first(std::min({bytes.size(), room, kPieceBytes}));
    if (checksum != nullptr) checksum->Add(piece);
    std::memcpy(queue_->buffer(filling_) + filled, piece.data(), piece.size());
    end_ += piece.size();
    bytes = bytes.subspan(piece.size());
    if (piece.size() == room) VATTN_RETURN_IF_ERROR(WriteBuffer());
  }
  return absl::OkStatus();
}

absl::Status SnapshotWriter::AppendZeros(uint64_t count) {
  constexpr std::array<std::byte, kSnapshotFileAlignment> kZeros{};
  return Append(std::span(kZeros).first(count), nullptr);
}

absl::Status SnapshotWriter::WriteBuffer() {
  if (start_ == 0) std::copy_n(queue_->buffer(filling_), first_block_.size(), first_block_.begin());
  queue_->Start(filling_, /*write=*/true, start_, end_ - start_);
  start_ = end_;
  filling_ = (filling_ + 1) % queue_->num_buffers();
  const int error = queue_->Finish(filling_);
  return error == 0 ? absl::OkStatus() : SystemError("write", path_, error);
}

absl::Status SnapshotWriter::Add(uint32_t type, std::span<const std::byte> payload) {
  return Add(type, std::span(&payload, 1));
}

absl::Status SnapshotWriter::Add(uint32_t type, std::span<const std::span<const std::byte>> parts) {
  if (!status_.ok()) return status_;
  const uint64_t offset = end_;
  Checksum checksum;
  for (const std::span<const std::byte> part : parts) {
    if (status_.ok()) status_ = Append(part, &checksum);
  }
  const uint64_t bytes = end_ - offset;
  if (status_.ok()) status_ = AppendZeros(SnapshotPadding(bytes));
  records_.push_back({.type = type,
                      .offset = offset,
                      .bytes = bytes,
                      .payload_checksum = checksum.value(),
                      .number = records_.size(),
                      .file_id = file_id_});
  return status_;
}

absl::Status SnapshotWriter::Commit(bool durable) {
  VATTN_RETURN_IF_ERROR(status_);
  status_ = PutInPlace(durable);
  if (!status_.ok()) return status_;
  status_ = InternalError(path_, ": the snapshot writer was used after Commit");
  return absl::OkStatus();
}

absl::Status SnapshotWriter::WriteHeaders() {
  const uint64_t headers = records_.size() * kSnapshotHeaderBytes;
  VATTN_RETURN_IF_ERROR(
      AppendZeros(RoundUp(end_ + headers, kSnapshotFileAlignment) - end_ - headers));
  for (const SnapshotRecordHeader& record : records_) {
    VATTN_RETURN_IF_ERROR(Append(Encode(record), nullptr));
  }
  if (end_ > start_) VATTN_RETURN_IF_ERROR(WriteBuffer());
  if (const int error = queue_->FinishAll(); error != 0) return SystemError("write", path_, error);

  const SnapshotHeaderBytes header = Encode(SnapshotFileHeader{
      .layout = layout_, .file_bytes = end_, .num_records = records_.size(), .file_id = file_id_});
  std::copy(header.begin(), header.end(), first_block_.begin());
  std::copy(first_block_.begin(), first_block_.end(), queue_->buffer(0));
  queue_->Start(0, /*write=*/true, 0, first_block_.size());
  if (const int error = queue_->Finish(0); error != 0) return SystemError("write", path_, error);
  if (allocated_ <= end_) return absl::OkStatus();
  if (UntilNotInterrupted([&] { return ops_.ftruncate(fd_, static_cast<off_t>(end_)); }) != 0) {
    return SystemError("ftruncate", path_, errno);
  }
  return absl::OkStatus();
}

absl::Status SnapshotWriter::PutInPlace(bool durable) {
  VATTN_RETURN_IF_ERROR(WriteHeaders());
  queue_.reset();
  // A failed sync is final: the kernel may have dropped the pages and call them clean.
  if (const int error = durable ? SyncFileData(ops_, fd_) : 0; error != 0) {
    return SystemError("fdatasync", path_, error);
  }
  if (nameless_) {
    if (ops_.link(fd_, temporary_.c_str()) != 0) return SystemError("link", path_, errno);
    has_temporary_ = true;
  }
  if (const int error = CloseFile(ops_, std::exchange(fd_, -1)); error != 0) {
    return SystemError("close", path_, error);
  }
  // Opened before the rename, so that only the sync itself can fail after it.
  const int directory = OpenFile(ops_, directory_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
  if (directory < 0) return SystemError("open", directory_, errno);
  if (ops_.rename(temporary_.c_str(), path_.c_str()) != 0) {
    const int error = errno;
    CloseFile(ops_, directory);
    return SystemError("rename", path_, error);
  }
  has_temporary_ = false;
  const int error = durable ? SyncFile(ops_, directory) : 0;
  CloseFile(ops_, directory);
  // EINVAL: a file system that has no sync for directories.
  if (error != 0 && error != EINVAL) {
    return IoError(path_, ": fsync of the directory: ", std::strerror(error),
                   "; the new file is in place, but may not survive a power cut");
  }
  return absl::OkStatus();
}

}  // namespace vattn
