#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "runtime/prefix/lookup.h"
#include "runtime/prefix/prefix.h"

namespace vattn {
namespace {

std::vector<Digest> Chain(std::vector<uint64_t> numbers) {
  std::vector<Digest> chain;
  for (const uint64_t number : numbers) chain.push_back({.low = number, .high = 0});
  return chain;
}

TEST(PrefixIndexTest, FindsTheLongestSharedFirst) {
  PrefixIndex index;
  index.Add("short", Chain({1}), 300, 10, 1);
  index.Add("long", Chain({1, 2, 3}), 800, 30, 2);
  index.Add("fork", Chain({1, 2, 4}), 900, 30, 3);
  index.Add("other", Chain({9}), 256, 10, 4);
  const auto find = [&](std::vector<uint64_t> chain) { return index.Find(Chain(chain)); };
  EXPECT_EQ(find({1, 2, 3, 5})[0], "long");
  EXPECT_EQ(find({1, 2, 4})[0], "fork");
  EXPECT_EQ(find({1, 2, 4}).size(), 3u);
  EXPECT_EQ(find({1, 2, 7}), (std::vector<std::string>{"fork", "long", "short"}));
  EXPECT_EQ(find({9}), std::vector<std::string>{"other"});
  EXPECT_TRUE(find({2, 3}).size() == 2u);  // digests are chained: these would be others
  EXPECT_TRUE(find({}).empty());
  EXPECT_EQ(index.bytes(), 80u);
}

TEST(PrefixIndexTest, TheOldestUseGoesFirst) {
  PrefixIndex index;
  index.Add("a", Chain({1}), 256, 1, 5);
  index.Add("b", Chain({2}), 256, 1, 3);
  index.Add("c", {}, 0, 1, 0);
  index.Add("d", {}, 0, 1, 0);  // as old as c
  EXPECT_EQ(index.Oldest(), "c");
  index.Use("c");
  EXPECT_EQ(index.Oldest(), "d");
  EXPECT_EQ(index.Remove("d"), 1u);
  EXPECT_EQ(index.Remove("d"), 0u);
  EXPECT_EQ(index.Oldest(), "b");
  EXPECT_EQ(index.next_use(), 7u);
  index.Use("none");
  EXPECT_TRUE(index.CheckInvariants().ok());
}

TEST(PrefixIndexTest, RandomOperationsKeepTheInvariants) {
  PrefixIndex index;
  std::mt19937 engine(1);
  for (int i = 0; i < 20000; ++i) {
    const std::string name = std::to_string(engine() % 50);
    switch (engine() % 4) {
      case 0:
        index.Add(name, Chain({engine() % 20, 100 + engine() % 20}), 512, engine() % 1000,
                  engine() % 100);
        break;
      case 1:
        index.Remove(name);
        break;
      case 2:
        index.Use(name);
        break;
      default:
        for (const std::string& found : index.Find(Chain({engine() % 20, 100 + engine() % 20}))) {
          ASSERT_TRUE(index.Has(found));
        }
    }
    if (i % 100 == 0) {
      const absl::Status status = index.CheckInvariants();
      ASSERT_TRUE(status.ok()) << status;
    }
  }
  while (index.size() > 0) index.Remove(index.Oldest());
  EXPECT_EQ(index.bytes(), 0u);
}

// The same in every process, run and build: files are found by it.
TEST(PrefixTest, DigestsAreKnown) {
  const Prefix prefix = {.salt = "a", .tokens = std::vector<int32_t>(256, 7)};
  const std::vector<Digest> chain = ChainOf(prefix);
  ASSERT_EQ(chain.size(), 1u);
  EXPECT_EQ(chain[0].low, 6438499976586454803u);
  EXPECT_EQ(chain[0].high, 11477143097576211559u);
}

TEST(PrefixTest, ChainsDependOnSaltAndEveryTokenBefore) {
  Prefix prefix = {.salt = "a", .tokens = std::vector<int32_t>(1000, 7)};
  const std::vector<Digest> chain = ChainOf(prefix);
  ASSERT_EQ(chain.size(), 3u);
  prefix.tokens[999] = 8;  // after the last whole piece
  EXPECT_EQ(ChainOf(prefix), chain);
  prefix.tokens[300] = 8;
  EXPECT_EQ(ChainOf(prefix)[0], chain[0]);
  EXPECT_NE(ChainOf(prefix)[1], chain[1]);
  EXPECT_NE(ChainOf(prefix)[2], chain[2]);
  prefix.tokens[300] = 7;
  prefix.salt = "b";
  for (int i = 0; i < 3; ++i) EXPECT_NE(ChainOf(prefix)[i], chain[i]);
}

TEST(PrefixTest, SharedTokens) {
  const Prefix a = {.salt = "a", .tokens = {1, 2, 3}};
  EXPECT_EQ(SharedTokens(a, a), 3);
  EXPECT_EQ(SharedTokens(a, {.salt = "a", .tokens = {1, 2, 4, 5}}), 2);
  EXPECT_EQ(SharedTokens(a, {.salt = "a", .tokens = {}}), 0);
  EXPECT_EQ(SharedTokens(a, {.salt = "b", .tokens = {1, 2, 3}}), 0);
}

}  // namespace
}  // namespace vattn
