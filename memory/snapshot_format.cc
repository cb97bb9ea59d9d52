#include "memory/snapshot_format.h"

#include <algorithm>
#include <concepts>

#include "memory/checksum.h"
#include "memory/status.h"

namespace vattn {
namespace {

constexpr uint64_t kFileMagic = 0x504e534e54544156;  // "VATTNSNP"
constexpr uint32_t kRecordMagic = 0x44524352;        // "RCRD"
constexpr uint32_t kVersion = 2;
constexpr size_t kChecksumOffset = 56;

template <std::unsigned_integral T>
void Store(SnapshotHeaderBytes& bytes, size_t offset, T value) {
  for (size_t i = 0; i < sizeof(T); ++i) {
    bytes[offset + i] = static_cast<std::byte>(value >> (8 * i) & 0xff);
  }
}

using HeaderSpan = std::span<const std::byte, kSnapshotHeaderBytes>;

template <std::unsigned_integral T>
T Load(HeaderSpan bytes, size_t offset) {
  T value = 0;
  for (size_t i = 0; i < sizeof(T); ++i) value |= static_cast<T>(bytes[offset + i]) << (8 * i);
  return value;
}

uint64_t HeaderChecksum(HeaderSpan bytes) { return ChecksumOf(bytes.first(kChecksumOffset)); }

SnapshotFileId LoadFileId(HeaderSpan bytes, size_t offset) {
  SnapshotFileId id;
  std::copy_n(bytes.begin() + static_cast<ptrdiff_t>(offset), id.size(), id.begin());
  return id;
}

}  // namespace

SnapshotHeaderBytes Encode(const SnapshotFileHeader& header) {
  SnapshotHeaderBytes bytes{};
  Store(bytes, 0, kFileMagic);
  Store(bytes, 8, kVersion);
  Store(bytes, 16, header.layout);
  Store(bytes, 24, header.file_bytes);
  Store(bytes, 32, header.num_records);
  std::copy(header.file_id.begin(), header.file_id.end(), bytes.begin() + 40);
  Store(bytes, kChecksumOffset, HeaderChecksum(bytes));
  return bytes;
}

SnapshotHeaderBytes Encode(const SnapshotRecordHeader& header) {
  SnapshotHeaderBytes bytes{};
  Store(bytes, 0, kRecordMagic);
  Store(bytes, 4, header.type);
  Store(bytes, 8, header.offset);
  Store(bytes, 16, header.bytes);
  Store(bytes, 24, header.payload_checksum);
  std::copy(header.file_id.begin(), header.file_id.end(), bytes.begin() + 32);
  Store(bytes, 48, header.number);
  Store(bytes, kChecksumOffset, HeaderChecksum(bytes));
  return bytes;
}

absl::StatusOr<SnapshotFileHeader> DecodeFileHeader(HeaderSpan bytes, uint64_t layout,
                                                    uint64_t file_bytes) {
  if (Load<uint64_t>(bytes, 0) != kFileMagic) return DataLossError("not a vattn snapshot");
  if (Load<uint64_t>(bytes, kChecksumOffset) != HeaderChecksum(bytes)) {
    return DataLossError("checksum of the file header does not match");
  }
  if (const uint32_t version = Load<uint32_t>(bytes, 8); version != kVersion) {
    return DataLossError("version is ", version, ", this library reads ", kVersion);
  }
  if (const uint32_t flags = Load<uint32_t>(bytes, 12); flags != 0) {
    return DataLossError("unknown flags ", flags);
  }
  const SnapshotFileHeader header = {.layout = Load<uint64_t>(bytes, 16),
                                     .file_bytes = Load<uint64_t>(bytes, 24),
                                     .num_records = Load<uint64_t>(bytes, 32),
                                     .file_id = LoadFileId(bytes, 40)};
  if (header.layout != layout) {
    return DataLossError("written for another layout: fingerprint ", absl::Hex(header.layout),
                         ", this runtime has ", absl::Hex(layout));
  }
  if (header.file_bytes != file_bytes) {
    return DataLossError("file has ", file_bytes, " bytes, its header says ", header.file_bytes);
  }
  if (file_bytes % kSnapshotFileAlignment != 0) {
    return DataLossError("file has ", file_bytes, " bytes, must be a multiple of ",
                         kSnapshotFileAlignment);
  }
  if (header.num_records > file_bytes / kSnapshotHeaderBytes - 1) {
    return DataLossError(header.num_records, " records cannot fit into ", file_bytes, " bytes");
  }
  return header;
}

absl::StatusOr<SnapshotRecordHeader> DecodeRecordHeader(HeaderSpan bytes,
                                                        const SnapshotFileHeader& file,
                                                        uint64_t number, uint64_t offset,
                                                        uint64_t end) {
  if (Load<uint32_t>(bytes, 0) != kRecordMagic) {
    return DataLossError("header ", number, " is not that of a record");
  }
  if (Load<uint64_t>(bytes, kChecksumOffset) != HeaderChecksum(bytes)) {
    return DataLossError("checksum of the header of record ", number, " does not match");
  }
  const SnapshotRecordHeader header = {.type = Load<uint32_t>(bytes, 4),
                                       .offset = Load<uint64_t>(bytes, 8),
                                       .bytes = Load<uint64_t>(bytes, 16),
                                       .payload_checksum = Load<uint64_t>(bytes, 24),
                                       .number = Load<uint64_t>(bytes, 48),
                                       .file_id = LoadFileId(bytes, 32)};
  if (header.offset != offset || header.number != number || header.file_id != file.file_id) {
    return DataLossError("the header of record ", number, " belongs elsewhere");
  }
  if (offset > end || header.bytes > end - offset ||
      SnapshotPadding(header.bytes) > end - offset - header.bytes) {
    return DataLossError("record ", number, " at byte ", offset, " has ", header.bytes,
                         " bytes, the record headers start at byte ", end);
  }
  return header;
}

}  // namespace vattn
