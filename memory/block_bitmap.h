// Which of n equal blocks are taken: the lowest first, runs preferred, so that memory which follows
// the blocks page by page (the host pool's own, codes on a device) stays near what is in use.
#ifndef VATTN_MEMORY_BLOCK_BITMAP_H_
#define VATTN_MEMORY_BLOCK_BITMAP_H_

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace vattn {

// Not thread-safe. A Take looks at every bit behind the lowest free block at worst (no run is long
// enough), at a few as a rule.
class BlockBitmap {
 public:
  explicit BlockBitmap(int64_t num_blocks);

  int64_t num_blocks() const { return num_blocks_; }
  int64_t num_taken() const { return num_taken_; }
  bool IsTaken(int64_t block) const {
    return (words_[static_cast<size_t>(block / 64)] >> (block % 64) & 1) != 0;
  }

  // Takes `count` blocks (0 to num_blocks - num_taken) and calls take(first, length) for each run
  // of them. The lowest run that is long enough, or, if none is, the lowest free blocks: ascending
  // either way.
  template <class TakeRun>
  void Take(int64_t count, TakeRun&& take) {
    if (count == 0) return;
    int64_t from = FindRun(count);
    while (count > 0) {
      const auto [first, end] = FreeRun(from, count);
      Mark(first, end - first);
      take(first, end - first);
      count -= end - first;
      from = end;
    }
  }

  // The block must be taken.
  void Give(int64_t block);

  // True if a block of [first, end) is taken.
  bool AnyTaken(int64_t first, int64_t end) const { return Find(true, first, end) < end; }

  // The first run [first, end) of free blocks at or after `from`, cut where it has `most` blocks;
  // first == end if none.
  std::pair<int64_t, int64_t> FreeRun(int64_t from, int64_t most) const;

  // Bits set, counted one by one.
  int64_t CountTaken() const;

 private:
  // Where the run of `count` free blocks starts that Take should use; the lowest free block if
  // there is none.
  int64_t FindRun(int64_t count) const;
  // Takes free blocks.
  void Mark(int64_t first, int64_t length);
  // The first block of [from, end) whose bit is `taken`; end if none.
  int64_t Find(bool taken, int64_t from, int64_t end) const;

  int64_t num_blocks_;
  int64_t num_taken_ = 0;
  int64_t lowest_ = 0;  // no block below it is free
  std::vector<uint64_t>
      words_;  // bit b % 64 of word b / 64: block b is taken; bits past the end are 0
};

}  // namespace vattn

#endif  // VATTN_MEMORY_BLOCK_BITMAP_H_
