// Ranges that grow where they lie: on pages of this process, and on a CUDA device's where there is
// one.
#include "memory/device_range.h"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "memory/device.h"
#include "memory/status.h"
#include "tests/memory/host_pages.h"

namespace vattn {
namespace {

using test::host_pages;

class DeviceRangeTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (std::string(GetParam()) == "host") return;
    if (ListDevices().empty()) GTEST_SKIP() << "there is no CUDA device";
    absl::StatusOr<std::unique_ptr<Device>> opened = Device::Open(0);
    ASSERT_TRUE(opened.ok()) << opened.status();
    device_ = *std::move(opened);
  }
  void TearDown() override { EXPECT_EQ(host_pages.live, 0); }

  std::unique_ptr<DevicePages> Pages(uint64_t keep_pages) {
    const PageOps& ops = device_ ? kDevicePageOps : test::kHostPageOps;
    const uint64_t bytes = *ops.page_bytes(0);
    absl::StatusOr<std::unique_ptr<DevicePages>> pages =
        DevicePages::Create(0, keep_pages * bytes, ops);
    EXPECT_TRUE(pages.ok()) << pages.status();
    return *std::move(pages);
  }
  static std::unique_ptr<DeviceRange> Range(DevicePages& pages, int64_t items,
                                            uint64_t item_bytes) {
    absl::StatusOr<std::unique_ptr<DeviceRange>> range =
        DeviceRange::Reserve(pages, items, item_bytes);
    EXPECT_TRUE(range.ok()) << range.status();
    return *std::move(range);
  }

  void Copy(void* to, const void* from, size_t bytes) {
    if (!device_) {
      std::memcpy(to, from, bytes);
      return;
    }
    EXPECT_TRUE(device_->Copy(to, from, bytes, device_->stream()).ok());
    EXPECT_TRUE(device_->Synchronize(device_->stream()).ok());
  }
  // An item's first and last eight bytes say its number.
  void Mark(const DeviceRange& range, uint64_t item_bytes, int64_t item) {
    std::byte* const at = range.data() + static_cast<uint64_t>(item) * item_bytes;
    Copy(at, &item, sizeof(item));
    Copy(at + item_bytes - sizeof(item), &item, sizeof(item));
  }
  bool Marked(const DeviceRange& range, uint64_t item_bytes, int64_t item) {
    const std::byte* const at = range.data() + static_cast<uint64_t>(item) * item_bytes;
    int64_t first = -1, last = -1;
    Copy(&first, at, sizeof(first));
    Copy(&last, at + item_bytes - sizeof(last), sizeof(last));
    return first == item && last == item;
  }

  std::unique_ptr<Device> device_;
};

absl::Status CommitOne(DeviceRange& range, int32_t item, DeviceRange::Stretches* fresh = nullptr) {
  return range.Commit(&item, 1, fresh);
}

TEST_P(DeviceRangeTest, AddressesCostNoMemory) {
  const std::unique_ptr<DevicePages> pages = Pages(0);
  const uint64_t page = pages->page_bytes();
  const std::unique_ptr<DeviceRange> range = Range(*pages, 1000, page / 2 + 1);
  EXPECT_NE(range->data(), nullptr);
  EXPECT_EQ(range->size(), (1000 * (page / 2 + 1) + page - 1) / page * page);
  EXPECT_EQ(pages->counts().reserved_bytes, range->size());
  EXPECT_EQ(pages->counts().mapped_bytes, 0u);
  EXPECT_EQ(pages->counts().growths, 0u);
  const std::unique_ptr<DeviceRange> none = Range(*pages, 1000, 0);
  EXPECT_EQ(none->data(), nullptr);
  EXPECT_TRUE(CommitOne(*none, 999).ok());
}

