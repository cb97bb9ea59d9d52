// Which of n equal blocks are taken: next fit, runs preferred.
#ifndef VATTN_MEMORY_BLOCK_BITMAP_H_
#define VATTN_MEMORY_BLOCK_BITMAP_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

namespace vattn {

// Not thread-safe. A Take looks at every bit at worst (no run is long enough), at a few as a rule.
class BlockBitmap {
 public:
  explicit BlockBitmap(int64_t num_blocks);

  int64_t num_blocks() const { return num_blocks_; }
  int64_t num_taken() const { return num_taken_; }
  bool IsTaken(int64_t block) const {
    return (words_[static_cast<size_t>(block / 64)] >> (block % 64) & 1) != 0;
  }

  // Takes `count` blocks (0 to num_blocks - num_taken) and calls take(first, length) for each run
  // of them. One run if a free one is long enough: the first at or after the end of the last Take,
  // else the first from block 0. If none is, the free blocks in that order.
  template <class TakeRun>
  void Take(int64_t count, TakeRun&& take) {
    if (count == 0) return;
    cursor_ = FindRun(count);
    while (count > 0) {
      auto [first, end] = FreeRun(cursor_);
      if (first == end) std::tie(first, end) = FreeRun(0);
      const int64_t length = std::min(count, end - first);
      Mark(first, length);
      take(first, length);
      count -= length;
    }
  }

  // The block must be taken.
  void Give(int64_t block);

  // The first maximal run [first, end) of free blocks at or after `from`; first == end if none.
  std::pair<int64_t, int64_t> FreeRun(int64_t from) const;

  // Bits set, counted one by one.
  int64_t CountTaken() const;

 private:
  // Where the run of `count` free blocks starts that Take should use; the cursor if there is none.
  int64_t FindRun(int64_t count) const;
  // Takes free blocks and puts the cursor behind them.
  void Mark(int64_t first, int64_t length);
  // The first block at or after `from` whose bit is `taken`; num_blocks if none.
  int64_t Find(bool taken, int64_t from) const;

  int64_t num_blocks_;
  int64_t num_taken_ = 0;
  int64_t cursor_ = 0;  // where the last Take ended
  std::vector<uint64_t>
      words_;  // bit b % 64 of word b / 64: block b is taken; bits past the end are 0
};

}  // namespace vattn

#endif  // VATTN_MEMORY_BLOCK_BITMAP_H_
