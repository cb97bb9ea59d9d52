#include "memory/snapshot.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <random>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/string_view.h"
#include "memory/checksum.h"
#include "memory/status.h"

namespace vattn {
namespace {

// Bytes checksummed and written, or read and checksummed, at a time: they stay in the cache
// between.
constexpr size_t kChunkBytes = size_t{1} << 20;

absl::Status SystemError(absl::string_view call, absl::string_view path, int error) {
  return IoError(path, ": ", call, ": ", std::strerror(error));
}

absl::Status InFile(absl::string_view path, const absl::Status& status) {
  return status.ok() ? status
                     : MakeError(CodeOf(status), absl::StrCat(path, ": ", status.message()));
}

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

// Calls use(chunk) for each piece until one is not OK.
template <class Byte, class Use>
absl::Status ForEachChunk(std::span<const std::span<Byte>> parts, Use&& use) {
  for (std::span<Byte> part : parts) {
    while (!part.empty()) {
      const size_t bytes = std::min(part.size(), kChunkBytes);
      VATTN_RETURN_IF_ERROR(use(part.first(bytes)));
      part = part.subspan(bytes);
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<SnapshotWriter>> SnapshotWriter::Create(std::string path,
                                                                       uint64_t layout,
                                                                       const FileOps& ops) {
  if (path.empty()) return InvalidArgumentError("path is empty, must name a file");
  const SnapshotFileId file_id = RandomFileId();
  std::string directory = DirectoryOf(path);
  std::string temporary =
      absl::StrCat(directory, ".vattn-",
                   absl::BytesToHexString(absl::string_view(
                       reinterpret_cast<const char*>(file_id.data()), file_id.size())),
                   ".tmp");
  const int fd = OpenFile(ops, temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0) return SystemError("open", temporary, errno);
  return std::unique_ptr<SnapshotWriter>(new SnapshotWriter(
      std::move(path), std::move(directory), std::move(temporary), layout, file_id, fd, ops));
}

SnapshotWriter::SnapshotWriter(std::string path, std::string directory, std::string temporary,
                               uint64_t layout, const SnapshotFileId& file_id, int fd,
                               const FileOps& ops)
    : path_(std::move(path)),
      directory_(std::move(directory)),
      temporary_(std::move(temporary)),
      layout_(layout),
      file_id_(file_id),
      ops_(ops),
      fd_(fd) {}

SnapshotWriter::~SnapshotWriter() {
  if (fd_ >= 0) CloseFile(ops_, fd_);
  if (has_temporary_) ops_.unlink(temporary_.c_str());
}

absl::Status SnapshotWriter::Write(uint64_t offset, std::span<const std::byte> bytes) {
  const int error = WriteFully(ops_, fd_, offset, bytes);
  return error == 0 ? absl::OkStatus() : SystemError("pwrite", path_, error);
}

absl::Status SnapshotWriter::Add(uint32_t type, std::span<const std::byte> payload) {
  return Add(type, std::span(&payload, 1));
}

absl::Status SnapshotWriter::Add(uint32_t type, std::span<const std::span<const std::byte>> parts) {
  if (status_.ok()) status_ = WriteRecord(type, parts);
  return status_;
}

absl::Status SnapshotWriter::WriteRecord(uint32_t type,
                                         std::span<const std::span<const std::byte>> parts) {
  const uint64_t payload_offset = end_ + kSnapshotHeaderBytes;
  uint64_t bytes = 0;
  Checksum checksum;
  VATTN_RETURN_IF_ERROR(ForEachChunk(parts, [&](std::span<const std::byte> chunk) {
    checksum.Add(chunk);
    bytes += chunk.size();
    return Write(payload_offset + bytes - chunk.size(), chunk);
  }));
  constexpr std::array<std::byte, kSnapshotAlignment> kZeros{};
  const uint64_t padding = SnapshotPadding(bytes);
  VATTN_RETURN_IF_ERROR(Write(payload_offset + bytes, std::span(kZeros).first(padding)));
  VATTN_RETURN_IF_ERROR(
      Write(end_, Encode(SnapshotRecordHeader{.type = type,
                                              .offset = end_,
                                              .bytes = bytes,
                                              .payload_checksum = checksum.value(),
                                              .file_id = file_id_})));
  end_ = payload_offset + bytes + padding;
  ++num_records_;
  return absl::OkStatus();
}

absl::Status SnapshotWriter::Commit() {
  VATTN_RETURN_IF_ERROR(status_);
  status_ = PutInPlace();
  if (!status_.ok()) return status_;
  status_ = InternalError(path_, ": the snapshot writer was used after Commit");
  return absl::OkStatus();
}

absl::Status SnapshotWriter::PutInPlace() {
  VATTN_RETURN_IF_ERROR(Write(0, Encode(SnapshotFileHeader{.layout = layout_,
                                                           .file_bytes = end_,
                                                           .num_records = num_records_,
                                                           .file_id = file_id_})));
  // A failed sync is final: the kernel may have dropped the pages and call them clean.
  if (const int error = SyncFileData(ops_, fd_); error != 0) {
    return SystemError("fdatasync", path_, error);
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
  const int error = SyncFile(ops_, directory);
  CloseFile(ops_, directory);
  // EINVAL: a file system that has no sync for directories.
  if (error != 0 && error != EINVAL) {
    return IoError(path_, ": fsync of the directory: ", std::strerror(error),
                   "; the new file is in place, but may not survive a power cut");
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<SnapshotReader>> SnapshotReader::Open(const std::string& path,
                                                                     uint64_t layout,
                                                                     const FileOps& ops) {
  // O_NONBLOCK: a named pipe must not hang us; it is refused below.
  const int fd = OpenFile(ops, path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK, 0);
  if (fd < 0 && errno == ENOENT) return NotFoundError(path, ": no such file");
  if (fd < 0) return SystemError("open", path, errno);
  std::unique_ptr<SnapshotReader> reader(new SnapshotReader(path, fd, ops));
  VATTN_RETURN_IF_ERROR(InFile(path, reader->ReadHeaders(layout)));
  return reader;
}

SnapshotReader::SnapshotReader(std::string path, int fd, const FileOps& ops)
    : path_(std::move(path)), fd_(fd), ops_(ops) {}

SnapshotReader::~SnapshotReader() { CloseFile(ops_, fd_); }

// Messages of the private functions lack the path; Open and Read put it in front.

absl::Status SnapshotReader::ReadBytes(uint64_t offset, std::span<std::byte> bytes) const {
  size_t got = 0;
  const int error = ReadFully(ops_, fd_, offset, bytes, &got);
  if (error != 0) return IoError("pread: ", std::strerror(error));
  if (got < bytes.size()) return DataLossError("the file ends at byte ", offset + got);
  return absl::OkStatus();
}

absl::Status SnapshotReader::ReadHeaders(uint64_t layout) {
  struct stat stat = {};
  if (ops_.fstat(fd_, &stat) != 0) return IoError("fstat: ", std::strerror(errno));
  if (!S_ISREG(stat.st_mode)) return DataLossError("not a regular file");
  const uint64_t file_bytes = static_cast<uint64_t>(stat.st_size);
  if (file_bytes < kSnapshotHeaderBytes) {
    return DataLossError("not a vattn snapshot: ", file_bytes, " bytes");
  }
  SnapshotHeaderBytes bytes;
  VATTN_RETURN_IF_ERROR(ReadBytes(0, bytes));
  const absl::StatusOr<SnapshotFileHeader> file = DecodeFileHeader(bytes, layout, file_bytes);
  VATTN_RETURN_IF_ERROR(file.status());

  uint64_t offset = kSnapshotHeaderBytes;
  for (uint64_t i = 0; i < file->num_records; ++i) {
    if (file_bytes - offset < kSnapshotHeaderBytes) {
      return DataLossError("the file ends after ", i, " of ", file->num_records, " records");
    }
    VATTN_RETURN_IF_ERROR(ReadBytes(offset, bytes));
    const absl::StatusOr<SnapshotRecordHeader> record = DecodeRecordHeader(bytes, *file, offset);
    VATTN_RETURN_IF_ERROR(record.status());
    records_.push_back({.type = record->type, .bytes = record->bytes});
    headers_.push_back(*record);
    offset += kSnapshotHeaderBytes + record->bytes + SnapshotPadding(record->bytes);
  }
  if (offset != file_bytes) {
    return DataLossError("the records end at byte ", offset, " of ", file_bytes);
  }
  return absl::OkStatus();
}

absl::Status SnapshotReader::Read(size_t index, std::span<std::byte> payload) const {
  return Read(index, std::span(&payload, 1));
}

absl::Status SnapshotReader::Read(size_t index, std::span<const std::span<std::byte>> parts) const {
  if (index >= headers_.size()) {
    return InvalidArgumentError("record is ", index, ", must be below ", headers_.size());
  }
  uint64_t bytes = 0;
  for (const std::span<std::byte> part : parts) bytes += part.size();
  if (bytes != headers_[index].bytes) {
    return InvalidArgumentError("parts for record ", index, " have ", bytes, " bytes, must have ",
                                headers_[index].bytes);
  }
  return InFile(path_, CheckedRead(headers_[index], parts));
}

absl::Status SnapshotReader::CheckedRead(const SnapshotRecordHeader& header,
                                         std::span<const std::span<std::byte>> parts) const {
  uint64_t offset = header.offset + kSnapshotHeaderBytes;
  Checksum checksum;
  VATTN_RETURN_IF_ERROR(ForEachChunk(parts, [&](std::span<std::byte> chunk) {
    const absl::Status status = ReadBytes(offset, chunk);
    offset += chunk.size();
    if (status.ok()) checksum.Add(chunk);
    return status;
  }));
  std::array<std::byte, kSnapshotAlignment> padding{};
  VATTN_RETURN_IF_ERROR(ReadBytes(offset, std::span(padding).first(SnapshotPadding(header.bytes))));
  const bool padded = std::all_of(padding.begin(), padding.end(),
                                  [](std::byte byte) { return byte == std::byte{0}; });
  if (!padded || checksum.value() != header.payload_checksum) {
    return DataLossError("checksum of the record at byte ", header.offset, " does not match");
  }
  return absl::OkStatus();
}

}  // namespace vattn
