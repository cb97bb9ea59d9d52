// The runtime's ordering: whatever the streams do that CUDA allows, answers are those of exact
// attention.
#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "tests/memory/host_pages.h"
#include "tests/runtime/simulated_world.h"

namespace vattn::test {
namespace {

constexpr int kOperations = 250;

class SimulatedDeviceTest : public testing::Test {
 protected:
  void SetUp() override { std::filesystem::create_directories(path_); }
  void TearDown() override {
    std::filesystem::remove_all(path_);
    EXPECT_EQ(host_pages.live, 0);  // pages of the device
  }
  const std::string path_ =
      testing::TempDir() + "simulated_device_test." + std::to_string(getpid());
};

TEST_F(SimulatedDeviceTest, AnswersAreExactWhateverTheOrder) {
  int64_t answers = 0, refused = 0, abandoned = 0;
  uint64_t copied = 0, spills = 0, growths = 0;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    SimulatedWorld world(seed, Lacks::kNothing, path_);
    world.Run(kOperations);
    EXPECT_EQ(world.wrong(), 0) << "seed " << seed << ": " << world.first_wrong();
    answers += world.answers(), refused += world.refused(), abandoned += world.abandoned();
    const StatsSnapshot stats = world.Stats();
    EXPECT_TRUE(world.EndsEmpty()) << "seed " << seed;
    copied += stats.blocks_copied, spills += stats.spills, growths += stats.device_growths;
  }
  // Everything did happen.
  EXPECT_GT(answers, 5000);
  EXPECT_GT(refused, 50);
  EXPECT_GT(abandoned, 200);
  EXPECT_GT(copied, 100u);
  EXPECT_GT(spills, 50u);
  EXPECT_GT(growths, 1000u);
}

// What a device leaves out changes an answer of some seed: the test above can fail.
TEST_F(SimulatedDeviceTest, MissingOrderShows) {
  for (const Lacks lacks : {Lacks::kEventWaits, Lacks::kSynchronizeAll, Lacks::kPageFills}) {
    int wrong = 0;
    for (uint64_t seed = 0; seed < 60 && wrong == 0; ++seed) {
      SimulatedWorld world(seed, lacks, path_);
      world.Run(kOperations);
      wrong += world.wrong() > 0;
    }
    EXPECT_EQ(wrong, 1) << static_cast<int>(lacks);
  }
}

}  // namespace
}  // namespace vattn::test
