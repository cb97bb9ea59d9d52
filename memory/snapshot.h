// A file of typed byte records that appears whole or not at all and refuses to be read when a
// single byte of it has changed. snapshot_format.h has the bytes.
//
// Codes: NOT_FOUND no such file; DATA_LOSS truncated, changed, foreign or of another layout;
// IO_ERROR the system refused, the text has the path and the reason.
#ifndef VATTN_MEMORY_SNAPSHOT_H_
#define VATTN_MEMORY_SNAPSHOT_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "memory/checksum.h"
#include "memory/save_target.h"
#include "memory/snapshot_format.h"
#include "memory/transfer_queue.h"

namespace vattn {

// Writes into a file without a name (O_TMPFILE, mode 0600) in the directory of `path`: a process
// that dies leaves nothing. Commit names it ".vattn-<random>.tmp" and puts it in place of whatever
// is there. Where the file system has no such files the temporary has its name from the start;
// without Commit the destructor removes it, a process that dies leaves it behind, and nothing reads
// it. One thread at a time.
class SnapshotWriter {
 public:
  // layout: a fingerprint of everything a reader must agree on. expected_bytes: of the file, 0 if
  // unknown; room for them is asked for before the first one is written, the file may become longer
  // or shorter all the same.
  static absl::StatusOr<std::unique_ptr<SnapshotWriter>> Create(std::string path, uint64_t layout,
                                                                uint64_t expected_bytes,
                                                                const IoOptions& io);
  // In place of a plain file, whose mode it keeps, and its owner as far as that is allowed; or
  // where nothing is.
  static absl::StatusOr<std::unique_ptr<SnapshotWriter>> Create(const SaveTarget& target,
                                                                uint64_t layout,
                                                                uint64_t expected_bytes,
                                                                const IoOptions& io);
  ~SnapshotWriter();

  SnapshotWriter(const SnapshotWriter&) = delete;
  SnapshotWriter& operator=(const SnapshotWriter&) = delete;

  // Appends one record, the parts one after the other. Its checksum is that of the caller's memory,
  // taken before anything is copied. The memory is not needed afterwards. After a failure every
  // further call returns that failure.
  absl::Status Add(uint32_t type, std::span<const std::span<const std::byte>> parts);
  absl::Status Add(uint32_t type, std::span<const std::byte> payload);

  // Puts the file in place, durable unless nobody needs it after a power cut (durable false:
  // nothing is synced); the writer is then of no further use. On failure the file that was there is
  // untouched, with one exception: when only the last step fails, syncing the directory, the new
  // file is in place and whole, but a power cut may still bring back the old one. The text says so.
  absl::Status Commit(bool durable = true);

  // Of the file so far; after Commit of the whole file.
  uint64_t bytes_written() const { return end_; }
  const SnapshotFileId& file_id() const { return file_id_; }

 private:
  SnapshotWriter(std::string path, std::string directory, std::string temporary, uint64_t layout,
                 const SnapshotFileId& file_id, const FileOps& ops);

  absl::Status OpenTemporary();
  absl::Status Prepare(uint64_t expected_bytes, const IoOptions& io);
  absl::Status Append(std::span<const std::byte> bytes, Checksum* checksum);
  absl::Status AppendZeros(uint64_t count);
  // Starts to write the buffer that is being filled.
  absl::Status WriteBuffer();
  absl::Status WriteHeaders();
  absl::Status PutInPlace(bool durable);

  const std::string path_, directory_, temporary_;
  const uint64_t layout_;
  const SnapshotFileId file_id_;
  const FileOps& ops_;
  int fd_ = -1;                 // -1: closed
  bool nameless_ = false;       // Commit gives the temporary its name
  bool has_temporary_ = false;  // to be unlinked
  std::unique_ptr<TransferQueue> queue_;
  int filling_ = 0;         // buffer that the end of the file goes to
  uint64_t start_ = 0;      // of that buffer in the file
  uint64_t end_ = 0;        // of the file
  uint64_t allocated_ = 0;  // bytes that the file has been given
  std::array<std::byte, kSnapshotFileAlignment> first_block_{};  // written again with the header
  std::vector<SnapshotRecordHeader> records_;
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
  // is allocated for it.
  static absl::StatusOr<std::unique_ptr<SnapshotReader>> Open(const std::string& path,
                                                              uint64_t layout, const IoOptions& io);
  ~SnapshotReader();

  SnapshotReader(const SnapshotReader&) = delete;
  SnapshotReader& operator=(const SnapshotReader&) = delete;

  // In the order they were added.
  const std::vector<SnapshotRecord>& records() const { return records_; }
  uint64_t file_bytes() const { return file_.file_bytes; }
  // Random, of no other file: tells whether the file under a name is still the one that was
  // written.
  const SnapshotFileId& file_id() const { return file_.file_id; }

  // Reads records first, first + 1, ... each into the payload of its place, whose size is its
  // bytes, and checks what has arrived there. On failure the payloads hold nothing of use.
  absl::Status Read(size_t first, std::span<const std::span<std::byte>> payloads);
  absl::Status Read(size_t index, std::span<std::byte> payload);

 private:
  using Take = std::function<absl::Status(std::span<const std::byte> bytes)>;

  SnapshotReader(std::string path, const FileOps& ops);

  absl::Status ReadHeaders(uint64_t layout, const IoOptions& io);
  absl::Status CheckedRead(size_t first, std::span<const std::span<std::byte>> payloads);
  // Bytes [offset, end) of the file, in order and in pieces, until one is not taken.
  absl::Status Stream(uint64_t offset, uint64_t end, const Take& take);

  const std::string path_;
  int fd_ = -1;
  const FileOps& ops_;
  std::unique_ptr<TransferQueue> queue_;
  SnapshotFileHeader file_{};
  std::vector<SnapshotRecord> records_;
  std::vector<SnapshotRecordHeader> headers_;  // of records_
};

}  // namespace vattn

#endif  // VATTN_MEMORY_SNAPSHOT_H_
