#include "memory/virtual_range.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "memory/status.h"

namespace vattn {
namespace {

int64_t ResidentPages(const VirtualRange& range) {
  std::vector<unsigned char> resident(range.size() / PageBytes());
  EXPECT_EQ(mincore(range.data(), range.size(), resident.data()), 0);
  int64_t count = 0;
  for (const unsigned char page : resident) count += page & 1;
  return count;
}

TEST(VirtualRangeTest, PagesComeWithUse) {
  const uint64_t page = PageBytes();
  absl::StatusOr<VirtualRange> range = VirtualRange::Reserve(100 * page, {});
  ASSERT_TRUE(range.ok()) << range.status();
  EXPECT_EQ(range->size(), 100 * page);
  EXPECT_EQ(ResidentPages(*range), 0);
  for (uint64_t i = 10; i < 20; ++i) range->data()[i * page] = std::byte{1};
  EXPECT_EQ(ResidentPages(*range), 10);
}

TEST(VirtualRangeTest, MayExceedPhysicalMemory) {
  const uint64_t bytes = uint64_t{8} << 40;
  absl::StatusOr<VirtualRange> range = VirtualRange::Reserve(bytes, {});
  if (!range.ok()) GTEST_SKIP() << range.status();
  range->data()[bytes - 1] = std::byte{7};
  EXPECT_EQ(range->data()[bytes - 1], std::byte{7});
}

TEST(VirtualRangeTest, HugePagesAlignTheStart) {
  absl::StatusOr<VirtualRange> range = VirtualRange::Reserve(5000, {.huge_pages = true});
  ASSERT_TRUE(range.ok()) << range.status();
  EXPECT_EQ(reinterpret_cast<uintptr_t>(range->data()) % (2 << 20), 0u);
  EXPECT_GE(range->size(), 5000u);
  range->data()[0] = range->data()[range->size() - 1] = std::byte{1};
}

TEST(VirtualRangeTest, MoveLeavesOneOwner) {
  absl::StatusOr<VirtualRange> made = VirtualRange::Reserve(1, {});
  ASSERT_TRUE(made.ok());
  VirtualRange first = *std::move(made);
  std::byte* const data = first.data();
  VirtualRange second;
  second = std::move(first);
  EXPECT_EQ(second.data(), data);
  EXPECT_EQ(first.data(), nullptr);  // NOLINT: moved from on purpose
  EXPECT_EQ(first.size(), 0u);
  *data = std::byte{3};
}

TEST(VirtualRangeTest, RefusalsAreErrors) {
  EXPECT_EQ(CodeOf(VirtualRange::Reserve(0, {}).status()), Code::kInvalidArgument);
  const uint64_t all = std::numeric_limits<uint64_t>::max();
  EXPECT_EQ(CodeOf(VirtualRange::Reserve(all, {}).status()), Code::kInvalidArgument);
  const absl::Status full = VirtualRange::Reserve(all / 2, {}).status();
  EXPECT_EQ(CodeOf(full), Code::kOutOfMemory);
  EXPECT_NE(std::string(full.message()).find(std::to_string(all / 2 + 1)), std::string::npos)
      << full;
}

}  // namespace
}  // namespace vattn
