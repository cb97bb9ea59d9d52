#include "runtime/cpu/hot_set.h"

#include <algorithm>

#include "memory/status.h"

namespace vattn {

void HotSet::Unlink(int32_t slot) {
  const Slot& s = slots_[slot];
  (s.newer >= 0 ? slots_[s.newer].older : newest_) = s.older;
  (s.older >= 0 ? slots_[s.older].newer : oldest_) = s.newer;
}

void HotSet::LinkNewest(int32_t slot) {
  Slot& s = slots_[slot];
  s.newer = -1;
  s.older = newest_;
  (newest_ >= 0 ? slots_[newest_].newer : oldest_) = slot;
  newest_ = slot;
}

void HotSet::Drop(int32_t slot) {
  Unlink(slot);
  slot_of_token_[slots_[slot].token] = -1;
  slots_[slot].token = -1;
  free_.push_back(slot);
  --size_;
}

void HotSet::Reserve(int64_t tokens, int64_t rows) {
  const size_t held = slot_of_token_.size(), room = slots_.capacity();
  if (static_cast<size_t>(tokens) > held)
    slot_of_token_.resize(std::max(static_cast<size_t>(tokens), held * 9 / 8), -1);
  if (static_cast<size_t>(rows) <= room) return;
  // Room in free_ for every slot: Drop cannot fail.
  free_.reserve(std::max(static_cast<size_t>(rows), room * 9 / 8));
  slots_.reserve(std::max(static_cast<size_t>(rows), room * 9 / 8));
}

void HotSet::SetCapacity(int64_t rows) {
  capacity_ = rows;
  while (size_ > capacity_) Drop(oldest_);
}

int64_t HotSet::Use(const uint32_t* tokens, int64_t count) {
  ++call_;
  int64_t misses = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t token = tokens[i];
    if (token >= slot_of_token_.size()) Reserve(int64_t{token} + 1, 0);
    int32_t slot = slot_of_token_[token];
    if (slot >= 0) {
      Unlink(slot);
    } else {
      ++misses;
      if (size_ >= capacity_) {
        if (oldest_ < 0 || slots_[oldest_].used == call_) continue;
        Drop(oldest_);
      }
      if (free_.empty()) {
        Reserve(0, static_cast<int64_t>(slots_.size()) + 1);
        free_.push_back(static_cast<int32_t>(slots_.size()));
        slots_.emplace_back();
      }
      slot = free_.back();
      free_.pop_back();
      slots_[slot].token = static_cast<int32_t>(token);
      slot_of_token_[token] = slot;
      ++size_;
    }
    slots_[slot].used = call_;
    LinkNewest(slot);
  }
  return misses;
}

void HotSet::Truncate(int64_t tokens) {
  for (int64_t t = tokens; t < static_cast<int64_t>(slot_of_token_.size()); ++t) {
    if (slot_of_token_[t] >= 0) Drop(slot_of_token_[t]);
  }
  if (static_cast<int64_t>(slot_of_token_.size()) > tokens) slot_of_token_.resize(tokens);
}

int64_t HotSet::bytes() const {
  return static_cast<int64_t>(slot_of_token_.capacity() * sizeof(int32_t) +
                              slots_.capacity() * sizeof(Slot) +
                              free_.capacity() * sizeof(int32_t));
}

absl::Status HotSet::CheckInvariants() const {
  int64_t listed = 0;
  for (int32_t s = newest_, newer = -1; s >= 0; newer = s, s = slots_[s].older, ++listed) {
    if (slots_[s].newer != newer) return InternalError("hot set: list broken at slot ", s);
    if (slots_[s].token < 0 || slot_of_token_[slots_[s].token] != s) {
      return InternalError("hot set: slot ", s, " and token ", slots_[s].token, " disagree");
    }
    if (listed > size_) return InternalError("hot set: list is longer than size ", size_);
  }
  const int64_t mapped =
      std::count_if(slot_of_token_.begin(), slot_of_token_.end(), [](int32_t s) { return s >= 0; });
  if (listed != size_ || mapped != size_ || size_ > capacity_) {
    return InternalError("hot set: ", listed, " listed, ", mapped, " mapped, size ", size_,
                         ", capacity ", capacity_);
  }
  return absl::OkStatus();
}

}  // namespace vattn
