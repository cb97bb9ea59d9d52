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

// Bytes checksummed and then copied at a time: they stay in the cache between.
constexpr size_t kPieceBytes = size_t{128} << 10;

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

uint64_t RoundUp(uint64_t bytes, uint64_t unit) { return (bytes + unit - 1) / unit * unit; }

absl::Status CheckZeros(std::span<const std::byte> bytes) {
  const bool zero = std::all_of(bytes.begin(), bytes.end(),
                                [](std::byte byte) { return byte == std::byte{0}; });
  return zero ? absl::OkStatus() : DataLossError("bytes that belong to no record are not zero");
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
  const int fd = OpenFile(*io.ops, temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0) return SystemError("open", temporary, errno);
  std::unique_ptr<SnapshotWriter> writer(
      new SnapshotWriter(std::move(path), std::move(directory), std::move(temporary), layout,
                         file_id, fd, *io.ops));
  VATTN_RETURN_IF_ERROR(writer->Prepare(expected_bytes, io));
  return writer;
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
  queue_.reset();
  if (fd_ >= 0) CloseFile(ops_, fd_);
  if (has_temporary_) ops_.unlink(temporary_.c_str());
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
    const std::span<const std::byte> piece = bytes.first(std::min({bytes.size(), room, kPieceBytes}));
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

  const SnapshotHeaderBytes header = Encode(SnapshotFileHeader{.layout = layout_,
                                                               .file_bytes = end_,
                                                               .num_records = records_.size(),
                                                               .file_id = file_id_});
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

absl::StatusOr<std::unique_ptr<SnapshotReader>> SnapshotReader::Open(const std::string& path,
                                                                     uint64_t layout,
                                                                     const IoOptions& io) {
  // O_NONBLOCK: a named pipe must not hang us; it is refused below.
  const int fd = OpenFile(*io.ops, path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK, 0);
  if (fd < 0 && errno == ENOENT) return NotFoundError(path, ": no such file");
  if (fd < 0) return SystemError("open", path, errno);
  std::unique_ptr<SnapshotReader> reader(new SnapshotReader(path, fd, *io.ops));
  VATTN_RETURN_IF_ERROR(InFile(path, reader->ReadHeaders(layout, io)));
  return reader;
}

SnapshotReader::SnapshotReader(std::string path, int fd, const FileOps& ops)
    : path_(std::move(path)), fd_(fd), ops_(ops) {}

SnapshotReader::~SnapshotReader() {
  queue_.reset();
  CloseFile(ops_, fd_);
}

// Messages of the private functions lack the path; Open and Read put it in front.

absl::Status SnapshotReader::Stream(uint64_t offset, uint64_t end, const Take& take) {
  // Whole blocks from a boundary on, block i in buffer i modulo their number. All but one are ahead.
  const uint64_t begin = offset / kIoAlignment * kIoAlignment, block = queue_->block_bytes();
  const uint64_t blocks = (end - begin + block - 1) / block;
  const uint64_t buffers = static_cast<uint64_t>(queue_->num_buffers()), ahead = buffers - 1;
  const auto block_end = [&](uint64_t i) { return std::min(begin + (i + 1) * block, end); };
  const auto start = [&](uint64_t i) {
    const uint64_t at = begin + i * block;
    queue_->Start(static_cast<int>(i % buffers), /*write=*/false, at,
                  RoundUp(block_end(i) - at, kIoAlignment));
  };
  absl::Status status;
  for (uint64_t i = 0; i < std::min(ahead, blocks); ++i) start(i);
  for (uint64_t i = 0; i < blocks && status.ok(); ++i) {
    const int slot = static_cast<int>(i % buffers);
    const uint64_t at = begin + i * block, from = std::max(at, offset);
    size_t moved;
    const int error = queue_->Finish(slot, &moved);
    if (error == 0 && i + ahead < blocks) start(i + ahead);
    if (error != 0) {
      status = IoError("read: ", std::strerror(error));
    } else if (at + moved < block_end(i)) {
      status = DataLossError("the file ends at byte ", at + moved);
    } else {
      status = take({queue_->buffer(slot) + (from - at), static_cast<size_t>(block_end(i) - from)});
    }
  }
  queue_->FinishAll();
  return status;
}

absl::Status SnapshotReader::ReadHeaders(uint64_t layout, const IoOptions& io) {
  struct stat stat = {};
  if (ops_.fstat(fd_, &stat) != 0) return IoError("fstat: ", std::strerror(errno));
  if (!S_ISREG(stat.st_mode)) return DataLossError("not a regular file");
  const uint64_t file_bytes = static_cast<uint64_t>(stat.st_size);
  if (file_bytes < kSnapshotFileAlignment) {
    return DataLossError("not a vattn snapshot: ", file_bytes, " bytes");
  }
  absl::StatusOr<std::unique_ptr<TransferQueue>> queue = TransferQueue::Create(fd_, file_bytes, io);
  if (!queue.ok()) return queue.status();
  queue_ = *std::move(queue);
  VATTN_RETURN_IF_ERROR(Stream(0, kSnapshotHeaderBytes, [&](std::span<const std::byte> bytes) {
    const absl::StatusOr<SnapshotFileHeader> file =
        DecodeFileHeader(bytes.first<kSnapshotHeaderBytes>(), layout, file_bytes);
    if (file.ok()) file_ = *file;
    return file.status();
  }));

  const uint64_t headers = SnapshotHeadersStart(file_);
  uint64_t offset = kSnapshotHeaderBytes;
  // A block starts and ends between two headers: both kinds of multiples are of 64.
  VATTN_RETURN_IF_ERROR(Stream(headers, file_bytes, [&](std::span<const std::byte> bytes) {
    for (; !bytes.empty(); bytes = bytes.subspan(kSnapshotHeaderBytes)) {
      const absl::StatusOr<SnapshotRecordHeader> record = DecodeRecordHeader(
          bytes.first<kSnapshotHeaderBytes>(), file_, headers_.size(), offset, headers);
      if (!record.ok()) return record.status();
      records_.push_back({.type = record->type, .bytes = record->bytes});
      headers_.push_back(*record);
      offset += record->bytes + SnapshotPadding(record->bytes);
    }
    return absl::OkStatus();
  }));
  if (headers - offset >= kSnapshotFileAlignment) {
    return DataLossError("the records end at byte ", offset, ", their headers start at ", headers);
  }
  return Stream(offset, headers, [&](std::span<const std::byte> gap) { return CheckZeros(gap); });
}

absl::Status SnapshotReader::Read(size_t index, std::span<std::byte> payload) {
  return Read(index, std::span(&payload, 1));
}

absl::Status SnapshotReader::Read(size_t first, std::span<const std::span<std::byte>> payloads) {
  if (payloads.size() > headers_.size() || first > headers_.size() - payloads.size()) {
    return InvalidArgumentError("records are ", first, " to ", first + payloads.size(),
                                ", must be below ", headers_.size());
  }
  for (size_t i = 0; i < payloads.size(); ++i) {
    if (payloads[i].size() == headers_[first + i].bytes) continue;
    return InvalidArgumentError("payload for record ", first + i, " has ", payloads[i].size(),
                                " bytes, must have ", headers_[first + i].bytes);
  }
  return InFile(path_, CheckedRead(first, payloads));
}

absl::Status SnapshotReader::CheckedRead(size_t first,
                                         std::span<const std::span<std::byte>> payloads) {
  if (payloads.empty()) return absl::OkStatus();
  const SnapshotRecordHeader& last = headers_[first + payloads.size() - 1];
  const uint64_t end = last.offset + last.bytes + SnapshotPadding(last.bytes);
  size_t index = 0, filled = 0;
  auto checksum = std::make_unique<Checksum>();
  // Padding included: false when the record is not whole yet.
  const auto take_record = [&](std::span<const std::byte>& bytes) -> absl::StatusOr<bool> {
    const std::span<std::byte> payload = payloads[index];
    const size_t whole = payload.size() + SnapshotPadding(payload.size());
    while (filled < payload.size() && !bytes.empty()) {
      const size_t count = std::min({bytes.size(), payload.size() - filled, kPieceBytes});
      const std::span<std::byte> place = payload.subspan(filled, count);
      std::memcpy(place.data(), bytes.data(), count);
      checksum->Add(place);
      bytes = bytes.subspan(count);
      filled += count;
    }
    const size_t padding = std::min(bytes.size(), whole - filled);
    VATTN_RETURN_IF_ERROR(CheckZeros(bytes.first(padding)));
    bytes = bytes.subspan(padding);
    filled += padding;
    if (filled < whole) return false;
    if (checksum->value() == headers_[first + index].payload_checksum) return true;
    return DataLossError("checksum of record ", first + index, " at byte ",
                         headers_[first + index].offset, " does not match");
  };
  const auto next = [&] {
    ++index;
    filled = 0;
    checksum = std::make_unique<Checksum>();
  };
  const absl::Status streamed =
      Stream(headers_[first].offset, end, [&](std::span<const std::byte> bytes) {
        while (index < payloads.size()) {
          const absl::StatusOr<bool> whole = take_record(bytes);
          if (!whole.ok()) return whole.status();
          if (!*whole) break;
          next();
        }
        return absl::OkStatus();
      });
  VATTN_RETURN_IF_ERROR(streamed);
  // Empty records take no bytes: those at the end may not have had their turn.
  std::span<const std::byte> none;
  for (; index < payloads.size(); next()) {
    const absl::StatusOr<bool> whole = take_record(none);
    if (!whole.ok()) return whole.status();
  }
  return absl::OkStatus();
}

}  // namespace vattn
