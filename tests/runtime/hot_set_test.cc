#include "runtime/cpu/hot_set.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <list>
#include <random>
#include <set>
#include <vector>

namespace vattn {
namespace {

// Least recently used rows in a plain list, the oldest last.
class Model {
 public:
  void SetCapacity(int64_t rows) {
    capacity_ = rows;
    while (static_cast<int64_t>(held_.size()) > capacity_) held_.pop_back();
  }
  int64_t Use(const std::vector<uint32_t>& tokens) {
    std::set<uint32_t> used;
    int64_t misses = 0;
    for (const uint32_t token : tokens) {
      const auto at = std::find(held_.begin(), held_.end(), token);
      if (at != held_.end()) {
        held_.erase(at);
      } else {
        ++misses;
        if (static_cast<int64_t>(held_.size()) >= capacity_) {
          if (held_.empty() || used.count(held_.back()) > 0) continue;
          held_.pop_back();
        }
      }
      held_.push_front(token);
      used.insert(token);
    }
    return misses;
  }
  void Truncate(int64_t tokens) {
    held_.remove_if([&](uint32_t t) { return t >= tokens; });
  }
  int64_t size() const { return static_cast<int64_t>(held_.size()); }

 private:
  std::list<uint32_t> held_;
  int64_t capacity_ = 0;
};

int64_t Use(HotSet& set, const std::vector<uint32_t>& tokens) {
  return set.Use(tokens.data(), static_cast<int64_t>(tokens.size()));
}

TEST(HotSetTest, RandomOperationsMatchAModel) {
  for (int seed = 0; seed < 20; ++seed) {
    std::mt19937_64 random(seed);
    HotSet set;
    Model model;
    for (int step = 0; step < 2000; ++step) {
      const uint64_t kind = random() % 20;
      if (kind == 0) {
        const int64_t capacity = static_cast<int64_t>(random() % 60);
        set.SetCapacity(capacity);
        model.SetCapacity(capacity);
      } else if (kind == 1) {
        const int64_t tokens = static_cast<int64_t>(random() % 250);
        set.Truncate(tokens);
        model.Truncate(tokens);
      } else {
        std::set<uint32_t> tokens;
        const size_t count = random() % 40;
        while (tokens.size() < count)
          tokens.insert(static_cast<uint32_t>(random() % (random() % 2 == 0 ? 40 : 200)));
        const std::vector<uint32_t> list(tokens.begin(), tokens.end());
        ASSERT_EQ(Use(set, list), model.Use(list)) << "seed " << seed << ", step " << step;
      }
      ASSERT_EQ(set.size(), model.size());
      const absl::Status status = set.CheckInvariants();
      ASSERT_TRUE(status.ok()) << status;
    }
  }
}

TEST(HotSetTest, WithoutCapacityEverythingMisses) {
  HotSet set;
  EXPECT_EQ(Use(set, {1, 2, 3}), 3);
  EXPECT_EQ(Use(set, {1, 2, 3}), 3);
  EXPECT_EQ(set.size(), 0);
  EXPECT_TRUE(set.CheckInvariants().ok());
}

TEST(HotSetTest, OneCallDoesNotEvictItsOwnTokens) {
  HotSet set;
  set.SetCapacity(3);
  EXPECT_EQ(Use(set, {10, 11, 12, 13, 14}), 5);
  EXPECT_EQ(set.size(), 3);
  EXPECT_EQ(Use(set, {10, 11, 12}), 0);
  EXPECT_EQ(Use(set, {20}), 1);  // 10 leaves, the least recent
  EXPECT_EQ(Use(set, {11, 12, 20}), 0);
  EXPECT_EQ(Use(set, {10}), 1);
}

TEST(HotSetTest, TruncateForgetsFromTheTokenOn) {
  HotSet set;
  set.SetCapacity(10);
  Use(set, {5, 6, 7, 1000000});
  EXPECT_GT(set.bytes(), 4000000);
  set.Truncate(6);
  EXPECT_EQ(set.size(), 1);
  EXPECT_EQ(Use(set, {5}), 0);
  EXPECT_EQ(Use(set, {6, 7}), 2);
  set.Truncate(0);
  EXPECT_EQ(set.size(), 0);
  EXPECT_TRUE(set.CheckInvariants().ok());
}

}  // namespace
}  // namespace vattn
