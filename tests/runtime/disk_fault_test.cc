// Every operation on files while the system's calls fail, each of them once and from then on: the
// sequence and the files are old or new and whole, nothing leaks, and the next try succeeds.
#include <cerrno>
#include <cstring>
#include <functional>
#include <iterator>
#include <utility>

#include "tests/memory/fault_file_ops.h"
#include "tests/memory/snapshot_files.h"
#include "tests/runtime/disk_world.h"

namespace vattn {
namespace {

constexpr int64_t kTokens = 700;

int64_t OpenDescriptors() {
  const std::filesystem::directory_iterator descriptors("/proc/self/fd");
  return std::distance(begin(descriptors), end(descriptors));
}

// Two sequences in a pool that a third does not fit into, and the bytes of a file of the first as
// it was before.
struct World {
  explicit World(bool uring) : options(DiskOptions(uring, scratch / "disk", 30)) {
    options.spill = true;
    faults = {};
    runtime = OpenRuntime(options, kFaultFileOps);
    one = MakeSequence(runtime, kTokens, 1);
    EXPECT_TRUE(one->Save(path).ok());
    old_file = ReadFile(path);
    old_content = ContentOf(*one);
    EXPECT_TRUE(AppendRandom(*one, 10, 2).ok());
    EXPECT_TRUE(one->BuildIndex().ok());
    two = MakeSequence(runtime, kTokens, 3);
    content = {ContentOf(*one), ContentOf(*two)};
  }

  // What `sequence` holds, awake again if it was not.
  std::string Woken(Sequence& sequence) {
    const absl::Status status = sequence.Wake();
    EXPECT_TRUE(status.ok()) << status;
    return status.ok() ? ContentOf(sequence) : "";
  }

  void CheckSequences() {
    EXPECT_TRUE(runtime->store().CheckInvariants().ok());
    EXPECT_EQ(Woken(*one), content[0]);
    EXPECT_EQ(Woken(*two), content[1]);
    EXPECT_EQ(runtime->store().num_used(), 24);
  }

  ScratchDirectory scratch;
  const std::string path = scratch / "file";
  Options options;
  std::shared_ptr<Runtime> runtime;
  std::unique_ptr<Sequence> one, two;
  std::string old_file, old_content;
  std::vector<std::string> content;
};

class DiskFaultTest : public testing::TestWithParam<bool> {
 protected:
  DiskFaultTest() : world_(GetParam()) {}

  // For each call that `operate` makes: prepare, operate while that call fails, check. Failures
  // have one of the codes `refusals`.
  void EveryFailingCall(const std::vector<Code>& refusals, const std::function<void()>& prepare,
                        const std::function<absl::Status()>& operate,
                        const std::function<void(const absl::Status&)>& check) {
    const int64_t descriptors = OpenDescriptors();
    for (const int error : {EIO, ENOSPC, EINTR}) {
      for (const bool for_ever : {false, true}) {
        if (error == EINTR && for_ever) continue;  // tests/memory/snapshot_fault_test.cc: waits end
        int64_t refused = 0;
        for (int64_t n = 1;; ++n) {
          SCOPED_TRACE(testing::Message() << std::strerror(error) << " at call " << n
                                          << (for_ever ? " and after" : ""));
          prepare();
          faults = {.fail_at = n, .for_ever = for_ever, .error = error};
          const absl::Status status = operate();
          seen_ = std::exchange(faults, {});
          if (!status.ok()) {
            ++refused;
            EXPECT_NE(std::find(refusals.begin(), refusals.end(), CodeOf(status)), refusals.end())
                << status;
          }
          check(status);
          world_.CheckSequences();
          EXPECT_EQ(OpenDescriptors(), descriptors);
          if (HasFailure()) return;
          if (!seen_.failed.empty()) continue;
          EXPECT_TRUE(status.ok()) << status;
          break;
        }
        if (error == EIO) {
          EXPECT_GE(refused, 1);
        }
      }
    }
    // Short transfers and interruptions alone are no failures.
    prepare();
    faults = {.max_io = 5000, .interrupt = true};
    const absl::Status status = operate();
    seen_ = std::exchange(faults, {});
    EXPECT_TRUE(status.ok()) << status;
    check(status);
    world_.CheckSequences();
  }

