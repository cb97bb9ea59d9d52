#include "memory/host_store.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "memory/status.h"

namespace vattn {
namespace {

constexpr uint64_t kBlockBytes = 4096;

std::unique_ptr<HostStore> MakeStore(int64_t num_blocks, uint64_t block_bytes = kBlockBytes) {
  absl::StatusOr<std::unique_ptr<HostStore>> store =
      HostStore::Create({.limit_bytes = static_cast<uint64_t>(num_blocks) * block_bytes,
                         .block_bytes = block_bytes,
                         .huge_pages = false});
  EXPECT_TRUE(store.ok()) << store.status();
  return *std::move(store);
}

std::vector<int32_t> Allocate(HostStore& store, int64_t count) {
  std::vector<BlockId> blocks(static_cast<size_t>(count), BlockId::kNone);
  const absl::Status status = store.Allocate(count, blocks.data());
  EXPECT_TRUE(status.ok()) << status;
  std::vector<int32_t> ids;
  for (const BlockId block : blocks) ids.push_back(static_cast<int32_t>(block));
  return ids;
}

int64_t ResidentPages(const HostStore& store) {
  const uint64_t bytes = static_cast<uint64_t>(store.num_blocks()) * store.block_bytes();
  std::vector<unsigned char> resident((bytes + PageBytes() - 1) / PageBytes());
  EXPECT_EQ(mincore(store.base(), bytes, resident.data()), 0);
  int64_t count = 0;
  for (const unsigned char page : resident) count += page & 1;
  return count;
}

TEST(HostStoreTest, BlocksAreConsecutiveAlignedAndApart) {
  const std::unique_ptr<HostStore> store = MakeStore(100);
  EXPECT_EQ(Allocate(*store, 4), (std::vector<int32_t>{0, 1, 2, 3}));
  EXPECT_EQ(store->num_blocks(), 100);
  EXPECT_EQ(store->num_used(), 4);
  EXPECT_EQ(store->num_free(), 96);
  EXPECT_EQ(store->bytes_used(), 4 * kBlockBytes);
  for (int32_t i = 0; i < 4; ++i) {
    std::byte* const data = store->data(static_cast<BlockId>(i));
    EXPECT_EQ(data, store->base() + static_cast<uint64_t>(i) * kBlockBytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(data) % 4096, 0u);
    std::memset(data, i + 1, kBlockBytes);
  }
  EXPECT_EQ(store->data(BlockId{1})[kBlockBytes - 1], std::byte{2});
  EXPECT_EQ(store->data(BlockId{2})[0], std::byte{3});
}

TEST(HostStoreTest, BlockBytesAreRoundedUpTo64) {
  const std::unique_ptr<HostStore> store = MakeStore(10, 100);
  EXPECT_EQ(store->block_bytes(), 128u);
  EXPECT_EQ(store->num_blocks(), 7);  // whole blocks in 1000 bytes
}

TEST(HostStoreTest, FullNamesNeedFreeLimitAndKnobAndTakesNothing) {
  const std::unique_ptr<HostStore> store = MakeStore(10);
  Allocate(*store, 5);
  ASSERT_TRUE(store->Reserve(2).ok());
  std::vector<BlockId> blocks(4, BlockId::kNone);
  const absl::Status status = store->Allocate(4, blocks.data());
  EXPECT_EQ(CodeOf(status), Code::kFull);
  const std::string text(status.message());
  for (const char* part : {"need 4 blocks of 4096 bytes", "3 of 10 are free", "5 used",
                           "2 reserved", "limit 40960 bytes", "host_bytes"}) {
    EXPECT_NE(text.find(part), std::string::npos) << text << " lacks " << part;
  }
  EXPECT_EQ(blocks, std::vector<BlockId>(4, BlockId::kNone));
  EXPECT_EQ(store->num_free(), 3);
  EXPECT_EQ(CodeOf(store->Reserve(4)), Code::kFull);
  EXPECT_TRUE(store->Allocate(3, blocks.data()).ok());
  EXPECT_TRUE(store->CheckInvariants().ok());
}

TEST(HostStoreTest, ReservedBlocksAreKeptForTheirHolder) {
  const std::unique_ptr<HostStore> store = MakeStore(8);
  ASSERT_TRUE(store->Reserve(6).ok());
  EXPECT_EQ(store->num_free(), 2);
  EXPECT_EQ(store->bytes_used(), 6 * kBlockBytes);
  Allocate(*store, 2);
  BlockId blocks[8];
  EXPECT_EQ(CodeOf(store->Allocate(1, blocks)), Code::kFull);
  ASSERT_TRUE(store->AllocateReserved(4, blocks).ok());
  EXPECT_EQ(store->num_reserved(), 2);
  EXPECT_EQ(store->num_used(), 6);
  EXPECT_EQ(CodeOf(store->AllocateReserved(3, blocks)), Code::kInternal);
  EXPECT_EQ(store->num_reserved(), 2);
  store->Unreserve(2);
  EXPECT_EQ(store->num_free(), 2);
  Allocate(*store, 2);
  EXPECT_TRUE(store->CheckInvariants().ok()) << store->CheckInvariants();
}

TEST(HostStoreTest, SharedBlocksLiveUntilTheLastReference) {
  const std::unique_ptr<HostStore> store = MakeStore(2);
  const BlockId block = static_cast<BlockId>(Allocate(*store, 1)[0]);
  EXPECT_TRUE(store->IsUnique(block));
  EXPECT_FALSE(store->AnyShared());
  store->AddReference(block);
  EXPECT_FALSE(store->IsUnique(block));
  EXPECT_TRUE(store->AnyShared());
  store->Release(block);
  EXPECT_TRUE(store->IsUnique(block));
  EXPECT_FALSE(store->AnyShared());
  EXPECT_EQ(store->num_used(), 1);
  store->Release(block);
  EXPECT_EQ(store->num_used(), 0);
  EXPECT_TRUE(store->CheckInvariants().ok());
}

TEST(HostStoreTest, ZeroOnFreeCleansWithTheLastReference) {
  for (const bool zero : {false, true}) {
    absl::StatusOr<std::unique_ptr<HostStore>> store = HostStore::Create(
        {.limit_bytes = kBlockBytes, .block_bytes = kBlockBytes, .zero_on_free = zero});
    ASSERT_TRUE(store.ok()) << store.status();
    const BlockId block = static_cast<BlockId>(Allocate(**store, 1)[0]);
    std::memset((*store)->data(block), 7, kBlockBytes);
    (*store)->AddReference(block);
    (*store)->Release(block);
    EXPECT_EQ((*store)->data(block)[kBlockBytes - 1], std::byte{7});
    (*store)->Release(block);
    const std::byte left = zero ? std::byte{0} : std::byte{7};
    for (uint64_t i = 0; i < kBlockBytes; ++i) ASSERT_EQ((*store)->data(block)[i], left) << i;
  }
}

TEST(HostStoreTest, AReservedBlockGoesBackToItsReservation) {
  const std::unique_ptr<HostStore> store = MakeStore(2);
  ASSERT_TRUE(store->Reserve(1).ok());
  BlockId block;
  ASSERT_TRUE(store->AllocateReserved(1, &block).ok());
  store->ReleaseToReserve(block);
  EXPECT_EQ(store->num_reserved(), 1);
  EXPECT_EQ(store->num_used(), 0);
  EXPECT_TRUE(store->CheckInvariants().ok()) << store->CheckInvariants();
}

TEST(HostStoreTest, PagesAreTouchedOnlyAsBlocksAreWritten) {
  const std::unique_ptr<HostStore> store = MakeStore(1000, PageBytes());
  const std::vector<int32_t> ids = Allocate(*store, 900);
  EXPECT_EQ(ResidentPages(*store), 0);
  for (int i = 0; i < 50; ++i) store->data(static_cast<BlockId>(ids[i]))[0] = std::byte{9};
  EXPECT_EQ(ResidentPages(*store), 50);
  for (int i = 10; i < 30; ++i) store->Release(static_cast<BlockId>(ids[i]));
  EXPECT_EQ(ResidentPages(*store), 50);
}

TEST(HostStoreTest, PrefaultTouchesEveryPage) {
  const uint64_t bytes = uint64_t{40} << 20;
  const absl::StatusOr<std::unique_ptr<HostStore>> store =
      HostStore::Create({.limit_bytes = bytes,
                         .block_bytes = 1 << 20,
                         .huge_pages = false,
                         .prefault = true,
                         .num_threads = 2});
  ASSERT_TRUE(store.ok()) << store.status();
  EXPECT_EQ(ResidentPages(**store), static_cast<int64_t>(bytes / PageBytes()));
}

TEST(HostStoreTest, PrefaultBeyondTheMachineIsRefused) {
  const absl::StatusOr<std::unique_ptr<HostStore>> store = HostStore::Create(
      {.limit_bytes = uint64_t{64} << 40, .block_bytes = 1 << 20, .prefault = true});
  EXPECT_EQ(CodeOf(store.status()), Code::kOutOfMemory) << store.status();
}

TEST(HostStoreTest, OffsetsPast32BitsAreRight) {
  const uint64_t block_bytes = uint64_t{3} << 30;
  const absl::StatusOr<std::unique_ptr<HostStore>> store = HostStore::Create(
      {.limit_bytes = 4 * block_bytes, .block_bytes = block_bytes, .huge_pages = false});
  ASSERT_TRUE(store.ok()) << store.status();
  BlockId blocks[4];
  ASSERT_TRUE((*store)->Allocate(4, blocks).ok());
  EXPECT_EQ((*store)->bytes_used(), 4 * block_bytes);
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ((*store)->data(blocks[i]) - (*store)->base(), static_cast<int64_t>(i * block_bytes));
    (*store)->data(blocks[i])[block_bytes - 1] = static_cast<std::byte>(i + 1);
    (*store)->data(blocks[i])[0] = static_cast<std::byte>(i + 100);
  }
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ((*store)->data(blocks[i])[block_bytes - 1], static_cast<std::byte>(i + 1));
    EXPECT_EQ((*store)->data(blocks[i])[0], static_cast<std::byte>(i + 100));
  }
}

