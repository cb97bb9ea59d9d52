// The sequences of a runtime that are alive.
#ifndef VATTN_RUNTIME_SEQUENCE_LIST_H_
#define VATTN_RUNTIME_SEQUENCE_LIST_H_

#include <atomic>
#include <cstdint>
#include <mutex>
#include <set>

namespace vattn {

class Sequence;

// Thread-safe. A sequence that is found stays alive until the list is let go of.
class SequenceList {
 public:
  // `count` is kept equal to the number of sequences.
  explicit SequenceList(std::atomic<uint64_t>& count) : count_(count) {}

  void Add(Sequence* sequence) {
    const std::lock_guard<std::mutex> lock(mutex_);
    sequences_.insert(sequence);
    count_ = sequences_.size();
  }
  // No-op for a sequence that is not in the list.
  void Remove(Sequence* sequence) {
    const std::lock_guard<std::mutex> lock(mutex_);
    sequences_.erase(sequence);
    count_ = sequences_.size();
  }
  // f(sequence) for all of them, with the list locked.
  template <class F>
  void ForEach(F&& f) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Sequence* sequence : sequences_) f(*sequence);
  }
  size_t size() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return sequences_.size();
  }

 private:
  std::atomic<uint64_t>& count_;
  mutable std::mutex mutex_;  // guards sequences_
  std::set<Sequence*> sequences_;
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_SEQUENCE_LIST_H_
