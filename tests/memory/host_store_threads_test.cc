// Many threads in one host store. Says most under ThreadSanitizer: the bytes of the blocks are
// touched with no other ordering than the store's own.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "memory/host_store.h"
#include "memory/status.h"

namespace vattn {
namespace {

std::unique_ptr<HostStore> MakeStore(int64_t num_blocks) {
  absl::StatusOr<std::unique_ptr<HostStore>> store =
      HostStore::Create({.limit_bytes = static_cast<uint64_t>(num_blocks) * 64,
                         .block_bytes = 64,
                         .huge_pages = false});
  EXPECT_TRUE(store.ok()) << store.status();
  return *std::move(store);
}

uint64_t& Word(HostStore& store, BlockId block) {
  return *reinterpret_cast<uint64_t*>(store.data(block));
}

TEST(HostStoreThreadsTest, NoBlockHasTwoOwners) {
  constexpr int kThreads = 4;
  constexpr int kSteps = 4000;
  const std::unique_ptr<HostStore> store = MakeStore(100);
  std::atomic<int64_t> refused{0};
  const auto work = [&](uint64_t thread) {
    std::mt19937_64 random(thread);
    std::vector<BlockId> mine;
    int64_t reserved = 0;
    for (int step = 0; step < kSteps; ++step) {
      const int64_t count = static_cast<int64_t>(random() % 20) + 1;
      std::vector<BlockId> blocks(static_cast<size_t>(count));
      const uint64_t choice = random() % 4;
      bool got = false;
      if (choice == 0) {
        got = store->Allocate(count, blocks.data()).ok();
        if (!got) ++refused;
      } else if (choice == 1 && reserved >= count) {
        got = store->AllocateReserved(count, blocks.data()).ok();
        EXPECT_TRUE(got);
        reserved -= count;
      } else if (choice == 1 && store->Reserve(count).ok()) {
        reserved += count;
      } else {
        for (int64_t i = 0; i < count && !mine.empty(); ++i) {
          EXPECT_EQ(Word(*store, mine.back()), thread);
          store->Release(mine.back());
          mine.pop_back();
        }
        store->Unreserve(reserved);
        reserved = 0;
      }
      if (!got) continue;
      for (const BlockId block : blocks) Word(*store, block) = thread;
      mine.insert(mine.end(), blocks.begin(), blocks.end());
    }
    for (const BlockId block : mine) {
      EXPECT_EQ(Word(*store, block), thread);
      store->Release(block);
    }
    store->Unreserve(reserved);
  };
  std::vector<std::thread> threads;
  for (uint64_t t = 1; t <= kThreads; ++t) threads.emplace_back(work, t);
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(refused, 0);
  EXPECT_EQ(store->num_free(), store->num_blocks());
  EXPECT_TRUE(store->CheckInvariants().ok()) << store->CheckInvariants();
}

// Readers drop their references; whoever sees itself alone writes at once.
TEST(HostStoreThreadsTest, TheUniqueHolderMayWrite) {
  constexpr int kReaders = 3;
  constexpr uint64_t kRounds = 2000;
  const std::unique_ptr<HostStore> store = MakeStore(1);
  BlockId block;
  ASSERT_TRUE(store->Allocate(1, &block).ok());
  Word(*store, block) = 0;

  std::array<std::atomic<uint64_t>, kReaders> round{};  // the round a reader was sent into
  std::vector<std::thread> readers;
  for (int reader = 0; reader < kReaders; ++reader) {
    readers.emplace_back([&, reader] {
      for (uint64_t r = 1; r <= kRounds; ++r) {
        while (round[static_cast<size_t>(reader)].load() < r) std::this_thread::yield();
        EXPECT_EQ(Word(*store, block), r - 1);
        store->Release(block);
      }
    });
  }
  for (uint64_t r = 1; r <= kRounds; ++r) {
    for (int reader = 0; reader < kReaders; ++reader) store->AddReference(block);
    for (std::atomic<uint64_t>& sent : round) sent.store(r);
    while (!store->IsUnique(block)) std::this_thread::yield();
    Word(*store, block) = r;
  }
  for (std::thread& reader : readers) reader.join();
  EXPECT_TRUE(store->IsUnique(block));
}

}  // namespace
}  // namespace vattn