TEST(HostStoreTest, WrongOptionsAreRefusedByName) {
  const uint64_t huge = std::numeric_limits<uint64_t>::max();
  const struct {
    HostStoreOptions options;
    const char* name;
  } cases[] = {
      {{.limit_bytes = 1 << 20, .block_bytes = 0}, "block_bytes"},
      {{.limit_bytes = huge, .block_bytes = huge}, "block_bytes"},
      {{.limit_bytes = 100, .block_bytes = 4096}, "host_bytes is 100"},
      {{.limit_bytes = huge, .block_bytes = 4096}, "host_bytes"},
      {{.limit_bytes = uint64_t{1} << 40, .block_bytes = 64}, "host_bytes"},  // over 2^31 blocks
      {{.limit_bytes = 4096, .block_bytes = 4096, .numa_node = 5000}, "numa_node is 5000"},
      {{.limit_bytes = 4096, .block_bytes = 4096, .numa_node = -2}, "numa_node is -2"},
      {{.limit_bytes = 4096, .block_bytes = 4096, .num_threads = -1}, "num_threads is -1"},
  };
  for (const auto& c : cases) {
    const absl::Status status = HostStore::Create(c.options).status();
    EXPECT_EQ(CodeOf(status), Code::kInvalidArgument) << c.name;
    EXPECT_NE(std::string(status.message()).find(c.name), std::string::npos) << status;
  }
  const std::unique_ptr<HostStore> store = MakeStore(1);
  EXPECT_EQ(CodeOf(store->Allocate(-1, nullptr)), Code::kInvalidArgument);
  EXPECT_EQ(CodeOf(store->Reserve(-1)), Code::kInvalidArgument);
  EXPECT_EQ(CodeOf(store->AllocateReserved(-1, nullptr)), Code::kInvalidArgument);
  EXPECT_TRUE(store->Allocate(0, nullptr).ok());
}

