#include "memory/block_bitmap.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

namespace vattn {
namespace {

using Runs = std::vector<std::pair<int64_t, int64_t>>;  // {first, length}

Runs Take(BlockBitmap& bitmap, int64_t count) {
  Runs runs;
  bitmap.Take(count, [&](int64_t first, int64_t length) { runs.emplace_back(first, length); });
  return runs;
}

void Give(BlockBitmap& bitmap, int64_t first, int64_t length) {
  for (int64_t i = first; i < first + length; ++i) bitmap.Give(i);
}

TEST(BlockBitmapTest, TakesTheLowestRunThatIsLongEnough) {
  BlockBitmap bitmap(200);
  EXPECT_EQ(Take(bitmap, 70), (Runs{{0, 70}}));
  EXPECT_EQ(Take(bitmap, 100), (Runs{{70, 100}}));
  Give(bitmap, 60, 20);
  Give(bitmap, 10, 5);
  EXPECT_EQ(Take(bitmap, 10), (Runs{{60, 10}}));
  EXPECT_EQ(Take(bitmap, 4), (Runs{{10, 4}}));
  EXPECT_EQ(Take(bitmap, 30), (Runs{{170, 30}}));
  EXPECT_EQ(Take(bitmap, 0), Runs{});
  EXPECT_EQ(bitmap.num_taken(), bitmap.CountTaken());
}

TEST(BlockBitmapTest, GathersTheLowestPiecesWhereNoRunIsLongEnough) {
  BlockBitmap bitmap(130);
  EXPECT_EQ(Take(bitmap, 130), (Runs{{0, 130}}));
  Give(bitmap, 129, 1);
  Give(bitmap, 63, 2);
  Give(bitmap, 3, 2);
  EXPECT_EQ(Take(bitmap, 1), (Runs{{3, 1}}));
  EXPECT_EQ(Take(bitmap, 4), (Runs{{4, 1}, {63, 2}, {129, 1}}));
  EXPECT_EQ(bitmap.num_taken(), 130);
}

TEST(BlockBitmapTest, SeesWhatIsTakenInAStretch) {
  BlockBitmap bitmap(300);
  Take(bitmap, 300);
  Give(bitmap, 64, 136);
  EXPECT_FALSE(bitmap.AnyTaken(64, 200));
  EXPECT_TRUE(bitmap.AnyTaken(63, 200));
  EXPECT_TRUE(bitmap.AnyTaken(64, 201));
  EXPECT_FALSE(bitmap.AnyTaken(0, 0));
}

// Sequences come in pieces, grow by a block a head and go, with 30 % of the pool in use. Where
// blocks were taken round the pool, every page of it would have been touched.
TEST(BlockBitmapTest, BlocksStayNearEachOther) {
  constexpr int64_t kPage = 256, kBlocks = 400 * kPage, kMost = 3 * kBlocks / 10;
  BlockBitmap bitmap(kBlocks);
  std::mt19937_64 random(1);
  std::vector<std::vector<int64_t>> sequences;
  int64_t highest = 0, most = 0;
  for (int step = 0; step < 20000; ++step) {
    if (sequences.empty() || (bitmap.num_taken() < kMost && random() % 50 == 0))
      sequences.emplace_back();
    const size_t i = random() % sequences.size();
    if (bitmap.num_taken() >= kMost) {
      for (const int64_t block : sequences[i]) bitmap.Give(block);
      sequences.erase(sequences.begin() + static_cast<std::ptrdiff_t>(i));
      continue;
    }
    const bool prompt = sequences[i].empty();
    for (uint64_t pieces = prompt ? 1 + random() % 40 : 1; pieces > 0; --pieces) {
      for (const auto& [first, length] : Take(bitmap, prompt ? 64 : 8)) {
        for (int64_t b = first; b < first + length; ++b) sequences[i].push_back(b);
        highest = std::max(highest, first + length);
      }
    }
    most = std::max(most, bitmap.num_taken());
  }
  EXPECT_GE(most, kMost);
  EXPECT_LT(highest, most * 5 / 4);
}

TEST(BlockBitmapTest, FreeRunsTileWhatIsNotTaken) {
  BlockBitmap bitmap(129);
  EXPECT_EQ(bitmap.FreeRun(0, 129), (std::pair<int64_t, int64_t>(0, 129)));
  EXPECT_EQ(bitmap.FreeRun(0, 5), (std::pair<int64_t, int64_t>(0, 5)));
  Take(bitmap, 128);
  EXPECT_EQ(bitmap.FreeRun(0, 129), (std::pair<int64_t, int64_t>(128, 129)));
  Take(bitmap, 1);
  EXPECT_EQ(bitmap.FreeRun(0, 129), (std::pair<int64_t, int64_t>(129, 129)));
}

// Against a plain vector<bool>: no block taken twice, one run iff one is long enough.
TEST(BlockBitmapTest, RandomOperationsMatchAModel) {
  for (const int64_t num_blocks : {1, 63, 64, 65, 128, 300}) {
    SCOPED_TRACE(num_blocks);
    BlockBitmap bitmap(num_blocks);
    std::vector<bool> model(static_cast<size_t>(num_blocks));
    std::mt19937_64 random(static_cast<uint64_t>(num_blocks));
    for (int step = 0; step < 5000; ++step) {
      int64_t longest = 0, run = 0, taken = 0;
      for (const bool bit : model) {
        run = bit ? 0 : run + 1;
        longest = std::max(longest, run);
        taken += bit;
      }
      ASSERT_EQ(bitmap.num_taken(), taken);
      ASSERT_EQ(bitmap.CountTaken(), taken);
      if (random() % 2 == 0) {
        const int64_t count = static_cast<int64_t>(
            random() % static_cast<uint64_t>((num_blocks - taken) / (1 + random() % 8) + 1));
        const Runs runs = Take(bitmap, count);
        ASSERT_EQ(runs.size() <= 1, count <= longest);
        int64_t total = 0;
        for (const auto& [first, length] : runs) {
          ASSERT_GT(length, 0);
          total += length;
          for (int64_t i = first; i < first + length; ++i) {
            ASSERT_FALSE(model.at(static_cast<size_t>(i))) << i;
            model[static_cast<size_t>(i)] = true;
          }
        }
        ASSERT_EQ(total, count);
      } else {
        const int64_t first = static_cast<int64_t>(random() % static_cast<uint64_t>(num_blocks));
        const int64_t end = std::min<int64_t>(
            num_blocks, first + static_cast<int64_t>(random() % (1 + random() % 80)) + 1);
        for (int64_t i = first; i < end; ++i) {
          if (!model[static_cast<size_t>(i)]) continue;
          bitmap.Give(i);
          model[static_cast<size_t>(i)] = false;
        }
      }
    }
  }
}

}  // namespace
}  // namespace vattn