// Items of any size, some across pages: no address changes and no byte is lost from none to all.
TEST_P(DeviceRangeTest, GrowsWithoutACopy) {
  const std::unique_ptr<DevicePages> pages = Pages(0);
  const uint64_t page = pages->page_bytes();
  for (const uint64_t item_bytes : {page / 8, page / 4 * 3 / 16 * 16, page, page * 5 / 2}) {
    SCOPED_TRACE(item_bytes);
    constexpr int64_t kItems = 20;
    const std::unique_ptr<DeviceRange> range = Range(*pages, kItems, item_bytes);
    std::byte* const data = range->data();
    DeviceRange::Stretches fresh;
    for (int32_t item = 0; item < kItems; ++item) {
      ASSERT_TRUE(CommitOne(*range, item, &fresh).ok());
      Mark(*range, item_bytes, item);
      EXPECT_EQ(range->data(), data);
      for (int32_t before = 0; before <= item; ++before)
        ASSERT_TRUE(Marked(*range, item_bytes, before)) << before;
    }
    EXPECT_EQ(pages->counts().mapped_bytes, range->size());
    uint64_t new_bytes = 0;
    for (const auto& [begin, end] : fresh) new_bytes += end - begin;
    EXPECT_EQ(new_bytes, range->size());
    EXPECT_GT(pages->counts().growth_ns, 0u);
  }
  EXPECT_EQ(pages->counts().mapped_bytes, 0u);
  EXPECT_EQ(pages->counts().reserved_bytes, 0u);
}

TEST_P(DeviceRangeTest, OnePageIsAheadOfNeed) {
  const std::unique_ptr<DevicePages> pages = Pages(0);
  const std::unique_ptr<DeviceRange> range = Range(*pages, 40, pages->page_bytes() / 4);
  std::vector<int64_t> mapped;
  for (int32_t item = 0; item < 12; item += 2) {
    ASSERT_TRUE(CommitOne(*range, item).ok());
    mapped.push_back(range->mapped_pages());
  }
  EXPECT_EQ(mapped, (std::vector<int64_t>{2, 2, 3, 3, 4, 4}));
  EXPECT_EQ(pages->counts().growths, 3u);
  ASSERT_TRUE(CommitOne(*range, 39).ok());  // nothing lies behind the last page
  EXPECT_EQ(range->mapped_pages(), 5);
}

TEST_P(DeviceRangeTest, PagesOfIdleItemsGoBackAndServeOthers) {
  const std::unique_ptr<DevicePages> pages = Pages(2);
  const uint64_t page = pages->page_bytes();
  const std::unique_ptr<DeviceRange> range = Range(*pages, 32, page / 4),
                                     other = Range(*pages, 2, page);
  std::vector<int32_t> all(32);
  std::iota(all.begin(), all.end(), 0);
  ASSERT_TRUE(range->Commit(all.data(), 32, nullptr).ok());
  Mark(*range, page / 4, 13);
  const auto idle = [](int64_t first, int64_t end) { return first > 13 || end <= 13; };
  EXPECT_EQ(range->idle_pages(idle), 7);
  EXPECT_EQ(range->mapped().size(), 8u);
  range->Reclaim(5, idle);
  EXPECT_EQ(range->mapped_pages(), 6);
  range->Reclaim(1, idle);
  EXPECT_EQ(range->mapped_pages(), 2);
  EXPECT_EQ(range->mapped(), (DeviceRange::Stretches{{0, page}, {3 * page, 4 * page}}));
  EXPECT_TRUE(Marked(*range, page / 4, 13));
  EXPECT_EQ(pages->counts().mapped_bytes, 2 * page);
  EXPECT_EQ(pages->counts().spare_bytes, 2 * page);  // six came back, four went to the driver
  ASSERT_TRUE(CommitOne(*other, 0).ok());
  EXPECT_EQ(pages->counts().spare_bytes, 0u);
  Mark(*other, page, 0);
  ASSERT_TRUE(range->Commit(all.data(), 32, nullptr).ok());
  Mark(*range, page / 4, 31);
  EXPECT_TRUE(Marked(*other, page, 0));
  EXPECT_TRUE(Marked(*range, page / 4, 13));
}

INSTANTIATE_TEST_SUITE_P(Pages, DeviceRangeTest, testing::Values("host", "device"),
                         [](const testing::TestParamInfo<const char*>& info) {
                           return std::string(info.param);
                         });

class HostRangeTest : public DeviceRangeTest {
 protected:
  void TearDown() override {
    host_pages.limit = host_pages.maps_left = INT64_MAX;
    DeviceRangeTest::TearDown();
  }
};
INSTANTIATE_TEST_SUITE_P(Pages, HostRangeTest, testing::Values("host"));

