// What a path leads to when a file is saved: links, devices, pipes, folders; and names that come to
// mean something else afterwards.
#include "memory/save_target.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <fstream>

#include "memory/owned_directory.h"
#include "memory/snapshot.h"
#include "tests/runtime/disk_world.h"

namespace vattn {
namespace {

class SaveTargetTest : public testing::Test {
 protected:
  SaveTargetTest() {
    Options options = DiskOptions(true, "");
    runtime_ = OpenRuntime(options, kSystemFileOps);
    sequence_ = MakeSequence(runtime_, 600, 1);
    content_ = ContentOf(*sequence_);
  }
  void ExpectRestores(const std::string& path) {
    const auto restored = Sequence::Restore(runtime_, path);
    ASSERT_TRUE(restored.ok()) << restored.status();
    EXPECT_EQ(ContentOf(**restored), content_);
  }
  static mode_t ModeOf(const std::string& path) {
    struct stat stat = {};
    EXPECT_EQ(lstat(path.c_str(), &stat), 0) << path;
    return stat.st_mode;
  }

  ScratchDirectory scratch_;
  std::shared_ptr<Runtime> runtime_;
  std::unique_ptr<Sequence> sequence_;
  std::string content_;
};

TEST_F(SaveTargetTest, OnlyPlainFilesAreReplaced) {
  const std::string pipe = scratch_ / "pipe", folder = scratch_ / "folder",
                    socket_path = scratch_ / "socket";
  ASSERT_EQ(mkfifo(pipe.c_str(), 0644), 0);
  std::filesystem::create_directory(folder);
  const int listener = socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  socket_path.copy(address.sun_path, sizeof(address.sun_path) - 1);
  ASSERT_EQ(bind(listener, reinterpret_cast<const sockaddr*>(&address), sizeof(address)), 0);
  std::filesystem::create_symlink("/dev/null", scratch_ / "null");
  std::filesystem::create_symlink("pipe", scratch_ / "to_pipe");
  for (const auto& [name, kind] : {std::pair<std::string, std::string>{"pipe", "a named pipe"},
                                   {"folder", "a directory"},
                                   {"socket", "a socket"},
                                   {"null", "a device"},
                                   {"to_pipe", "a named pipe"}}) {
    const mode_t before = ModeOf(scratch_ / name);
    for (const bool hibernate : {false, true}) {
      const absl::Status status =
          hibernate ? sequence_->Hibernate(scratch_ / name) : sequence_->Save(scratch_ / name);
      EXPECT_EQ(CodeOf(status), Code::kInvalidArgument) << status;
      EXPECT_NE(status.message().find(kind), absl::string_view::npos) << status;
      EXPECT_NE(status.message().find(name), absl::string_view::npos) << status;
    }
    EXPECT_EQ(ModeOf(scratch_ / name), before) << name;
  }
  EXPECT_EQ(std::filesystem::status("/dev/null").type(), std::filesystem::file_type::character);
  // Open files by their number.
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const int nameless = open((scratch_ / "").c_str(), O_TMPFILE | O_RDWR, 0600);
  for (const int fd : {ends[1], nameless}) {
    if (fd < 0) continue;
    EXPECT_EQ(CodeOf(sequence_->Save("/proc/self/fd/" + std::to_string(fd))),
              Code::kInvalidArgument);
    close(fd);
  }
  close(ends[0]);
  EXPECT_FALSE(sequence_->hibernated());
  close(listener);
}

TEST_F(SaveTargetTest, LinksAreFollowed) {
  std::filesystem::create_directories(scratch_ / "a/b");
  std::ofstream(scratch_ / "a/file") << "old";
  std::filesystem::create_symlink("a/file", scratch_ / "link");
  std::filesystem::create_symlink("../link", scratch_ / "a/second");
  std::filesystem::create_symlink("b/new", scratch_ / "a/dangling");
  std::filesystem::create_symlink("loop", scratch_ / "loop");
  ASSERT_TRUE(sequence_->Save(scratch_ / "a/second").ok());
  EXPECT_TRUE(S_ISLNK(ModeOf(scratch_ / "link")) && S_ISLNK(ModeOf(scratch_ / "a/second")));
  ExpectRestores(scratch_ / "a/file");
  ASSERT_TRUE(sequence_->Save(scratch_ / "a/dangling").ok());
  ExpectRestores(scratch_ / "a/b/new");
  const absl::Status loop = sequence_->Save(scratch_ / "loop");
  EXPECT_EQ(CodeOf(loop), Code::kIoError) << loop;
  EXPECT_NE(loop.message().find("loop"), absl::string_view::npos) << loop;
}

TEST_F(SaveTargetTest, AFilesModeIsKept) {
  for (const mode_t mode : {0644, 0600, 0640, 0400}) {
    const std::string path = scratch_ / ("mode" + std::to_string(mode));
    std::ofstream(path) << "old";
    ASSERT_EQ(chmod(path.c_str(), mode), 0);
    ASSERT_TRUE(sequence_->Save(path).ok());
    EXPECT_EQ(ModeOf(path) & 0777, mode);
  }
  ASSERT_TRUE(sequence_->Save(scratch_ / "new").ok());
  EXPECT_EQ(ModeOf(scratch_ / "new") & 0777, 0600u);  // rows of a conversation are its owner's
}

// A relative path means what it meant when it was given.
TEST_F(SaveTargetTest, ChangesOfDirectoryDoNotMatter) {
  const std::filesystem::path before = std::filesystem::current_path();
  std::filesystem::create_directories(scratch_ / "elsewhere");
  std::filesystem::current_path(scratch_ / "");
  Options options = DiskOptions(true, "disk", 36);
  options.spill = true;
  std::shared_ptr<Runtime> runtime = OpenRuntime(options, kSystemFileOps);
  ASSERT_TRUE(sequence_->Hibernate("asleep").ok());
  std::vector<std::unique_ptr<Sequence>> sequences;
  for (uint32_t i = 0; i < 4; ++i) sequences.push_back(MakeSequence(runtime, 600, i));
  std::filesystem::current_path(scratch_ / "elsewhere");
  EXPECT_TRUE(sequence_->Wake().ok());
  EXPECT_EQ(ContentOf(*sequence_), content_);
  for (uint32_t i = 4; i < 7; ++i) sequences.push_back(MakeSequence(runtime, 600, i));
  for (const auto& each : sequences) EXPECT_TRUE(each->Wake().ok());
  EXPECT_TRUE(runtime->disk()->Store(*sequences[0], MakePrefix("salt", 600)).ok());
  EXPECT_TRUE(std::filesystem::is_empty(scratch_ / "elsewhere"));
  EXPECT_EQ(runtime->options().disk_path[0], '/');
  std::filesystem::current_path(before);
}

// A sequence wakes from the file that it went into, whatever is under that name now.
TEST_F(SaveTargetTest, AReplacedFileIsDataLoss) {
  const std::string path = scratch_ / "asleep";
  ASSERT_TRUE(sequence_->Save(scratch_ / "saved").ok());
  // Two of the same number and step, with different tokens: their files agree in all that is not
  // random.
  std::unique_ptr<Sequence> one = *Sequence::Restore(runtime_, scratch_ / "saved");
  std::unique_ptr<Sequence> two = *Sequence::Restore(runtime_, scratch_ / "saved");
  ASSERT_TRUE(two->Truncate(400).ok());
  ASSERT_TRUE(AppendRandom(*two, 200, 7).ok());
  const std::string content_of_two = ContentOf(*two);
  ASSERT_TRUE(one->Hibernate(path).ok());
  ASSERT_TRUE(two->Hibernate(path).ok());
  const absl::Status status = one->Wake();
  EXPECT_EQ(CodeOf(status), Code::kDataLoss) << status;
  EXPECT_NE(status.message().find("another one was put in its place"), absl::string_view::npos)
      << status;
  EXPECT_TRUE(one->hibernated());
  std::filesystem::rename(path, scratch_ / "away");
  std::filesystem::copy(scratch_ / "away", path);  // the same file again, as from a backup
  EXPECT_TRUE(two->Wake().ok());
  EXPECT_EQ(ContentOf(*two), content_of_two);
}

// Whoever cleans up old files takes no lock away, and a folder that is put in the place of the
// owned one is not.
TEST_F(SaveTargetTest, TheDirectoryIsOwnedNotItsName) {
  Options options = DiskOptions(true, scratch_ / "disk", 36);
  options.spill = true;
  const std::shared_ptr<Runtime> runtime = OpenRuntime(options, kSystemFileOps);
  std::filesystem::remove(scratch_ / "disk/.vattn-lock");
  EXPECT_EQ(CodeOf(Runtime::Create(options, nullptr).status()), Code::kInvalidArgument);
  std::filesystem::create_symlink("disk", scratch_ / "alias");
  Options alias = options;
  alias.disk_path = scratch_ / "alias";
  EXPECT_EQ(CodeOf(Runtime::Create(alias, nullptr).status()), Code::kInvalidArgument);

  std::filesystem::rename(scratch_ / "disk", scratch_ / "moved");
  const std::shared_ptr<Runtime> other = OpenRuntime(options, kSystemFileOps);  // another directory
  ASSERT_NE(other, nullptr);
  const std::unique_ptr<Sequence> theirs = MakeSequence(other, 600, 2);
  ASSERT_TRUE(theirs->Spill().ok());
  const std::unique_ptr<Sequence> ours = MakeSequence(runtime, 600, 3);
  const absl::Status spilled = ours->Spill();
  EXPECT_EQ(CodeOf(spilled), Code::kIoError) << spilled;
  EXPECT_NE(spilled.message().find("moved or replaced"), absl::string_view::npos) << spilled;
  EXPECT_FALSE(ours->hibernated());
  EXPECT_EQ(CodeOf(runtime->disk()->Store(*ours, MakePrefix("salt", 600))), Code::kIoError);
  EXPECT_TRUE(theirs->Wake().ok());
}

// Where a file system locks no directories, a lock file that was removed shows.
TEST_F(SaveTargetTest, ALockFileThatWasRemovedShows) {
  static FileOps ops = kSystemFileOps;
  ops.flock = [](int fd) {
    struct stat stat = {};
    if (fstat(fd, &stat) == 0 && S_ISDIR(stat.st_mode)) {
      errno = EBADF;  // as NFS
      return -1;
    }
    return kSystemFileOps.flock(fd);
  };
  const auto directory = OwnedDirectory::Open(scratch_ / "disk", ops);
  ASSERT_TRUE(directory.ok()) << directory.status();
  EXPECT_EQ(CodeOf(OwnedDirectory::Open(scratch_ / "disk", ops).status()), Code::kInvalidArgument);
  EXPECT_TRUE((*directory)->CheckOwned().ok());
  std::filesystem::remove(scratch_ / "disk/.vattn-lock");
  EXPECT_EQ(CodeOf((*directory)->CheckOwned()), Code::kIoError);
}

// A process that is killed while it saves leaves nothing behind, where files without a name are to
// be had.
TEST_F(SaveTargetTest, AKilledSaveLeavesNothing) {
  const int probe = open((scratch_ / "").c_str(), O_TMPFILE | O_WRONLY, 0600);
  if (probe < 0) GTEST_SKIP() << "no O_TMPFILE here";
  close(probe);
  const pid_t child = fork();
  if (child == 0) {
    auto writer = SnapshotWriter::Create(scratch_ / "file", 1, 1 << 20, {.uring = false});
    if (!writer.ok() || !(*writer)->Add(1, std::vector<std::byte>(1 << 20)).ok()) _exit(1);
    kill(getpid(), SIGKILL);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_TRUE(scratch_.Names("").empty());
}

}  // namespace
}  // namespace vattn
