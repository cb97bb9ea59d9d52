// A file of typed byte records that appears whole or not at all and refuses to be read when a
// single byte of it has changed. snapshot_format.h has the bytes.
//
// Codes: NOT_FOUND no such file; DATA_LOSS truncated, changed, foreign or of another layout;
// IO_ERROR the system refused, the text has the path and the reason.
#ifndef VATTN_MEMORY_SNAPSHOT_H_
#define VATTN_MEMORY_SNAPSHOT_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory/file_ops.h"
#include "memory/snapshot_format.h"

namespace vattn {

// Writes into a temporary file (".vattn-<random>.tmp", mode 0600) in the directory of `path`, which
// Commit puts in place of whatever is there. Without Commit the destructor removes it; a process
// that dies leaves it behind, and nothing reads it. One thread at a time.
class SnapshotWriter {
 public:
  // layout: a fingerprint of everything a reader must agree on. ops must outlive the writer.
  static absl::StatusOr<std::unique_ptr<SnapshotWriter>> Create(
      std::string path, uint64_t layout, const FileOps& ops = kSystemFileOps);
  ~SnapshotWriter();

  SnapshotWriter(const SnapshotWriter&) = delete;
  SnapshotWriter& operator=(const SnapshotWriter&) = delete;

  // Appends one record, the parts one after the other, straight from the caller's memory, which is
  // not needed afterwards. After a failure every further call returns that failure.
  absl::Status Add(uint32_t type, std::span<const std::span<const std::byte>> parts);
  absl::Status Add(uint32_t type, std::span<const std::byte> payload);

  // Makes the file durable under `path`; the writer is then of no further use. On failure the file
  // that was there is untouched, with one exception: when only the last step fails, syncing the
  // directory, the new file is in place and whole, but a power cut may still bring back the old
  // one. The text says so.
  absl::Status Commit();

  // Of the file so far.
  uint64_t bytes_written() const { return end_; }

 private:
  SnapshotWriter(std::string path, std::string directory, std::string temporary, uint64_t layout,
                 const SnapshotFileId& file_id, int fd, const FileOps& ops);

  absl::Status Write(uint64_t offset, std::span<const std::byte> bytes);
  absl::Status WriteRecord(uint32_t type, std::span<const std::span<const std::byte>> parts);
  absl::Status PutInPlace();

  const std::string path_, directory_, temporary_;
  const uint64_t layout_;
  const SnapshotFileId file_id_;
  const FileOps& ops_;
  int fd_;                     // -1: closed
  bool has_temporary_ = true;  // to be unlinked
  uint64_t end_ = kSnapshotHeaderBytes;
  uint64_t num_records_ = 0;
  absl::Status status_;  // what the next call returns when not OK
};

struct SnapshotRecord {
  uint32_t type;
  uint64_t bytes;
};

// One thread at a time.
class SnapshotReader {
 public:
  // Checks the file header and every record header, so that records() is all true before anything
  // is allocated for it. ops must outlive the reader.
  static absl::StatusOr<std::unique_ptr<SnapshotReader>> Open(const std::string& path,
                                                              uint64_t layout,
                                                              const FileOps& ops = kSystemFileOps);
  ~SnapshotReader();

  SnapshotReader(const SnapshotReader&) = delete;
  SnapshotReader& operator=(const SnapshotReader&) = delete;

  // In the order they were added.
  const std::vector<SnapshotRecord>& records() const { return records_; }

  // Reads record `index` straight into the parts, whose sizes add up to its bytes, and checks it.
  // On failure the parts hold nothing of use.
  absl::Status Read(size_t index, std::span<const std::span<std::byte>> parts) const;
  absl::Status Read(size_t index, std::span<std::byte> payload) const;

 private:
  SnapshotReader(std::string path, int fd, const FileOps& ops);

  absl::Status ReadHeaders(uint64_t layout);
  absl::Status ReadBytes(uint64_t offset, std::span<std::byte> bytes) const;
  absl::Status CheckedRead(const SnapshotRecordHeader& header,
                           std::span<const std::span<std::byte>> parts) const;

  const std::string path_;
  const int fd_;
  const FileOps& ops_;
  std::vector<SnapshotRecord> records_;
  std::vector<SnapshotRecordHeader> headers_;  // of records_
};

}  // namespace vattn

#endif  // VATTN_MEMORY_SNAPSHOT_H_
