#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "memory/checksum.h"
#include "memory/file_errors.h"
#include "memory/snapshot.h"

namespace vattn {
namespace {

// Bytes copied and then checksummed at a time: they stay in the cache between.
constexpr size_t kPieceBytes = size_t{128} << 10;

absl::Status CheckZeros(std::span<const std::byte> bytes) {
  const bool zero =
      std::all_of(bytes.begin(), bytes.end(), [](std::byte byte) { return byte == std::byte{0}; });
  return zero ? absl::OkStatus() : DataLossError("bytes that belong to no record are not zero");
}

}  // namespace

absl::StatusOr<std::unique_ptr<SnapshotReader>> SnapshotReader::Open(const std::string& path,
                                                                     uint64_t layout,
                                                                     const IoOptions& io) {
  // O_NONBLOCK: a named pipe must not hang us; it is refused below.
  std::unique_ptr<SnapshotReader> reader(new SnapshotReader(path, *io.ops));
  reader->fd_ = OpenFile(*io.ops, path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK, 0);
  if (reader->fd_ < 0 && errno == ENOENT) return NotFoundError(path, ": no such file");
  if (reader->fd_ < 0) return SystemError("open", path, errno);
  VATTN_RETURN_IF_ERROR(InFile(path, reader->ReadHeaders(layout, io)));
  return reader;
}

SnapshotReader::SnapshotReader(std::string path, const FileOps& ops)
    : path_(std::move(path)), ops_(ops) {}

SnapshotReader::~SnapshotReader() {
  queue_.reset();
  if (fd_ >= 0) CloseFile(ops_, fd_);
}

// Messages of the private functions lack the path; Open and Read put it in front.

absl::Status SnapshotReader::Stream(uint64_t offset, uint64_t end, const Take& take) {
  // Whole blocks from a boundary on, block i in buffer i modulo their number. All but one are
  // ahead.
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
