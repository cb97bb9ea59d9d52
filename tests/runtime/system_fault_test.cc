// A runtime's life while the system refuses memory or threads: at every call of the table of
// memory_ops.h, and at every thread that is to be started, once and from then on. Each operation
// says so or does without, succeeds when tried again, and everything goes back to the system.
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <functional>

#include "runtime/attend_request.h"
#include "runtime/batch.h"
#include "tests/runtime/disk_world.h"

namespace {

struct {
  int64_t fail_at = 0;  // from 1; 0: none
  bool for_ever = false;
  int64_t calls = 0, failed = 0;
  // Bytes not given back yet, and those that munmap was asked for while it failed.
  uint64_t mapped = 0, kept = 0;
} memory_faults;

std::atomic<int> threads_started{0}, fail_thread_at{0};  // 0: none

bool Fails() {
  const int64_t number = ++memory_faults.calls;
  if (memory_faults.fail_at == 0 || number < memory_faults.fail_at ||
      (number > memory_faults.fail_at && !memory_faults.for_ever)) {
    return false;
  }
  ++memory_faults.failed;
  errno = ENOMEM;
  return true;
}

constexpr vattn::MemoryOps kFaultMemoryOps = {
    .mmap = [](void* at, size_t bytes, int protection, int flags, int fd, off_t offset) -> void* {
      if (Fails()) return MAP_FAILED;
      void* const mapped = mmap(at, bytes, protection, flags, fd, offset);
      if (mapped != MAP_FAILED) memory_faults.mapped += bytes;
      return mapped;
    },
    .munmap =
        [](void* at, size_t bytes) {
          if (Fails()) {
            memory_faults.kept += bytes;
            return -1;
          }
          memory_faults.mapped -= bytes;
          return munmap(at, bytes);
        },
    .madvise = [](void* at, size_t bytes,
                  int advice) { return Fails() ? -1 : madvise(at, bytes, advice); },
};

}  // namespace

// In place of the C library's, for all of the program.
extern "C" __attribute__((visibility("default"))) int pthread_create(
    pthread_t* thread, const pthread_attr_t* attributes, void* (*routine)(void*), void* argument) {
  using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const Create create = reinterpret_cast<Create>(dlsym(RTLD_NEXT, "pthread_create"));
  const int number = ++threads_started;
  if (fail_thread_at > 0 && number >= fail_thread_at) return EAGAIN;
  return create(thread, attributes, routine, argument);
}

namespace vattn {
namespace {

constexpr int64_t kTokens = 700;

// Create, append, attend, fork, save, restore, hibernate, wake; what the sequences hold at the end.
class Life {
 public:
  explicit Life(bool uring) : options_(DiskOptions(uring, scratch_ / "disk")) {
    options_.huge_pages = true;
  }

  // Runs it with call `fail_at` failing. "" if it could not be lived to its end.
  std::string Live(int64_t fail_at, bool for_ever) {
    memory_faults = {.fail_at = fail_at, .for_ever = for_ever};
    std::string content;
    {
      std::shared_ptr<Runtime> runtime;
      Again([&] {
        return Keep(runtime, Runtime::Create(options_, nullptr, kSystemFileOps, kFaultMemoryOps));
      });
      if (runtime == nullptr) return "";
      std::unique_ptr<Sequence> one, two, three;
      Again([&] { return Keep(one, Sequence::Create(runtime, {.id = 7})); });
      Again([&] { return AppendRandom(*one, kTokens, 1); });
      Again([&] { return Attend(runtime, *one); });
      Again([&] { return Keep(two, one->Fork(8)); });
      Again([&] { return two->Save(scratch_ / "file"); });
      Again([&] { return Keep(three, Sequence::Restore(runtime, scratch_ / "file")); });
      Again([&] { return one->Hibernate(scratch_ / "asleep"); });
      Again([&] { return one->Wake(); });
      EXPECT_TRUE(runtime->store().CheckInvariants().ok());
      for (Sequence* sequence : {one.get(), two.get(), three.get()})
        content += ContentOf(*sequence);
    }
    return content;
  }

 private:
  template <class T, class Made>
  static absl::Status Keep(T& kept, absl::StatusOr<Made> made) {
    if (!made.ok()) return made.status();
    kept = *std::move(made);
    return absl::OkStatus();
  }

  // Refused for want of memory or not at all; the second try is not refused.
  static void Again(const std::function<absl::Status()>& operate) {
    const absl::Status status = operate();
    if (status.ok()) return;
    EXPECT_EQ(CodeOf(status), Code::kOutOfMemory) << status;
    EXPECT_NE(status.message().find(std::strerror(ENOMEM)), absl::string_view::npos) << status;
    memory_faults.fail_at = 0;
    const absl::Status again = operate();
    EXPECT_TRUE(again.ok()) << again;
  }

  static absl::Status Attend(const std::shared_ptr<Runtime>& runtime, Sequence& sequence) {
    Batch batch(runtime, 1);
    VATTN_RETURN_IF_ERROR(batch.Set(0, &sequence));
    VATTN_RETURN_IF_ERROR(batch.BeginStep(0));
    const std::vector<float> q(4 * 16, .5f);
    std::vector<float> out(q.size());
    return batch.Attend({.layer = 0, .q = q.data(), .out = out.data()});
  }

  const ScratchDirectory scratch_;
  Options options_;
};

TEST(SystemFaultTest, EveryCallForMemory) {
  for (const bool uring : {false, true}) {
    Life life(uring);
    const std::string expected = life.Live(0, false);
    ASSERT_FALSE(expected.empty());
    EXPECT_EQ(memory_faults.mapped, 0u);
    const int64_t calls = memory_faults.calls;
    EXPECT_GE(calls, 20);
    for (const bool for_ever : {false, true}) {
      for (int64_t n = 1; n <= calls; ++n) {
        SCOPED_TRACE(testing::Message() << "call " << n << (for_ever ? " and after" : ""));
        EXPECT_TRUE(life.Live(n, for_ever) == expected);
        EXPECT_GE(memory_faults.failed, 1);
        EXPECT_LE(memory_faults.mapped, memory_faults.kept);
      }
    }
  }
}

// Last: what oneTBB was refused it does not ask for again.
TEST(SystemFaultTest, ThreadsThatTheSystemDoesNotStart) {
  ScratchDirectory scratch;
  Options options = DiskOptions(false, scratch / "disk");
  options.num_threads = 0;
  threads_started = 0;
  fail_thread_at = 1;
  const absl::Status refused = Runtime::Create(options, nullptr).status();
  const int asked = threads_started;
  fail_thread_at = 0;
  if (asked == 0) GTEST_SKIP() << "one core: no thread is ever started";
  EXPECT_EQ(CodeOf(refused), Code::kOutOfMemory) << refused;
  EXPECT_NE(refused.message().find("num_threads is 0"), absl::string_view::npos) << refused;
  options.num_threads = 1;
  const std::shared_ptr<Runtime> runtime = OpenRuntime(options, kSystemFileOps);
  ASSERT_NE(runtime, nullptr);
  const std::unique_ptr<Sequence> one = MakeSequence(runtime, kTokens, 1);
  EXPECT_EQ(one->length(0), kTokens);
}

}  // namespace
}  // namespace vattn
