// Blocks of an engine's pool: free ones are used again, those free for longest first, and full ones
// are found by the text that they end, as long as they have not been used again.
#ifndef VATTN_TESTS_API_BLOCK_MANAGER_H_
#define VATTN_TESTS_API_BLOCK_MANAGER_H_

#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <vector>

namespace vattn::test {

class BlockManager {
 public:
  explicit BlockManager(int64_t blocks)
      : holders_(static_cast<size_t>(blocks), 0), ends_(static_cast<size_t>(blocks), 0) {
    for (int64_t b = 0; b < blocks; ++b) free_.push_back(static_cast<int32_t>(b));
  }

  int64_t size() const { return static_cast<int64_t>(holders_.size()); }
  int64_t free() const { return static_cast<int64_t>(free_.size()); }
  int64_t reused() const { return reused_; }
  // A free block, whose contents are nobody's; there is one.
  int32_t Take() {
    const int32_t block = free_.front();
    free_.pop_front();
    holders_[block] = 1;
    const auto known = by_text_.find(ends_[block]);
    if (known != by_text_.end() && known->second == block) by_text_.erase(known);
    reused_ += ends_[block] != 0;
    ends_[block] = 0;
    return block;
  }
  // The full block that ends this text, held once more; -1: none.
  int32_t Share(uint64_t text) {
    const auto known = by_text_.find(text);
    return known == by_text_.end() ? -1 : Hold(known->second);
  }
  // Any full block, which is a mistake.
  int32_t ShareAny(uint64_t number) {
    if (by_text_.empty()) return -1;
    return Hold(
        std::next(by_text_.begin(), static_cast<int64_t>(number % by_text_.size()))->second);
  }
  void Return(int32_t block) {
    if (--holders_[block] == 0) free_.push_back(block);
  }
  // A block is full and ends this text.
  void Register(int32_t block, uint64_t text) {
    if (ends_[block] == text) return;
    ends_[block] = text;
    by_text_.emplace(text, block);
  }

 private:
  int32_t Hold(int32_t block) {
    if (holders_[block]++ == 0) free_.erase(std::find(free_.begin(), free_.end(), block));
    return block;
  }

  std::vector<int32_t> holders_;
  std::vector<uint64_t> ends_;  // 0: not full
  std::map<uint64_t, int32_t> by_text_;
  std::deque<int32_t> free_;
  int64_t reused_ = 0;
};

}  // namespace vattn::test

#endif  // VATTN_TESTS_API_BLOCK_MANAGER_H_
