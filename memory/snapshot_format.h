// Bytes of a snapshot file. All numbers are little-endian; the parser is pure: bytes in, struct or
// error out.
//
//   file header, 64 bytes                     record header, 64 bytes
//    0  u8[8] magic "VATTNSNP"                 0  u32 magic "RCRD"
//    8  u32   version, 1                       4  u32 type, the caller's
//   12  u32   flags, 0                         8  u64 offset of this header in the file
//   16  u64   layout, the caller's            16  u64 payload bytes
//   24  u64   bytes of the file               24  u64 XXH3 of the payload
//   32  u64   records                         32  u8[16] file id
//   40  u8[16] file id, random                48  u64 reserved, 0
//   56  u64   XXH3 of bytes 0 to 55           56  u64 XXH3 of bytes 0 to 55
//
// The file header is followed by the records, each a header, its payload and zeros up to the next
// multiple of 64 bytes; the last one ends the file. Offset and file id keep a record from being
// read in a place or a file it was not written to.
#ifndef VATTN_MEMORY_SNAPSHOT_FORMAT_H_
#define VATTN_MEMORY_SNAPSHOT_FORMAT_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace vattn {

inline constexpr size_t kSnapshotAlignment = 64;
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
  uint64_t offset;  // of the header
  uint64_t bytes;   // of the payload
  uint64_t payload_checksum;
  SnapshotFileId file_id;
};

SnapshotHeaderBytes Encode(const SnapshotFileHeader& header);
SnapshotHeaderBytes Encode(const SnapshotRecordHeader& header);

// Zeros after a payload.
inline uint64_t SnapshotPadding(uint64_t payload_bytes) {
  return (kSnapshotAlignment - payload_bytes % kSnapshotAlignment) % kSnapshotAlignment;
}

// DATA_LOSS unless every field is as it must be in a file of `file_bytes` bytes and `layout`.
absl::StatusOr<SnapshotFileHeader> DecodeFileHeader(const SnapshotHeaderBytes& bytes,
                                                    uint64_t layout, uint64_t file_bytes);

// DATA_LOSS unless every field is as it must be at `offset` of `file`, and the whole record fits.
// offset <= file.file_bytes - 64.
absl::StatusOr<SnapshotRecordHeader> DecodeRecordHeader(const SnapshotHeaderBytes& bytes,
                                                        const SnapshotFileHeader& file,
                                                        uint64_t offset);

}  // namespace vattn

#endif  // VATTN_MEMORY_SNAPSHOT_FORMAT_H_
