#include "runtime/files/disk.h"

#include <unistd.h>

#include <algorithm>
#include <new>
#include <random>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "memory/status.h"
#include "runtime/files/sequence_file.h"
#include "runtime/log.h"
#include "runtime/sequence.h"

namespace vattn {
namespace {

std::string Hex(const Digest& digest) {
  return absl::StrCat(absl::Hex(digest.high, absl::kZeroPad16),
                      absl::Hex(digest.low, absl::kZeroPad16));
}

std::string HexOfSalt(const std::string& salt) {
  return Hex(DigestOf(std::as_bytes(std::span(salt))));
}

constexpr char kPrefixStart[] = "prefix-", kSpillStart[] = "spill-", kEnd[] = ".vattn";

// Of no other runtime, before or after, here or in a process forked from this one.
std::string SpillStart() {
  std::random_device random;
  return absl::StrCat(kSpillStart, getpid(), "-", absl::Hex(random(), absl::kZeroPad8),
                      absl::Hex(random(), absl::kZeroPad8), "-");
}

}  // namespace

SpillFile::SpillFile(Disk* disk, std::string name, uint64_t bytes)
    : disk_(disk), name_(std::move(name)), bytes_(bytes) {}

SpillFile::SpillFile(SpillFile&& other) noexcept
    : disk_(std::exchange(other.disk_, nullptr)),
      name_(std::move(other.name_)),
      bytes_(other.bytes_) {}

SpillFile& SpillFile::operator=(SpillFile&& other) noexcept {
  std::swap(disk_, other.disk_);
  std::swap(name_, other.name_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

SpillFile::~SpillFile() {
  if (disk_ == nullptr) return;
  disk_->GiveBytes(bytes_);
  // The file is of the process that this one was forked from
  if (!disk_->directory_->IsHere()) return;
  try {
    const absl::Status removed = disk_->directory_->Remove(name_);
    if (removed.ok()) return;
    disk_->log_(LogLevel::kWarning,
                absl::StrCat("a file of a spilled sequence stays: ", removed.message()));
  } catch (const std::bad_alloc&) {
    // It stays for the next owner of the directory, who removes it.
  }
  ++disk_->counters_.io_errors;
}

std::string SpillFile::path() const { return disk_->directory_->PathOf(name_); }

void SpillFile::SetBytes(uint64_t bytes) {
  const std::lock_guard<std::mutex> lock(disk_->mutex_);
  disk_->bytes_ += bytes - bytes_;
  bytes_ = bytes;
}

absl::StatusOr<std::unique_ptr<Disk>> Disk::Open(const std::string& path, uint64_t limit_bytes,
                                                 uint64_t layout, const IoOptions& io,
                                                 Counters& counters, Log log) {
  absl::StatusOr<std::unique_ptr<OwnedDirectory>> directory = OwnedDirectory::Open(path, *io.ops);
  if (!directory.ok()) {
    return MakeError(CodeOf(directory.status()),
                     absl::StrCat("disk_path: ", directory.status().message()));
  }
  std::unique_ptr<Disk> disk(
      new Disk(*std::move(directory), limit_bytes, layout, io, counters, std::move(log)));
  VATTN_RETURN_IF_ERROR(disk->TakeOver());
  return disk;
}

Disk::Disk(std::unique_ptr<OwnedDirectory> directory, uint64_t limit_bytes, uint64_t layout,
           const IoOptions& io, Counters& counters, Log log)
    : directory_(std::move(directory)),
      limit_bytes_(limit_bytes),
      layout_(layout),
      io_(io),
      counters_(counters),
      log_(std::move(log)),
      spill_start_(SpillStart()) {}

uint64_t Disk::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return bytes_;
}

absl::Status Disk::TakeOver() {
  const LogHold hold;
  const absl::StatusOr<std::vector<std::string>> names = directory_->List();
  if (!names.ok()) return names.status();
  const std::string ours = absl::StrCat(kPrefixStart, absl::Hex(layout_, absl::kZeroPad16), "-");
  for (const std::string& name : *names) {
    if (!absl::EndsWith(name, kEnd)) continue;
    if (absl::StartsWith(name, kSpillStart)) VATTN_RETURN_IF_ERROR(directory_->Remove(name));
    if (!absl::StartsWith(name, kPrefixStart)) continue;
    const absl::StatusOr<uint64_t> bytes = directory_->FileBytes(name);
    if (!bytes.ok()) return bytes.status();
    const absl::Status entered =
        absl::StartsWith(name, ours) ? Enter(name, *bytes) : absl::OkStatus();
    const std::lock_guard<std::mutex> lock(mutex_);
    // Those of another layout only take room, and are the first to go.
    if (!index_.Has(name)) index_.Add(name, {}, 0, *bytes, 0);
    bytes_ += *bytes;
    if (CodeOf(entered) == Code::kDataLoss) {
      ++counters_.disk_prefixes_damaged;
      DropLocked(name);
    }
    if (!entered.ok())
      log_(LogLevel::kWarning, absl::StrCat("a stored prefix cannot be used: ", entered.message()));
  }
  return absl::OkStatus();
}

absl::Status Disk::Enter(const std::string& name, uint64_t bytes) {
  SavedHead head;
  const std::string path = directory_->PathOf(name);
  absl::StatusOr<std::unique_ptr<SnapshotReader>> reader = OpenSaved(path, layout_, io_, head);
  absl::Status status = reader.status();
  if (status.ok()) {
    const absl::StatusOr<StoredPrefix> stored = ReadPrefix(**reader, path);
    status = stored.status();
    if (status.ok() && NameOf(stored->prefix) != name)
      status = DataLossError(path, ": holds another prefix");
    if (status.ok()) {
      const std::lock_guard<std::mutex> lock(mutex_);
      const int64_t tokens = static_cast<int64_t>(stored->prefix.tokens.size());
      index_.Add(name, ChainOf(stored->prefix), tokens, bytes, stored->stored);
    }
  }
  if (CodeOf(status) == Code::kIoError) ++counters_.io_errors;
  return status;
}

std::string Disk::NameOf(const Prefix& prefix) const {
  const Digest all = DigestOf(std::as_bytes(std::span(prefix.tokens)),
                              DigestOf(std::as_bytes(std::span(prefix.salt))));
  return absl::StrCat(kPrefixStart, absl::Hex(layout_, absl::kZeroPad16), "-",
                      HexOfSalt(prefix.salt), "-", Hex(all), kEnd);
}

void Disk::DropLocked(const std::string& name) {
  const absl::Status removed = directory_->IsHere() ? directory_->Remove(name) : absl::OkStatus();
  if (!removed.ok()) {
    ++counters_.io_errors;
    log_(LogLevel::kWarning, absl::StrCat("a stored prefix stays: ", removed.message()));
  }
  bytes_ -= index_.Remove(name);
}

absl::Status Disk::TakeBytesLocked(uint64_t bytes) {
  const auto fits = [&] {
    return limit_bytes_ == 0 || (bytes <= limit_bytes_ && bytes_ <= limit_bytes_ - bytes);
  };
  const uint64_t kept = bytes_ - index_.bytes();  // what eviction cannot free
  const bool can_fit = limit_bytes_ == 0 || (bytes <= limit_bytes_ && kept <= limit_bytes_ - bytes);
  while (can_fit && !fits()) {
    DropLocked(index_.Oldest());
    ++counters_.disk_prefixes_evicted;
  }
  if (fits()) {
    bytes_ += bytes;
    return absl::OkStatus();
  }
  return FullError("the disk is full: need ", bytes, " bytes, ", bytes_, " are in use, limit ",
                   limit_bytes_, "; raise disk_bytes or free sequences");
}

void Disk::GiveBytes(uint64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  bytes_ -= bytes;
}

absl::StatusOr<SpillFile> Disk::NewSpill(uint64_t bytes) {
  VATTN_RETURN_IF_ERROR(directory_->CheckOwned());
  const LogHold hold;
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string name = absl::StrCat(spill_start_, next_spill_++, kEnd);
  VATTN_RETURN_IF_ERROR(TakeBytesLocked(bytes));
  return SpillFile(this, std::move(name), bytes);
}

absl::Status Disk::Store(Sequence& sequence, Prefix prefix) {
  VATTN_RETURN_IF_ERROR(directory_->CheckOwned());
  const LogHold hold;
  const std::string name = NameOf(prefix);
  const uint64_t expected =
      sequence.SavedBytes() + prefix.salt.size() + prefix.tokens.size() * sizeof(int32_t);
  uint64_t stored;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (index_.Has(name)) {
      index_.Use(name);
      return absl::OkStatus();
    }
    VATTN_RETURN_IF_ERROR(TakeBytesLocked(expected));
    stored = index_.next_use();
  }
  const absl::Cleanup give = [&] { GiveBytes(expected); };
  const StoredPrefix file = {.prefix = std::move(prefix), .stored = stored};
  const std::vector<Digest> chain = ChainOf(file.prefix);
  const absl::StatusOr<SavedFile> saved =
      sequence.SaveAs({.path = directory_->PathOf(name)}, &file, /*durable=*/true);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!saved.ok()) {
    // In place, but not surely durable: then it does not count as stored.
    if (!index_.Has(name)) directory_->Remove(name).IgnoreError();
    return saved.status();
  }
  // Another thread may have stored the same meanwhile: this file has taken that one's place.
  bytes_ -= index_.Remove(name);
  index_.Add(name, chain, static_cast<int64_t>(file.prefix.tokens.size()), saved->bytes,
             index_.next_use());
  bytes_ += saved->bytes;
  ++counters_.disk_prefixes_saved;
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Sequence>> Disk::Begin(const std::shared_ptr<Runtime>& runtime,
                                                      const Prefix& prefix,
                                                      const SequenceOptions& options,
                                                      int64_t* tokens) {
  const LogHold hold;
  std::vector<std::string> names;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    names = index_.Find(ChainOf(prefix));
  }
  for (const std::string& name : names) {
    const std::string path = directory_->PathOf(name);
    SavedHead head;
    absl::StatusOr<std::unique_ptr<SnapshotReader>> reader = OpenSaved(path, layout_, io_, head);
    absl::Status status = reader.status();
    if (status.ok()) {
      const absl::StatusOr<StoredPrefix> stored = ReadPrefix(**reader, path);
      status = stored.status();
      // A digest is no proof: what was stored is compared.
      const int64_t shared = status.ok() ? SharedTokens(stored->prefix, prefix) : 0;
      if (status.ok() && shared < kPrefixTokens) {
        ++counters_.prefix_mismatches;
        continue;
      }
      if (status.ok()) {
        absl::StatusOr<std::unique_ptr<Sequence>> made =
            Sequence::FromPrefix(runtime, options, **reader, path, shared);
        status = made.status();
        if (status.ok()) {
          const std::lock_guard<std::mutex> lock(mutex_);
          index_.Use(name);
          ++counters_.prefix_hits;
          counters_.prefix_tokens += static_cast<uint64_t>(shared);
          *tokens = shared;
          return made;
        }
      }
    }
    const Code code = CodeOf(status);
    if (code != Code::kDataLoss && code != Code::kIoError && code != Code::kNotFound) return status;
    if (code != Code::kNotFound) {  // else it went while we looked
      log_(LogLevel::kWarning, absl::StrCat("a stored prefix cannot be used: ", status.message()));
    }
    if (code == Code::kIoError) {
      ++counters_.disk_prefixes_unread;
      continue;
    }
    if (code == Code::kDataLoss) ++counters_.disk_prefixes_damaged;
    const std::lock_guard<std::mutex> lock(mutex_);
    DropLocked(name);
  }
  return NoSuchPrefixError(prefix);
}

int64_t Disk::Pieces(const Prefix& prefix) const {
  const std::vector<Digest> chain = ChainOf(prefix);
  const std::lock_guard<std::mutex> lock(mutex_);
  return index_.Pieces(chain);
}

absl::Status Disk::Forget(const std::string& salt, int64_t* files) {
  VATTN_RETURN_IF_ERROR(directory_->CheckOwned());
  const std::string part = absl::StrCat("-", HexOfSalt(salt), "-");
  const std::lock_guard<std::mutex> lock(mutex_);
  *files = 0;
  for (const std::string& name : index_.Names()) {
    if (!absl::StrContains(name, part)) continue;
    const absl::Status removed = directory_->Remove(name);
    if (!removed.ok()) {
      ++counters_.io_errors;
      return removed;
    }
    bytes_ -= index_.Remove(name);
    ++*files;
  }
  return absl::OkStatus();
}

}  // namespace vattn
