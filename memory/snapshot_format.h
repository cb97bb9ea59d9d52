// Bytes of a snapshot file. All numbers are little-endian; the parser is pure: bytes in, struct or
// error out.
//
//   file header, 64 bytes                     record header, 64 bytes
//    0  u8[8] magic "VATTNSNP"                 0  u32 magic "RCRD"
//    8  u32   version, 2                       4  u32 type, the caller's
//   12  u32   flags, 0                         8  u64 offset of the payload in the file
//   16  u64   layout, the caller's            16  u64 payload bytes
//   24  u64   bytes of the file               24  u64 XXH3 of the payload
//   32  u64   records                         32  u8[16] file id
//   40  u8[16] file id, random                48  u64 number of the record, from 0
//   56  u64   XXH3 of bytes 0 to 55           56  u64 XXH3 of bytes 0 to 55
//
// After the file header come the payloads in order, each with zeros up to the next multiple of 64
// bytes; then zeros, so that the record headers, in the same order, end the file at a multiple of
// 4096 bytes. Offset, number and file id keep a record from being read in a place or a file it was
// not written to.
#ifndef VATTN_MEMORY_SNAPSHOT_FORMAT_H_
#define VATTN_MEMORY_SNAPSHOT_FORMAT_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace vattn {

inline constexpr size_t kSnapshotAlignment = 64;        // of payloads
inline constexpr size_t kSnapshotFileAlignment = 4096;  // of the end
inline constexpr size_t kSnapshotHeaderBytes = 64;

using SnapshotFileId = std::array<std::byte, 16>;
using SnapshotHeaderBytes = std::array<std::byte, kSnapshotHeaderBytes>;

struct SnapshotFileHeader {
  uint64_t layout;
  uint64_t file_bytes;
  uint64_t num_records;
  SnapshotFileId file_id;
};

struct SnapshotRecordHeader {
  uint32_t type;
  uint64_t offset;  // of the payload
  uint64_t bytes;   // of the payload
  uint64_t payload_checksum;
  uint64_t number;
  SnapshotFileId file_id;
};

SnapshotHeaderBytes Encode(const SnapshotFileHeader& header);
SnapshotHeaderBytes Encode(const SnapshotRecordHeader& header);

inline uint64_t RoundUp(uint64_t bytes, uint64_t unit) { return (bytes + unit - 1) / unit * unit; }

// Where the record headers of a file start.
inline uint64_t SnapshotHeadersStart(const SnapshotFileHeader& file) {
  return file.file_bytes - file.num_records * kSnapshotHeaderBytes;
}

// Zeros after a payload.
inline uint64_t SnapshotPadding(uint64_t payload_bytes) {
  return RoundUp(payload_bytes, kSnapshotAlignment) - payload_bytes;
}

// DATA_LOSS unless every field is as it must be in a file of `file_bytes` bytes and `layout`.
absl::StatusOr<SnapshotFileHeader> DecodeFileHeader(
    std::span<const std::byte, kSnapshotHeaderBytes> bytes, uint64_t layout, uint64_t file_bytes);

// DATA_LOSS unless every field is as it must be for record `number` of `file`, whose payload starts
// at `offset`, and it ends before the record headers, which start at `end`.
absl::StatusOr<SnapshotRecordHeader> DecodeRecordHeader(
    std::span<const std::byte, kSnapshotHeaderBytes> bytes, const SnapshotFileHeader& file,
    uint64_t number, uint64_t offset, uint64_t end);

}  // namespace vattn

#endif  // VATTN_MEMORY_SNAPSHOT_FORMAT_H_
