// Crash loop: a child saves records without end and is killed, at a random moment or at a call of its
// own (before it, after it, or in the middle of a transfer); then every record must be whole: as it
// was acknowledged last, or as it was being saved. Not a power cut: what the kernel was given stays.
//
//   snapshot_crash [--kills 2000] [--seed 1] [--directory DIR]
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "memory/owned_directory.h"
#include "memory/snapshot.h"
#include "memory/status.h"

namespace vattn {
namespace {

constexpr uint64_t kLayout = 7;
constexpr uint32_t kRecords = 4;

struct Acknowledged {
  uint32_t record;
  uint32_t version;
};

// Content of a version of a record: its size and bytes follow from both numbers.
std::vector<std::vector<std::byte>> ContentOf(uint32_t record, uint32_t version) {
  std::mt19937 engine(record * 1000003 + version);
  std::vector<std::vector<std::byte>> payloads(1 + engine() % 3);
  for (std::vector<std::byte>& payload : payloads) {
    payload.resize(engine() % 60000);
    for (size_t i = 0; i < payload.size(); i += 4) {
      const uint32_t word = engine();
      std::memcpy(payload.data() + i, &word, std::min<size_t>(4, payload.size() - i));
    }
  }
  return payloads;
}

std::string PathOf(const std::string& directory, uint32_t record) {
  return directory + "/record-" + std::to_string(record);
}

// Where the child dies by itself.
struct Death {
  int64_t call = 0;  // of the table, from 1; 0: nowhere
  int where = 0;     // 0: before it, 1: after it, 2: with half of a transfer done
};

Death death;
int64_t calls = 0;

// Runs a call of the table and dies there if it is the one.
template <class Call>
auto Mortal(Call&& call) {
  const bool last = ++calls == death.call;
  if (last && death.where == 0) std::raise(SIGKILL);
  const auto result = call();
  if (last) std::raise(SIGKILL);
  return result;
}

size_t Half(size_t bytes) {
  return calls + 1 == death.call && death.where == 2 ? bytes / 2 : bytes;
}

FileOps MortalOps() {
  FileOps ops = kSystemFileOps;
  ops.open = [](const char* path, int flags, mode_t mode) {
    return Mortal([&] { return kSystemFileOps.open(path, flags, mode); });
  };
  ops.pwrite = [](int fd, const void* data, size_t bytes, off_t offset) {
    const size_t most = Half(bytes);
    return Mortal([&] { return kSystemFileOps.pwrite(fd, data, most, offset); });
  };
  ops.ring_submit = [](Ring* ring, const RingTransfer& transfer) {
    RingTransfer part = transfer;
    part.bytes = Half(transfer.bytes);
    return Mortal([&] { return kSystemFileOps.ring_submit(ring, part); });
  };
  ops.ring_wait = [](Ring* ring, int timeout_ms, RingDone* done) {
    return Mortal([&] { return kSystemFileOps.ring_wait(ring, timeout_ms, done); });
  };
  ops.rename = [](const char* from, const char* to) {
    return Mortal([&] { return kSystemFileOps.rename(from, to); });
  };
  // The kernel outlives the child: what it has been given needs no disk to stay.
  ops.fdatasync = [](int) { return Mortal([] { return 0; }); };
  ops.fsync = [](int) { return Mortal([] { return 0; }); };
  ops.close = [](int fd) { return Mortal([&] { return kSystemFileOps.close(fd); }); };
  ops.ftruncate = [](int fd, off_t bytes) {
    return Mortal([&] { return kSystemFileOps.ftruncate(fd, bytes); });
  };
  ops.unlink = [](const char* path) { return Mortal([&] { return kSystemFileOps.unlink(path); }); };
  return ops;
}

absl::Status Save(const std::string& path, uint32_t record, uint32_t version, const IoOptions& io) {
  const std::vector<std::vector<std::byte>> payloads = ContentOf(record, version);
  // With and without room asked for ahead, too much of it or too little.
  absl::StatusOr<std::unique_ptr<SnapshotWriter>> writer =
      SnapshotWriter::Create(path, kLayout, version % 3 * 50000, io);
  if (!writer.ok()) return writer.status();
  for (const std::vector<std::byte>& payload : payloads) {
    VATTN_RETURN_IF_ERROR((*writer)->Add(version, payload));
  }
  return (*writer)->Commit();
}

// Saves one version after the other of one record after the other, and tells each that is done.
[[noreturn]] void Child(const std::string& directory, std::array<uint32_t, kRecords> versions,
                        const IoOptions& io, int pipe) {
  const auto owned = OwnedDirectory::Open(directory, *io.ops);
  if (!owned.ok()) _exit(3);
  for (uint32_t record = 0;; record = (record + 1) % kRecords) {
    const uint32_t version = ++versions[record];
    if (!Save(PathOf(directory, record), record, version, io).ok()) _exit(4);
    const Acknowledged done = {record, version};
    if (write(pipe, &done, sizeof(done)) != sizeof(done)) _exit(5);
  }
}

// The version in a file; 0: there is none. Anything but one whole version is an error.
absl::StatusOr<uint32_t> VersionIn(const std::string& path, uint32_t record) {
  absl::StatusOr<std::unique_ptr<SnapshotReader>> reader = SnapshotReader::Open(path, kLayout, {});
  if (CodeOf(reader.status()) == Code::kNotFound) return 0;
  VATTN_RETURN_IF_ERROR(reader.status());
  const std::vector<SnapshotRecord>& records = (*reader)->records();
  if (records.empty()) return DataLossError(path, ": is empty");
  const uint32_t version = records[0].type;
  const std::vector<std::vector<std::byte>> expected = ContentOf(record, version);
  if (records.size() != expected.size()) return DataLossError(path, ": lacks records");
  for (size_t i = 0; i < records.size(); ++i) {
    std::vector<std::byte> payload(records[i].bytes);
    VATTN_RETURN_IF_ERROR((*reader)->Read(i, payload));
    if (payload != expected[i])
      return DataLossError(path, ": record ", i, " is of another version");
  }
  return version;
}

struct Tally {
  int64_t kills = 0, in_flight_kept = 0, leftovers = 0, saves = 0;
};

// One child's life. False, and a line on stderr, if it left anything but whole records.
bool LiveAndDie(const std::string& directory, std::mt19937& engine,
                std::array<uint32_t, kRecords>& versions, Tally& tally) {
  const bool by_call = engine() % 2 == 0;
  death = {.call = by_call ? 1 + static_cast<int64_t>(engine() % 150) : 0,
           .where = static_cast<int>(engine() % 3)};
  const FileOps ops = MortalOps();
  const IoOptions io = {.ops = &ops,
                        .uring = engine() % 2 == 0,
                        .direct = engine() % 2 == 0,
                        .depth = 1 + static_cast<uint32_t>(engine() % 4),
                        .block_bytes = 4096u << engine() % 4};
  const auto moment = std::chrono::microseconds(engine() % 15000);
  int pipes[2];
  if (pipe(pipes) != 0) return false;
  const pid_t child = fork();
  if (child == 0) {
    close(pipes[0]);
    Child(directory, versions, io, pipes[1]);
  }
  close(pipes[1]);
  if (!by_call) {
    std::this_thread::sleep_for(moment);
    kill(child, SIGKILL);
  }
  Acknowledged done;
  std::array<uint32_t, kRecords> acknowledged = versions;
  while (read(pipes[0], &done, sizeof(done)) == sizeof(done)) {
    acknowledged[done.record] = done.version;
    ++tally.saves;
  }
  close(pipes[0]);
  int status = 0;
  waitpid(child, &status, 0);
  if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL) {
    std::fprintf(stderr, "the child was not killed: status %d\n", status);
    return false;
  }
  ++tally.kills;
  int in_flight = 0;
  for (uint32_t record = 0; record < kRecords; ++record) {
    const absl::StatusOr<uint32_t> version = VersionIn(PathOf(directory, record), record);
    if (!version.ok()) {
      std::fprintf(stderr, "%s\n", std::string(version.status().message()).c_str());
      return false;
    }
    in_flight += *version == acknowledged[record] + 1;
    if (*version != acknowledged[record] && *version != acknowledged[record] + 1) {
      std::fprintf(stderr, "record %u is version %u, acknowledged %u\n", record, *version,
                   acknowledged[record]);
      return false;
    }
    versions[record] = *version;
  }
  tally.in_flight_kept += in_flight;
  int temporaries = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    temporaries += entry.path().extension() == ".tmp";
  }
  tally.leftovers += temporaries;
  // One record at a time is saved, and each child clears up what the one before it left.
  if (in_flight <= 1 && temporaries <= 1) return true;
  std::fprintf(stderr, "%d records in flight, %d temporary files\n", in_flight, temporaries);
  return false;
}

}  // namespace