TEST_P(HostRangeTest, AFailureChangesNothing) {
  const std::unique_ptr<DevicePages> pages = Pages(0);
  const std::unique_ptr<DeviceRange> range = Range(*pages, 100, test::kHostPageBytes);
  ASSERT_TRUE(CommitOne(*range, 3).ok());
  Mark(*range, test::kHostPageBytes, 3);
  const std::vector<int32_t> items = {50, 3, 7, 60, 8};
  for (int64_t fail_at = 0; fail_at < 4; ++fail_at) {
    for (const bool map : {false, true}) {
      (map ? host_pages.maps_left : host_pages.limit) = fail_at + (map ? 0 : 2);
      DeviceRange::Stretches fresh = {{1, 2}};
      const absl::Status status = range->Commit(items.data(), 5, &fresh);
      EXPECT_EQ(CodeOf(status), map ? Code::kDeviceError : Code::kOutOfMemory) << status;
      EXPECT_EQ(fresh.size(), 1u);
      EXPECT_EQ(range->mapped_pages(), 2);
      EXPECT_EQ(host_pages.mapped, 2);
      EXPECT_TRUE(Marked(*range, test::kHostPageBytes, 3));
      host_pages.limit = host_pages.maps_left = INT64_MAX;
    }
  }
  // The page ahead is no reason to fail.
  host_pages.limit = 2 + 4;
  EXPECT_TRUE(range->Commit(items.data(), 5, nullptr).ok());
  EXPECT_EQ(range->mapped_pages(), 6);
}

TEST_P(HostRangeTest, RandomUseMatchesAModel) {
  const std::unique_ptr<DevicePages> pages = Pages(3);
  constexpr int64_t kItems = 200;
  constexpr uint64_t kBytes = test::kHostPageBytes / 16 * 5;
  const std::unique_ptr<DeviceRange> ranges[2] = {Range(*pages, kItems, kBytes),
                                                  Range(*pages, kItems, kBytes)};
  std::set<int32_t> used[2];
  std::mt19937_64 random(1);
  host_pages.limit = 60;
  int refused = 0;
  for (int step = 0; step < 3000; ++step) {
    const size_t r = random() % 2;
    if (random() % 3 > 0) {
      std::vector<int32_t> items;
      for (uint64_t n = random() % 6; n > 0; --n)
        items.push_back(static_cast<int32_t>(random() % kItems));
      const absl::Status status =
          ranges[r]->Commit(items.data(), static_cast<int64_t>(items.size()), nullptr);
      refused += !status.ok();
      if (!status.ok()) used[r].clear();
      for (size_t i = 0; status.ok() && i < items.size(); ++i) {
        if (used[r].insert(items[i]).second) Mark(*ranges[r], kBytes, items[i]);
      }
    } else {
      while (!used[r].empty() && random() % 4 > 0) used[r].erase(used[r].begin());
      ranges[r]->Reclaim(static_cast<int64_t>(random() % 4), [&](int64_t first, int64_t end) {
        const auto next = used[r].lower_bound(static_cast<int32_t>(first));
        return next == used[r].end() || *next >= end;
      });
    }
    for (const int32_t item : used[r]) ASSERT_TRUE(Marked(*ranges[r], kBytes, item)) << step;
    const PageCounts counts = pages->counts();
    ASSERT_EQ(counts.mapped_bytes, static_cast<uint64_t>(host_pages.mapped) * test::kHostPageBytes);
    ASSERT_EQ(counts.mapped_bytes + counts.spare_bytes,
              static_cast<uint64_t>(host_pages.live) * test::kHostPageBytes);
    ASSERT_LE(counts.spare_bytes, 3 * test::kHostPageBytes);
  }
  EXPECT_GT(refused, 0);
}

TEST_P(HostRangeTest, ThreadsGrowAtATime) {
  const std::unique_ptr<DevicePages> pages = Pages(4);
  constexpr uint64_t kBytes = test::kHostPageBytes / 4;
  const std::unique_ptr<DeviceRange> range = Range(*pages, 400, kBytes);
  std::vector<std::thread> threads;
  for (int32_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int32_t item = t; item < 400; item += 4) {
        ASSERT_TRUE(CommitOne(*range, item).ok());
        Mark(*range, kBytes, item);
        range->Reclaim(0, [](int64_t first, int64_t) { return first >= 400; });
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int32_t item = 0; item < 400; ++item) EXPECT_TRUE(Marked(*range, kBytes, item));
}

}  // namespace
}  // namespace vattn
