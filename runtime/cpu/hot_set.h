// Which rows of one (sequence, layer, KV head) are in the hot set. Bookkeeping alone: no byte moves
// here. Least recently used rows leave first.
#ifndef VATTN_RUNTIME_CPU_HOT_SET_H_
#define VATTN_RUNTIME_CPU_HOT_SET_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"

namespace vattn {

class HotSet {
 public:
  // Takes the memory for tokens below `tokens` and a capacity of `rows`: SetCapacity and Use within
  // them then allocate nothing.
  void Reserve(int64_t tokens, int64_t rows);
  // Holds at most `rows` rows from now on; those over it leave, the least recently used first.
  void SetCapacity(int64_t rows);
  // Uses `count` tokens: those that are held become the most recent, the others come in. Returns
  // how many were not held (misses). No token used in this call is evicted for another one of it;
  // those that find no room are not kept.
  int64_t Use(const uint32_t* tokens, int64_t count);
  // Rows of tokens from `tokens` on are forgotten.
  void Truncate(int64_t tokens);

  int64_t size() const { return size_; }
  int64_t capacity() const { return capacity_; }
  int64_t bytes() const;
  absl::Status CheckInvariants() const;

 private:
  struct Slot {
    int32_t token = -1;
    int32_t newer = -1, older = -1;
    uint32_t used = 0;  // call of the last use
  };

  void Unlink(int32_t slot);
  void LinkNewest(int32_t slot);
  void Drop(int32_t slot);

  std::vector<int32_t> slot_of_token_;  // -1: not held
  std::vector<Slot> slots_;
  std::vector<int32_t> free_;
  int32_t newest_ = -1, oldest_ = -1;
  int64_t capacity_ = 0, size_ = 0;
  uint32_t call_ = 0;
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_CPU_HOT_SET_H_
