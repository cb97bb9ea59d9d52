// Sequences of several threads in one pool, spilled by whoever needs room.
#include <atomic>
#include <mutex>
#include <thread>

#include "tests/memory/sanitizers.h"
#include "tests/runtime/disk_world.h"

namespace vattn {
namespace {

// liburing maps and unmaps its rings by system calls that ThreadSanitizer does not see: when one
// thread's ring lies where another's lay, it takes that for a race.
constexpr bool kUring = !test::kThreadSanitizer;

// Threads with three sequences each in a pool for four of twelve: nothing is lost, nobody hangs.
TEST(DiskThreadsTest, ThreadsSpillEachOthersSequences) {
  const ScratchDirectory scratch;
  Options options = DiskOptions(kUring, scratch / "disk", 48);
  options.spill = true;
  const std::shared_ptr<Runtime> runtime = OpenRuntime(options, kSystemFileOps);
  std::vector<std::thread> threads;
  std::atomic<int64_t> used{0};
  for (uint32_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 engine(t);
      std::vector<std::unique_ptr<Sequence>> own;
      std::vector<std::string> content;
      for (int i = 0; i < 40; ++i) {
        if (own.size() < 3) {
          absl::StatusOr<std::unique_ptr<Sequence>> made = Sequence::Create(runtime, {});
          const std::lock_guard<std::mutex> lock((*made)->use());
          if (!AppendRandom(**made, 600, engine()).ok()) continue;  // FULL: all others are in use
          content.push_back(ContentOf(**made));
          own.push_back(*std::move(made));
          continue;
        }
        const size_t which = engine() % own.size();
        {
          const std::lock_guard<std::mutex> lock(own[which]->use());
          own[which]->Touch();
          const absl::Status status = own[which]->Wake();
          if (status.ok()) {
            EXPECT_EQ(ContentOf(*own[which]), content[which]);
            ++used;
          } else {
            EXPECT_EQ(CodeOf(status), Code::kFull) << status;
          }
        }
        if (engine() % 4 == 0) {
          own.erase(own.begin() + static_cast<ptrdiff_t>(which));
          content.erase(content.begin() + static_cast<ptrdiff_t>(which));
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(used.load(), 40);
  EXPECT_GT(runtime->Stats().spills, 0u);
  EXPECT_EQ(scratch.Names("disk").size(), 1u);  // the lock
  EXPECT_EQ(runtime->store().num_free(), 48);
  EXPECT_TRUE(runtime->store().CheckInvariants().ok());
}

// Threads that store, find and forget the same prefixes.
TEST(DiskThreadsTest, ThreadsShareStoredPrefixes) {
  const ScratchDirectory scratch;
  Options options = DiskOptions(kUring, scratch / "disk", 200);
  options.disk_bytes = 3 << 20;  // about seven of ten
  const std::shared_ptr<Runtime> runtime = OpenRuntime(options, kSystemFileOps);
  std::vector<std::unique_ptr<Sequence>> sequences;
  std::vector<std::string> content;
  for (uint32_t i = 0; i < 10; ++i) {
    sequences.push_back(MakeSequence(runtime, 600, i));
    content.push_back(ContentOf(*sequences.back()));
  }
  std::vector<std::thread> threads;
  std::atomic<int64_t> hits{0};
  for (uint32_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 engine(t);
      for (int i = 0; i < 40; ++i) {
        const size_t which = engine() % 10;
        const Prefix prefix = MakePrefix("salt", 600, static_cast<int32_t>(which) * 1000);
        int64_t tokens = 0;
        const auto begun = runtime->disk()->Begin(runtime, prefix, {}, &tokens);
        if (begun.ok()) {
          EXPECT_EQ(ContentOf(**begun), content[which]);
          ++hits;
          continue;
        }
        EXPECT_EQ(CodeOf(begun.status()), Code::kNotFound) << begun.status();
        const std::lock_guard<std::mutex> lock(sequences[which]->use());
        const absl::Status stored = runtime->disk()->Store(*sequences[which], prefix);
        // FULL: what the others are storing does not fit beside it.
        EXPECT_TRUE(stored.ok() || CodeOf(stored) == Code::kFull) << stored;
        int64_t files = 0;
        if (engine() % 16 == 0) {
          EXPECT_TRUE(runtime->disk()->Forget("salt", &files).ok());
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(hits.load(), 10);
  EXPECT_LE(runtime->disk()->bytes(), options.disk_bytes);
  int64_t files = 0;
  EXPECT_TRUE(runtime->disk()->Forget("salt", &files).ok());
  EXPECT_EQ(runtime->disk()->bytes(), 0u);
  EXPECT_EQ(runtime->Stats().files_refused, 0u);
}

// Threads that keep, begin from, and by their need for room let go of the same prefixes in memory.
TEST(DiskThreadsTest, ThreadsKeepPrefixesInAFullPool) {
  Options options = DiskOptions(kUring, "", 60);
  const std::shared_ptr<Runtime> runtime = OpenRuntime(options, kSystemFileOps);
  std::vector<std::string> content;
  for (uint32_t i = 0; i < 6; ++i) content.push_back(ContentOf(*MakeSequence(runtime, 600, i)));
  runtime->store().SetTenantLimit(1, 40 * runtime->store().block_bytes());
  std::vector<std::thread> threads;
  std::atomic<int64_t> hits{0};
  for (uint32_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 engine(t);
      for (int i = 0; i < 60; ++i) {
        const uint32_t which = engine() % 6;
        const Prefix prefix = MakePrefix("salt", 600, static_cast<int32_t>(which) * 1000);
        int64_t tokens = 0;
        const auto begun =
            BeginFromPrefix(runtime, prefix, PrefixTier::kMemory, {.tenant = t % 2}, &tokens);
        if (begun.ok()) {
          EXPECT_EQ(tokens, 600);
          EXPECT_EQ(ContentOf(**begun), content[which]);
          const absl::Status added = AppendRandom(**begun, 200, t);  // to copies
          EXPECT_TRUE(added.ok() || CodeOf(added) == Code::kFull) << added;
          ++hits;
          continue;
        }
        EXPECT_EQ(CodeOf(begun.status()), Code::kNotFound) << begun.status();
        auto made = Sequence::Create(runtime, {.reserve_tokens = 600, .tenant = t % 2});
        if (!made.ok()) {
          EXPECT_EQ(CodeOf(made.status()), Code::kFull) << made.status();
          continue;
        }
        EXPECT_TRUE(AppendRandom(**made, 600, which).ok());
        const absl::Status kept = SavePrefix(**made, prefix, PrefixTier::kMemory);
        EXPECT_TRUE(kept.ok() || CodeOf(kept) == Code::kFull) << kept;
        int64_t prefixes = 0;
        if (engine() % 16 == 0) {
          EXPECT_TRUE(ForgetPrefixes(*runtime, "salt", &prefixes).ok());
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(hits.load(), 10);
  EXPECT_GT(runtime->Stats().memory_prefixes_evicted, 0u);
  int64_t prefixes = 0;
  EXPECT_TRUE(ForgetPrefixes(*runtime, "salt", &prefixes).ok());
  EXPECT_EQ(runtime->store().num_free(), 60);
  EXPECT_TRUE(runtime->store().CheckInvariants().ok());
}

}  // namespace
}  // namespace vattn
