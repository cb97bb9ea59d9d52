#include "memory/block_bitmap.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <tuple>

namespace vattn {

BlockBitmap::BlockBitmap(int64_t num_blocks)
    : num_blocks_(num_blocks), words_(static_cast<size_t>((num_blocks + 63) / 64)) {}

void BlockBitmap::Give(int64_t block) {
  assert(IsTaken(block));
  words_[static_cast<size_t>(block / 64)] &= ~(uint64_t{1} << (block % 64));
  --num_taken_;
  lowest_ = std::min(lowest_, block);
}

int64_t BlockBitmap::Find(bool taken, int64_t from, int64_t end) const {
  const uint64_t flip = taken ? 0 : ~uint64_t{0};
  uint64_t mask = ~uint64_t{0} << (from % 64);
  for (int64_t base = from / 64 * 64; base < end; base += 64) {
    const uint64_t hits = (words_[static_cast<size_t>(base / 64)] ^ flip) & mask;
    if (hits != 0) return std::min(base + std::countr_zero(hits), end);
    mask = ~uint64_t{0};
  }
  return end;
}

std::pair<int64_t, int64_t> BlockBitmap::FreeRun(int64_t from, int64_t most) const {
  const int64_t first = Find(false, from, num_blocks_);
  return {first, Find(true, first, first + std::min(most, num_blocks_ - first))};
}

int64_t BlockBitmap::FindRun(int64_t count) const {
  for (auto [first, end] = FreeRun(lowest_, count); first < end;
       std::tie(first, end) = FreeRun(end, count)) {
    if (end - first == count) return first;
  }
  return lowest_;
}

void BlockBitmap::Mark(int64_t first, int64_t length) {
  const int64_t end = first + length;
  for (int64_t block = first; block < end;) {
    const int64_t bits = std::min<int64_t>(64 - block % 64, end - block);
    const uint64_t ones = bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
    words_[static_cast<size_t>(block / 64)] |= ones << (block % 64);
    block += bits;
  }
  num_taken_ += length;
  if (first == lowest_) lowest_ = end;
}

int64_t BlockBitmap::CountTaken() const {
  int64_t count = 0;
  for (const uint64_t word : words_) count += std::popcount(word);
  return count;
}

}  // namespace vattn