  World world_;
  FileFaults seen_;  // those of the last operation
};

INSTANTIATE_TEST_SUITE_P(Engines, DiskFaultTest, testing::Bool(),
                         [](const auto& info) { return info.param ? "Uring" : "Pread"; });

TEST_P(DiskFaultTest, Save) {
  World& w = world_;
  uint64_t errors = 0;
  EveryFailingCall(
      {Code::kIoError},
      [&] {
        WriteFile(w.path, w.old_file);
        errors = w.runtime->Stats().io_errors;
      },
      [&] { return w.one->Save(w.path); },
      [&](const absl::Status& status) {
        EXPECT_TRUE(w.two->Hibernate(w.scratch / "two").ok());
        const auto there = Sequence::Restore(w.runtime, w.path);
        ASSERT_TRUE(there.ok()) << there.status();
        // After a failed sync of the directory the new file is there, and the text says so.
        const bool placed = status.message().find("in place") != absl::string_view::npos;
        EXPECT_EQ(ContentOf(**there), status.ok() || placed ? w.content[0] : w.old_content);
        EXPECT_EQ(w.runtime->Stats().io_errors - errors, status.ok() ? 0u : 1u);
      });
}

TEST_P(DiskFaultTest, Restore) {
  World& w = world_;
  EveryFailingCall(
      {Code::kIoError}, [&] { EXPECT_TRUE(w.two->Hibernate(w.scratch / "two").ok()); },
      [&] {
        const auto read = Sequence::Restore(w.runtime, w.path);
        if (read.ok()) {
          EXPECT_EQ(ContentOf(**read), w.old_content);
        }
        return read.status();
      },
      [&](const absl::Status&) { EXPECT_EQ(w.runtime->store().num_used(), 12); });
}

TEST_P(DiskFaultTest, Hibernate) {
  World& w = world_;
  EveryFailingCall(
      {Code::kIoError}, [] {}, [&] { return w.one->Hibernate(w.path); },
      [&](const absl::Status& status) {
        EXPECT_EQ(w.one->hibernated(), status.ok());
        EXPECT_EQ(w.runtime->store().num_used(), status.ok() ? 12 : 24);
      });
}

TEST_P(DiskFaultTest, Wake) {
  World& w = world_;
  EveryFailingCall(
      {Code::kIoError}, [&] { EXPECT_TRUE(w.one->Hibernate(w.path).ok()); },
      [&] { return w.one->Wake(); },
      [&](const absl::Status& status) {
        EXPECT_EQ(w.one->hibernated(), !status.ok());
        EXPECT_EQ(w.runtime->store().num_used(), status.ok() ? 24 : 12);
      });
}

// A third sequence makes the pool spill the first; if it cannot, the second.
TEST_P(DiskFaultTest, Spill) {
  World& w = world_;
  std::unique_ptr<Sequence> three;
  StatsSnapshot before;
  EveryFailingCall(
      {Code::kFull},
      [&] {
        w.one->Touch();
        w.two->Touch();
        three = *Sequence::Create(w.runtime, {});
        before = w.runtime->Stats();
      },
      [&] { return AppendRandom(*three, kTokens, 4); },
      [&](const absl::Status& status) {
        const StatsSnapshot after = w.runtime->Stats();
        if (!status.ok()) {
          EXPECT_NE(status.message().find("nothing could be spilled: "), absl::string_view::npos);
          EXPECT_GE(after.spill_failures - before.spill_failures, 1u);
          EXPECT_FALSE(w.one->hibernated());
        } else {
          EXPECT_TRUE(w.one->hibernated());
          EXPECT_EQ(after.spills - before.spills, 1u);
        }
        three.reset();
        EXPECT_EQ(w.Woken(*w.one), w.content[0]);
        EXPECT_EQ(w.runtime->disk()->bytes(), 0u);
        const std::vector<std::string> names = w.scratch.Names("disk");
        for (const std::string& name : names) {
          if (name == ".vattn-lock") continue;
          EXPECT_TRUE(seen_.Failed("unlink")) << name;
          std::filesystem::remove(w.scratch / ("disk/" + name));
        }
      });
}

TEST_P(DiskFaultTest, StorePrefix) {
  World& w = world_;
  Disk& disk = *w.runtime->disk();
  const Prefix prefix = MakePrefix("salt", 600);
  int64_t files = 0;
  EveryFailingCall(
      {Code::kIoError}, [&] { EXPECT_TRUE(disk.Forget("salt", &files).ok()); },
      [&] { return disk.Store(*w.one, prefix); },
      [&](const absl::Status& status) {
        EXPECT_EQ(disk.bytes() > 0, status.ok());
        const absl::Status again = disk.Store(*w.one, prefix);
        EXPECT_TRUE(again.ok()) << again;
        EXPECT_TRUE(w.two->Hibernate(w.scratch / "two").ok());
        int64_t tokens = 0;
        const auto made = disk.Begin(w.runtime, prefix, {}, &tokens);
        ASSERT_TRUE(made.ok()) << made.status();
        EXPECT_EQ(tokens, 600);
        EXPECT_EQ(ContentOf(**made), ContentOf(*w.one, 600));
      });
}

// A stored prefix that cannot be read is a miss.
TEST_P(DiskFaultTest, BeginFromPrefix) {
  World& w = world_;
  Disk& disk = *w.runtime->disk();
  const Prefix prefix = MakePrefix("salt", 600);
  EXPECT_TRUE(disk.Store(*w.one, prefix).ok());
  StatsSnapshot before;
  EveryFailingCall(
      {Code::kNotFound},
      [&] {
        EXPECT_TRUE(w.two->Hibernate(w.scratch / "two").ok());
        before = w.runtime->Stats();
      },
      [&] {
        int64_t tokens = 0;
        const auto begun = BeginFromPrefix(w.runtime, prefix, PrefixTier::kAuto, {}, &tokens);
        EXPECT_EQ(tokens, begun.ok() ? 600 : 0);
        if (begun.ok()) {
          EXPECT_EQ(ContentOf(**begun), ContentOf(*w.one, 600));
        }
        return begun.status();
      },
      [&](const absl::Status& status) {
        const StatsSnapshot after = w.runtime->Stats();
        EXPECT_EQ(after.prefix_misses - before.prefix_misses, status.ok() ? 0u : 1u);
        EXPECT_EQ(after.disk_prefixes_unread - before.disk_prefixes_unread, status.ok() ? 0u : 1u);
        EXPECT_EQ(after.disk_prefixes_damaged, before.disk_prefixes_damaged);
      });
}

TEST_P(DiskFaultTest, Forget) {
  World& w = world_;
  Disk& disk = *w.runtime->disk();
  EveryFailingCall(
      {Code::kIoError},
      [&] {
        EXPECT_TRUE(disk.Store(*w.one, MakePrefix("salt", 600)).ok());
        EXPECT_TRUE(disk.Store(*w.two, MakePrefix("salt", 600, 1000)).ok());
        EXPECT_TRUE(disk.Store(*w.two, MakePrefix("pepper", 600)).ok());
      },
      [&] {
        int64_t files = 0;
        return disk.Forget("salt", &files);
      },
      [&](const absl::Status& status) {
        int64_t files = 0;
        EXPECT_TRUE(disk.Forget("salt", &files).ok());
        EXPECT_EQ(files > 0, !status.ok());
        EXPECT_EQ(w.scratch.Names("disk").size(), 2u);  // the lock and the other salt's
      });
}

// Taking a directory over: refused whole, or with every prefix that can be read.
TEST_P(DiskFaultTest, OpenDirectory) {
  Options other = world_.options;
  other.disk_path = world_.scratch / "other";
  {
    const std::shared_ptr<Runtime> runtime = OpenRuntime(other, kFaultFileOps);
    const std::unique_ptr<Sequence> sequence = MakeSequence(runtime, kTokens, 1);
    EXPECT_TRUE(runtime->disk()->Store(*sequence, MakePrefix("salt", 600)).ok());
    EXPECT_TRUE(runtime->disk()->Store(*sequence, MakePrefix("salt", 700)).ok());
  }
  int64_t hits = 0;
  EveryFailingCall(
      {Code::kIoError}, [] {},
      [&] {
        const auto made = Runtime::Create(other, nullptr, kFaultFileOps);
        const FileFaults before = std::exchange(faults, {});
        int64_t tokens = 0;
        if (made.ok()) {
          const auto begun = (*made)->disk()->Begin(*made, MakePrefix("salt", 700), {}, &tokens);
          EXPECT_TRUE(tokens == 700 || !before.failed.empty()) << tokens;
          hits += begun.ok();
        }
        faults = before;
        return made.status();
      },
      [&](const absl::Status&) { EXPECT_EQ(world_.scratch.Names("other").size(), 3u); });
  EXPECT_GE(hits, 4);
}

}  // namespace
}  // namespace vattn
