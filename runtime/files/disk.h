// The directory that a runtime owns: spilled sequences, and prefixes that outlive the process.
#ifndef VATTN_RUNTIME_FILES_DISK_H_
#define VATTN_RUNTIME_FILES_DISK_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "memory/owned_directory.h"
#include "memory/transfer_queue.h"
#include "runtime/options.h"
#include "runtime/prefix/lookup.h"
#include "runtime/prefix/prefix.h"
#include "runtime/stats.h"

namespace vattn {

class Disk;
class Runtime;
class Sequence;
struct SequenceOptions;

// Owns the file of a spilled sequence and its share of the directory's bytes: gone with the owner.
class SpillFile {
 public:
  SpillFile() = default;
  SpillFile(Disk* disk, std::string name, uint64_t bytes);
  SpillFile(SpillFile&& other) noexcept;
  SpillFile& operator=(SpillFile&& other) noexcept;
  ~SpillFile();

  std::string path() const;
  void SetBytes(uint64_t bytes);

 private:
  Disk* disk_ = nullptr;  // null: owns nothing
  std::string name_;
  uint64_t bytes_ = 0;
};

// Files "prefix-<layout>-<salt>-<prefix>.vattn" (digests in hexadecimal) and
// "spill-<process>-<random>-<number>.vattn"; others are left alone. A process that was forked from
// the owner reads what is there, and writes and removes nothing (INVALID_ARGUMENT). Prefixes go,
// those unused for longest first, when the limit would be passed; spilled sequences never do.
//
// Thread-safe. Files are read and written without the lock: they appear whole, are never changed,
// and one that is open can be read after its name is gone.
class Disk {
 public:
  using Log = std::function<void(LogLevel, const std::string&)>;

  // Takes the directory over: removes what spilled sequences of dead processes left, and finds the
  // stored prefixes. One that fails its check is removed and counted. limit_bytes 0: none.
  static absl::StatusOr<std::unique_ptr<Disk>> Open(const std::string& path, uint64_t limit_bytes,
                                                    uint64_t layout, const IoOptions& io,
                                                    Counters& counters, Log log);

  // Room and a name for a sequence of about `bytes` bytes. FULL.
  absl::StatusOr<SpillFile> NewSpill(uint64_t bytes);

  // Stores the first prefix.tokens of a sequence, unless that is there already. FULL.
  absl::Status Store(Sequence& sequence, Prefix prefix);
  // A new sequence that begins with the longest part of prefix.tokens that is stored under its
  // salt. NOT_FOUND: none, or none that can be read. FULL: see Sequence::Create.
  absl::StatusOr<std::unique_ptr<Sequence>> Begin(const std::shared_ptr<Runtime>& runtime,
                                                  const Prefix& prefix,
                                                  const SequenceOptions& options, int64_t* tokens);
  // Whole pieces of kPrefixTokens that the best stored prefix seems to share: digests alone are
  // compared.
  int64_t Pieces(const Prefix& prefix) const;
  // Removes every prefix stored under a salt, of any layout. *files: how many.
  absl::Status Forget(const std::string& salt, int64_t* files);

  uint64_t bytes() const;

 private:
  friend class SpillFile;
  Disk(std::unique_ptr<OwnedDirectory> directory, uint64_t limit_bytes, uint64_t layout,
       const IoOptions& io, Counters& counters, Log log);

  absl::Status TakeOver();
  // Reads the prefix of a file and enters it. DATA_LOSS, IO_ERROR.
  absl::Status Enter(const std::string& name, uint64_t bytes);
  // Sets `bytes` aside under the limit, evicting prefixes. FULL.
  absl::Status TakeBytesLocked(uint64_t bytes);
  void GiveBytes(uint64_t bytes);
  // Drops a prefix and removes its file; a file that stays is no more than lost room.
  void DropLocked(const std::string& name);
  std::string NameOf(const Prefix& prefix) const;

  const std::unique_ptr<OwnedDirectory> directory_;
  const uint64_t limit_bytes_, layout_;
  const IoOptions io_;
  Counters& counters_;
  const Log log_;
  mutable std::mutex mutex_;  // guards what follows
  PrefixIndex index_;
  uint64_t bytes_ = 0;  // of all files, written or promised
  const std::string spill_start_;
  uint64_t next_spill_ = 0;
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_FILES_DISK_H_
