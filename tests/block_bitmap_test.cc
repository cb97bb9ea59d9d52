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

TEST(BlockBitmapTest, TakesOneRunWhereOneIsLongEnough) {
  BlockBitmap bitmap(200);
  EXPECT_EQ(Take(bitmap, 70), (Runs{{0, 70}}));
  EXPECT_EQ(Take(bitmap, 100), (Runs{{70, 100}}));
  Give(bitmap, 60, 50);
  // Next fit: 30 blocks are left behind the cursor.
  EXPECT_EQ(Take(bitmap, 10), (Runs{{170, 10}}));
  // 40 are free in one run before it only.
  EXPECT_EQ(Take(bitmap, 40), (Runs{{60, 40}}));
  EXPECT_EQ(Take(bitmap, 0), Runs{});
  EXPECT_EQ(bitmap.num_taken(), bitmap.CountTaken());
}

TEST(BlockBitmapTest, SeesARunThatTheCursorCuts) {
  BlockBitmap bitmap(128);
  EXPECT_EQ(Take(bitmap, 64), (Runs{{0, 64}}));
  Give(bitmap, 32, 32);
  EXPECT_EQ(Take(bitmap, 96), (Runs{{32, 96}}));
}

TEST(BlockBitmapTest, GathersPiecesInOrderFromTheCursor) {
  BlockBitmap bitmap(130);
  EXPECT_EQ(Take(bitmap, 130), (Runs{{0, 130}}));
  Give(bitmap, 3, 2);
  Give(bitmap, 63, 2);
  Give(bitmap, 129, 1);
  EXPECT_EQ(Take(bitmap, 1), (Runs{{3, 1}}));
  EXPECT_EQ(Take(bitmap, 4), (Runs{{4, 1}, {63, 2}, {129, 1}}));
  EXPECT_EQ(bitmap.num_taken(), 130);
}

TEST(BlockBitmapTest, FreeRunsTileWhatIsNotTaken) {
  BlockBitmap bitmap(129);
  EXPECT_EQ(bitmap.FreeRun(0), (std::pair<int64_t, int64_t>(0, 129)));
  Take(bitmap, 128);
  EXPECT_EQ(bitmap.FreeRun(0), (std::pair<int64_t, int64_t>(128, 129)));
  Take(bitmap, 1);
  EXPECT_EQ(bitmap.FreeRun(0), (std::pair<int64_t, int64_t>(129, 129)));
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
