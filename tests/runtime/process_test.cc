// A forked child has copies of its parent's handles and shares its files: nothing of the parent's
// is removed, written, mixed or held on to by it.
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <functional>

#include "tests/runtime/disk_world.h"

namespace vattn {
namespace {

// Runs `body` in a child, which ends after it: true if it returned true.
bool InChild(const std::function<bool()>& body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    _exit(body() ? 0 : 1);
  }
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

class ProcessTest : public testing::Test {
 protected:
  std::shared_ptr<Runtime> Open(int64_t blocks = 36) {
    Options options = DiskOptions(/*uring=*/true, scratch_ / "disk", blocks);
    options.spill = true;
    return OpenRuntime(options, kSystemFileOps);
  }
  std::vector<std::string> Files(const std::string& start) const {
    std::vector<std::string> names = scratch_.Names("disk");
    std::erase_if(names, [&](const std::string& name) { return name.rfind(start, 0) != 0; });
    return names;
  }

  ScratchDirectory scratch_;
};

TEST_F(ProcessTest, AChildsEndRemovesNothing) {
  std::shared_ptr<Runtime> runtime = Open();
  std::vector<std::unique_ptr<Sequence>> sequences;
  std::vector<std::string> content;
  for (uint32_t i = 0; i < 6; ++i) {
    sequences.push_back(MakeSequence(runtime, 600, i));
    content.push_back(ContentOf(*sequences.back()));
  }
  ASSERT_TRUE(runtime->disk()->Store(*sequences[5], MakePrefix("salt", 600)).ok());
  const std::vector<std::string> before = scratch_.Names("disk");
  EXPECT_EQ(Files("spill-").size(), 3u);
  // Some end at once, some destroy what they hold, some use it.
  EXPECT_TRUE(InChild([] { return true; }));
  EXPECT_TRUE(InChild([&] {
    sequences.clear();
    runtime.reset();
    return true;
  }));
  EXPECT_TRUE(InChild([&] {
    sequences[5].reset();
    if (!sequences[0]->Wake().ok() || ContentOf(*sequences[0]) != content[0]) return false;
    sequences.clear();
    return true;
  }));
  EXPECT_EQ(scratch_.Names("disk"), before);
  for (size_t i = 0; i < sequences.size(); ++i) {
    ASSERT_TRUE(sequences[i]->Wake().ok()) << i;
    EXPECT_EQ(ContentOf(*sequences[i]), content[i]) << i;
  }
}

// Workers that were forked from one process with a runtime: each has the tokens that it appended.
TEST_F(ProcessTest, WorkersDoNotMix) {
  const std::shared_ptr<Runtime> runtime = Open(30);
  const std::unique_ptr<Sequence> stored = MakeSequence(runtime, 300, 9);
  ASSERT_TRUE(runtime->disk()->Store(*stored, MakePrefix("salt", 300)).ok());
  const std::vector<std::string> before = scratch_.Names("disk");
  std::vector<pid_t> workers;
  for (uint32_t worker = 0; worker < 3; ++worker) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(60);
      int wrong = 0;
      const std::unique_ptr<Sequence> one = MakeSequence(runtime, 600, worker);
      const std::string content = ContentOf(*one);
      std::unique_ptr<Sequence> two = *Sequence::Create(runtime, {});
      // The pool is full, and nothing may be spilled: the text says why.
      const absl::Status full = AppendRandom(*two, 900, worker + 10);
      wrong += CodeOf(full) != Code::kFull ||
               full.message().find("was forked") == absl::string_view::npos;
      const absl::Status spilled = one->Spill();
      wrong += CodeOf(spilled) != Code::kInvalidArgument || one->hibernated();
      wrong += spilled.message() !=
               absl::StrCat("directory ", scratch_ / "disk", " belongs to process ", getppid(),
                            " and may not be used by process ", getpid(),
                            ", which was forked from it: make a runtime with a directory of its "
                            "own after the fork");
      wrong +=
          CodeOf(runtime->disk()->Store(*one, MakePrefix("worker", 600))) != Code::kInvalidArgument;
      int64_t files = 0;
      wrong += CodeOf(runtime->disk()->Forget("salt", &files)) != Code::kInvalidArgument;
      two.reset();
      // What is stored may be read.
      int64_t tokens = 0;
      wrong +=
          !BeginFromPrefix(runtime, MakePrefix("salt", 300), PrefixTier::kDisk, {}, &tokens).ok() ||
          tokens != 300;
      wrong += ContentOf(*one) != content;
      _exit(wrong);
    }
    workers.push_back(child);
  }
  for (const pid_t child : workers) {
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status));
    EXPECT_EQ(WEXITSTATUS(status), 0);
  }
  EXPECT_EQ(scratch_.Names("disk"), before);
}