int Run(int64_t kills, uint32_t seed, const std::string& parent) {
  std::string directory = parent + "/vattn_crash_XXXXXX";
  if (mkdtemp(directory.data()) == nullptr) {
    std::fprintf(stderr, "%s: %s\n", directory.c_str(), std::strerror(errno));
    return 1;
  }
  std::mt19937 engine(seed);
  std::array<uint32_t, kRecords> versions{};
  Tally tally;
  bool good = true;
  while (good && tally.kills < kills) good = LiveAndDie(directory, engine, versions, tally);
  std::filesystem::remove_all(directory);
  std::printf(
      "seed %u: %ld kills, %ld saves, %ld kept though not acknowledged, %ld temporary files left: "
      "%s\n",
      seed, static_cast<long>(tally.kills), static_cast<long>(tally.saves),
      static_cast<long>(tally.in_flight_kept), static_cast<long>(tally.leftovers),
      good ? "every record whole" : "FAILED");
  // A loop that never kills between the rename and the word of it has not been at the edge.
  return good && tally.saves > kills / 4 && (kills < 1000 || tally.in_flight_kept > 0) ? 0 : 1;
}

}  // namespace vattn

int main(int argc, char** argv) {
  long kills = 2000, seed = 1;
  const char* directory = std::getenv("TEST_TMPDIR");
  std::string parent = directory != nullptr ? directory : "/tmp";
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--kills") == 0) kills = std::atol(argv[i + 1]);
    if (std::strcmp(argv[i], "--seed") == 0) seed = std::atol(argv[i + 1]);
    if (std::strcmp(argv[i], "--directory") == 0) parent = argv[i + 1];
  }
  return vattn::Run(kills, static_cast<uint32_t>(seed), parent);
}
