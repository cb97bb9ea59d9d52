#include "kernels/cpu/workers.h"

#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>

namespace vattn::cpu {
namespace {

TEST(WorkersTest, ABodyThatThrowsEndsItsCallAlone) {
  Workers workers(0);
  ASSERT_TRUE(workers.Start());
  for (int round = 0; round < 3; ++round) {
    EXPECT_THROW(ParallelFor(&workers, 1000,
                             [](int64_t i) {
                               if (i % 100 == 7) throw std::runtime_error("no");
                             }),
                 std::runtime_error);
    std::atomic<int64_t> sum{0};
    ParallelFor(&workers, 1000, [&](int64_t i) { sum += i; });
    EXPECT_EQ(sum, 499500);
  }
}

TEST(WorkersTest, MoreThreadsThanThereAreCountAsAll) {
  testing::internal::CaptureStderr();
  Workers all(0), more(4096);
  EXPECT_EQ(more.num_threads(), all.num_threads());
  EXPECT_TRUE(more.Start());
  std::atomic<int64_t> sum{0};
  ParallelFor(&more, 10, [&](int64_t i) { sum += i; });
  EXPECT_EQ(sum, 45);
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");  // oneTBB would warn
}

}  // namespace
}  // namespace vattn::cpu