// A prefix that a child finds damaged is the parent's to remove.
TEST_F(ProcessTest, AChildRemovesNoDamagedPrefix) {
  const std::shared_ptr<Runtime> runtime = Open();
  ASSERT_TRUE(runtime->disk()->Store(*MakeSequence(runtime, 600, 1), MakePrefix("salt", 600)).ok());
  const int fd = open((scratch_ / ("disk/" + Files("prefix-").at(0))).c_str(), O_WRONLY);
  ASSERT_EQ(pwrite(fd, "?", 1, 5000), 1);
  close(fd);
  const auto begin = [&] {
    int64_t tokens = 0;
    return CodeOf(
        BeginFromPrefix(runtime, MakePrefix("salt", 600), PrefixTier::kDisk, {}, &tokens).status());
  };
  EXPECT_TRUE(InChild([&] { return begin() == Code::kNotFound; }));
  EXPECT_EQ(Files("prefix-").size(), 1u);
  EXPECT_EQ(begin(), Code::kNotFound);
  EXPECT_EQ(Files("prefix-").size(), 0u);
}

// However long children live, the directory is its owner's, and nobody's when the owner is gone.
TEST_F(ProcessTest, LocksGoWithTheirOwner) {
  std::shared_ptr<Runtime> runtime = Open();
  const pid_t sleeper = fork();
  if (sleeper == 0) {
    pause();
    _exit(0);
  }
  const Options same = DiskOptions(true, scratch_ / "disk");
  EXPECT_FALSE(Runtime::Create(same, nullptr).ok());
  runtime.reset();
  runtime = Open();  // closed: free again
  EXPECT_NE(runtime, nullptr);
  runtime.reset();

  // An owner that is killed while a child of its own lives.
  int alive[2];
  ASSERT_EQ(pipe(alive), 0);
  const pid_t owner = fork();
  if (owner == 0) {
    const std::shared_ptr<Runtime> own = Open();
    const pid_t child = fork();
    if (child == 0) {
      pause();
      _exit(0);
    }
    if (write(alive[1], &child, sizeof(child)) != sizeof(child)) _exit(1);
    kill(getpid(), SIGKILL);
  }
  pid_t orphan = 0;
  ASSERT_EQ(read(alive[0], &orphan, sizeof(orphan)), static_cast<ssize_t>(sizeof(orphan)));
  int status = 0;
  ASSERT_EQ(waitpid(owner, &status, 0), owner);
  EXPECT_NE(Open(), nullptr);
  kill(orphan, SIGKILL);
  kill(sleeper, SIGKILL);
  ASSERT_EQ(waitpid(sleeper, &status, 0), sleeper);
  close(alive[0]);
  close(alive[1]);
}

// A child's ending does not free the parent's directory either.
TEST_F(ProcessTest, AChildGivesNoLockAway) {
  std::shared_ptr<Runtime> runtime = Open();
  EXPECT_TRUE(InChild([&] {
    runtime.reset();
    return CodeOf(Runtime::Create(DiskOptions(true, scratch_ / "disk"), nullptr).status()) ==
           Code::kInvalidArgument;
  }));
  EXPECT_EQ(CodeOf(Runtime::Create(DiskOptions(true, scratch_ / "disk"), nullptr).status()),
            Code::kInvalidArgument);
  EXPECT_TRUE(InChild([&] {
    const Options own = DiskOptions(true, scratch_ / "own");
    const std::shared_ptr<Runtime> made = OpenRuntime(own, kSystemFileOps);
    return made != nullptr && MakeSequence(made, 600, 1)->Spill().ok();
  }));
}

}  // namespace
}  // namespace vattn