TEST(HostStoreTest, NumaNodeIsAPreference) {
  const absl::StatusOr<std::unique_ptr<HostStore>> store =
      HostStore::Create({.limit_bytes = 1 << 20, .block_bytes = 4096, .numa_node = 0});
  if (CodeOf(store.status()) == Code::kNotSupported) GTEST_SKIP() << store.status();
  ASSERT_TRUE(store.ok()) << store.status();
  (*store)->base()[0] = std::byte{1};
}

// Random calls against a model that knows the count of every block.
TEST(HostStoreTest, RandomOperationsMatchAModel) {
  constexpr int64_t kBlocks = 150;
  const std::unique_ptr<HostStore> store = MakeStore(kBlocks, 64);
  std::map<int32_t, int> model;  // references of used blocks
  int64_t reserved = 0;
  std::mt19937_64 random(7);
  const auto below = [&](int64_t n) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(n));
  };
  for (int step = 0; step < 20000; ++step) {
    const int64_t used = static_cast<int64_t>(model.size());
    const int64_t free = kBlocks - used - reserved;
    const int64_t count = below(40);
    std::vector<BlockId> blocks(static_cast<size_t>(count), BlockId::kNone);
    const auto add_to_model = [&] {
      for (const BlockId block : blocks) {
        const bool added = model.emplace(static_cast<int32_t>(block), 1).second;
        ASSERT_TRUE(added) << "handed out twice: " << static_cast<int32_t>(block);
      }
    };
    switch (below(7)) {
      case 0: {
        const absl::Status status = store->Allocate(count, blocks.data());
        ASSERT_EQ(CodeOf(status), count <= free ? Code::kOk : Code::kFull) << status;
        if (status.ok()) add_to_model();
        break;
      }
      case 1: {
        const absl::Status status = store->Reserve(count);
        ASSERT_EQ(CodeOf(status), count <= free ? Code::kOk : Code::kFull) << status;
        if (status.ok()) reserved += count;
        break;
      }
      case 2:
        if (count > reserved) break;
        ASSERT_TRUE(store->AllocateReserved(count, blocks.data()).ok());
        reserved -= count;
        add_to_model();
        break;
      case 3:
        store->Unreserve(std::min(count, reserved));
        reserved -= std::min(count, reserved);
        break;
      default:
        for (int64_t i = 0; i < count && !model.empty(); ++i) {
          auto it = model.lower_bound(static_cast<int32_t>(below(kBlocks)));
          if (it == model.end()) it = model.begin();
          const BlockId block = static_cast<BlockId>(it->first);
          ASSERT_EQ(store->IsUnique(block), it->second == 1);
          if (below(3) == 0) {
            store->AddReference(block);
            ++it->second;
          } else {
            store->Release(block);
            if (--it->second == 0) model.erase(it);
          }
        }
    }
    ASSERT_EQ(store->num_used(), static_cast<int64_t>(model.size()));
    ASSERT_EQ(store->num_reserved(), reserved);
    ASSERT_EQ(store->num_free(), kBlocks - static_cast<int64_t>(model.size()) - reserved);
    if (step % 16 != 0) continue;
    const absl::Status invariants = store->CheckInvariants();
    ASSERT_TRUE(invariants.ok()) << invariants;
  }
}

}  // namespace
}  // namespace vattn
