// The block ids of one KV head of one layer, by block number, and which of them others have yet to
// hear of.
#ifndef VATTN_RUNTIME_BLOCK_TABLE_H_
#define VATTN_RUNTIME_BLOCK_TABLE_H_

#include <algorithm>
#include <cstdint>
#include <vector>

namespace vattn {

class BlockTable {
 public:
  BlockTable() = default;
  // The first `count` blocks of another table, of which nobody has heard.
  BlockTable(const BlockTable& other, int64_t count)
      : ids_(other.ids_.begin(), other.ids_.begin() + count) {}

  const int32_t* data() const { return ids_.data(); }
  size_t size() const { return ids_.size(); }
  size_t capacity() const { return ids_.capacity(); }
  bool empty() const { return ids_.empty(); }
  int32_t operator[](size_t block) const { return ids_[block]; }
  std::vector<int32_t>::const_iterator begin() const { return ids_.begin(); }
  std::vector<int32_t>::const_iterator end() const { return ids_.end(); }

  // Room for `blocks` blocks: Append then allocates nothing.
  void Reserve(size_t blocks) {
    if (ids_.capacity() < blocks) ids_.reserve(std::max(blocks, ids_.capacity() * 3 / 2));
  }
  void Append(int32_t id) {
    MarkChanged(static_cast<int64_t>(ids_.size()));
    ids_.push_back(id);
  }
  void Replace(int64_t block, int32_t id) {
    MarkChanged(block);
    ids_[static_cast<size_t>(block)] = id;
  }
  // Leaves out the blocks from number `size` on.
  void Shorten(size_t size) { ids_.resize(std::min(size, ids_.size())); }
  void Clear() {
    ids_.clear();
    MarkChanged(0);
  }

  // Blocks from number `block` on have other ids, or other rows, than before.
  void MarkChanged(int64_t block) {
    unsent_from_ = std::min(unsent_from_, block);
    unseen_from_ = std::min(unseen_from_, block);
  }
  // Entries from here on are not in the device's copy of the table; it may lie past the end.
  int64_t unsent_from() const { return unsent_from_; }
  void MarkSent() { unsent_from_ = static_cast<int64_t>(ids_.size()); }
  void MarkUnsent() { unsent_from_ = 0; }
  // Entries from here on are not known to the hot set of Sequence::hot_set; it may lie past the end.
  int64_t unseen_from() const { return unseen_from_; }
  void MarkSeen() { unseen_from_ = static_cast<int64_t>(ids_.size()); }

 private:
  std::vector<int32_t> ids_;
  int64_t unsent_from_ = 0, unseen_from_ = 0;
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_BLOCK_TABLE_H_
