// Reservations: who has one is not told FULL, whatever others do with the pool and with its blocks.
#include "tests/api/pool_fixture.h"

namespace vattn::test {
namespace {

class ApiReserveTest : public PoolFixture {
 protected:
  // Takes everything that is free, until it is destroyed or gives up its reservation.
  void FillUp() {
    hog_ = std::make_unique<Sequence>(*runtime_);
    hog_->Reserve(Free() * 256);
    ASSERT_EQ(Free(), 0);
  }
  std::unique_ptr<Sequence> hog_;
};

TEST_F(ApiReserveTest, AllOrNothingAtAdmission) {
  MakeRuntime(10);
  const Sequence six(*runtime_, 0, 1500);
  EXPECT_EQ(InUse(), 6);
  EXPECT_EQ(Reserved(), 6);
  vattn_sequence_options options = Init<vattn_sequence_options>();
  options.reserve_tokens = 5 * 256;
  vattn_sequence* made = nullptr;
  EXPECT_EQ(vattn_sequence_create(runtime_->get(), &options, &made), VATTN_FULL);
  EXPECT_EQ(made, nullptr);
  ExpectError("need 5 blocks of " + std::to_string(block_bytes_) +
              " bytes, 4 of 10 are free (0 used, 6 reserved)");
  ExpectError("limit " + std::to_string(10 * block_bytes_) + " bytes; raise host_bytes");
  EXPECT_EQ(InUse(), 6);
  const Sequence four(*runtime_, 0, 4 * 256);
  EXPECT_EQ(Free(), 0);
}

TEST_F(ApiReserveTest, AppendsAndStepsDrawFromIt) {
  MakeRuntime(8);
  Sequence sequence(*runtime_, 0, 1024);
  Rows rows;
  ASSERT_EQ(TryAppend(sequence, rows, 100), VATTN_OK);
  FillUp();
  ASSERT_EQ(TryAppend(sequence, rows, 600), VATTN_OK);
  EXPECT_EQ(Reserved() - 4, 1);  // of the sequence; the hog has 4
  ASSERT_EQ(TrySteps(sequence, rows, 324), VATTN_OK);
  EXPECT_EQ(sequence.Length(0), 1024);
  // Used up.
  EXPECT_EQ(TrySteps(sequence, rows, 1), VATTN_FULL);
  EXPECT_EQ(TryAppend(sequence, rows, 1), VATTN_FULL);
  hog_.reset();
  EXPECT_EQ(TrySteps(sequence, rows, 2), VATTN_OK);
  EXPECT_EQ(InUse(), 5);
}

TEST_F(ApiReserveTest, ItCanBeChanged) {
  MakeRuntime(8);
  Sequence sequence(*runtime_);
  Rows rows;
  ASSERT_EQ(TryAppend(sequence, rows, 300), VATTN_OK);
  sequence.Reserve(1300);
  EXPECT_EQ(InUse(), 6);
  EXPECT_EQ(vattn_sequence_reserve(sequence.get(), 8 * 256 + 1), VATTN_FULL);
  ExpectError("need 3 blocks");
  EXPECT_EQ(InUse(), 6);  // as before
  FillUp();
  ASSERT_EQ(TryAppend(sequence, rows, 1000), VATTN_OK);
  hog_.reset();
  sequence.Reserve(2048);
  EXPECT_EQ(Free(), 0);
  sequence.Reserve(700);  // less than it has
  EXPECT_EQ(Reserved(), 0);
  EXPECT_EQ(InUse(), 6);
  sequence.Reserve(0);
  EXPECT_EQ(InUse(), 6);
}

TEST_F(ApiReserveTest, TruncationReturnsToIt) {
  MakeRuntime(8);
  Sequence sequence(*runtime_, 0, 1024);
  Rows rows;
  ASSERT_EQ(TryAppend(sequence, rows, 1500), VATTN_OK);  // two blocks past it
  EXPECT_EQ(InUse(), 6);
  sequence.Truncate(400);
  rows.Truncate(kShape, 400);
  EXPECT_EQ(InUse(), 4);
  EXPECT_EQ(Reserved(), 2);
  FillUp();
  ASSERT_EQ(TryAppend(sequence, rows, 624), VATTN_OK);
  sequence.Truncate(0);
  rows = Rows();
  ASSERT_EQ(TryAppend(sequence, rows, 1023), VATTN_OK);
  ASSERT_EQ(TrySteps(sequence, rows, 1), VATTN_OK);
  EXPECT_EQ(TrySteps(sequence, rows, 1), VATTN_FULL);
}

// The first write to each block that a fork shares makes a copy: those are reserved too.
TEST_F(ApiReserveTest, ForksTakeNothingFromIt) {
  MakeRuntime(12);
  Sequence sequence(*runtime_, 0, 1024);
  Rows rows;
  ASSERT_EQ(TryAppend(sequence, rows, 600), VATTN_OK);
  sequence.BuildIndex();
  EXPECT_EQ(InUse(), 4);
  Sequence fork = sequence.Fork();
  Rows forks = rows;
  EXPECT_EQ(InUse(), 5);  // its tail; the first two blocks are coded but for the last rows
  FillUp();
  ASSERT_EQ(TrySteps(sequence, rows, 424), VATTN_OK);
  EXPECT_EQ(sequence.Length(0), 1024);
  // The fork is alone with what it shared by now, and has no reservation.
  ASSERT_EQ(TrySteps(fork, forks, 100), VATTN_OK);
  EXPECT_EQ(TryAppend(fork, forks, 500), VATTN_FULL);
  // Cutting into what is shared again asks for room, or changes nothing.
  hog_.reset();
  const Sequence second = sequence.Fork();
  FillUp();
  EXPECT_EQ(vattn_sequence_truncate(sequence.get(), 100), VATTN_FULL);
  ExpectError("raise host_bytes");
  EXPECT_EQ(sequence.Length(0), 1024);
  hog_.reset();
  sequence.Truncate(100);
  rows.Truncate(kShape, 100);
  FillUp();
  ASSERT_EQ(TryAppend(sequence, rows, 924), VATTN_OK);
}

TEST_F(ApiReserveTest, AForkThatItHasNoRoomForIsRefused) {
  MakeRuntime(4);
  Sequence sequence(*runtime_, 0, 1024);
  Rows rows;
  ASSERT_EQ(TryAppend(sequence, rows, 600), VATTN_OK);
  vattn_sequence* made = nullptr;
  EXPECT_EQ(vattn_sequence_fork(sequence.get(), 0, &made), VATTN_FULL);
  EXPECT_EQ(made, nullptr);
  EXPECT_EQ(InUse(), 4);
  ASSERT_EQ(TryAppend(sequence, rows, 424), VATTN_OK);
  // Without a reservation a fork costs nothing.
  sequence.Reserve(0);
  const Sequence fork = sequence.Fork();
  EXPECT_EQ(InUse(), 4);
}

// What the other one copied first is not held ready any longer.
TEST_F(ApiReserveTest, CopiesThatOthersMadeAreGivenBack) {
  MakeRuntime(12);
  Sequence sequence(*runtime_, 0, 1024);
  Rows rows;
  ASSERT_EQ(TryAppend(sequence, rows, 600), VATTN_OK);
  sequence.BuildIndex();
  Sequence fork = sequence.Fork();
  Rows forks = rows;
  ASSERT_EQ(TrySteps(fork, forks, 100), VATTN_OK);
  EXPECT_EQ(InUse(), 6);
  ASSERT_EQ(TryAppend(sequence, rows, 400), VATTN_OK);
  EXPECT_EQ(InUse(), 5);
  EXPECT_EQ(Reserved(), 0);
}

TEST_F(ApiReserveTest, SleepGivesTheRoomAwayAndWakingTakesAllOfItOrNone) {
  MakeRuntime(8);
  Sequence sequence(*runtime_, 0, 1024);
  Rows rows;
  ASSERT_EQ(TryAppend(sequence, rows, 300), VATTN_OK);
  sequence.Hibernate(folder_ / "asleep");
  EXPECT_EQ(InUse(), 0);
  hog_ = std::make_unique<Sequence>(*runtime_, 0, 5 * 256);
  EXPECT_EQ(vattn_sequence_wake(sequence.get()), VATTN_FULL);
  ExpectError("need 4 blocks");
  EXPECT_EQ(InUse(), 5);
  EXPECT_EQ(TryAppend(sequence, rows, 1), VATTN_FULL);
  hog_.reset();
  sequence.Wake();
  EXPECT_EQ(InUse(), 4);
  FillUp();
  ASSERT_EQ(TryAppend(sequence, rows, 724), VATTN_OK);
  ASSERT_EQ(TrySteps(sequence, rows, 1), VATTN_FULL);
}

TEST_F(ApiReserveTest, RestoredWithOne) {
  MakeRuntime(8);
  const std::string path = folder_ / "saved";
  Rows rows;
  {
    Sequence sequence(*runtime_, 31);
    ASSERT_EQ(TryAppend(sequence, rows, 300), VATTN_OK);
    sequence.Save(path);
  }
  vattn_sequence_options options = Init<vattn_sequence_options>();
  options.reserve_tokens = 9 * 256;
  vattn_sequence* made = nullptr;
  EXPECT_EQ(vattn_sequence_restore_as(runtime_->get(), path.c_str(), &options, &made), VATTN_FULL);
  EXPECT_EQ(made, nullptr);
  ExpectError("need 9 blocks");
  EXPECT_EQ(InUse(), 0);
  options.reserve_tokens = 1024;
  Sequence sequence = Sequence::Restore(*runtime_, path, options);
  EXPECT_EQ(InUse(), 4);
  FillUp();
  ASSERT_EQ(TrySteps(sequence, rows, 200), VATTN_OK);
  ASSERT_EQ(TryAppend(sequence, rows, 524), VATTN_OK);
  EXPECT_EQ(TryAppend(sequence, rows, 1), VATTN_FULL);
}

// Its room would be gone when it wakes.
TEST_F(ApiReserveTest, ASequenceWithOneIsNotSpilled) {
  const std::string disk = folder_ / "disk";
  options_.disk_path = disk.c_str();
  options_.spill = 1;
  MakeRuntime(8);
  Sequence reserved(*runtime_, 0, 512);
  Sequence idle(*runtime_);
  Rows rows, idles;
  ASSERT_EQ(TryAppend(reserved, rows, 300), VATTN_OK);
  ASSERT_EQ(TryAppend(idle, idles, 1000), VATTN_OK);
  Sequence third(*runtime_, 0, 6 * 256);
  EXPECT_EQ(runtime_->Stats().spills, 1u);
  EXPECT_EQ(Free(), 0);
  vattn_sequence* made = nullptr;
  EXPECT_EQ(vattn_sequence_fork(idle.get(), 0, &made), VATTN_FULL);  // cannot wake
  ASSERT_EQ(TryAppend(reserved, rows, 212), VATTN_OK);
  EXPECT_EQ(runtime_->Stats().spills, 1u);
  reserved.Reserve(0);
  third.Reserve(0);
  ASSERT_EQ(TrySteps(idle, idles, 2), VATTN_OK);
  ASSERT_EQ(TryAppend(third, idles, 1024), VATTN_OK);
  EXPECT_GT(runtime_->Stats().spills, 1u);
}

TEST_F(ApiReserveTest, WithAdmissionReservedNothingElseIsTaken) {
  options_.admission = VATTN_ADMISSION_RESERVED;
  MakeRuntime(8);
  Sequence sequence(*runtime_);
  Rows rows;
  EXPECT_EQ(TryAppend(sequence, rows, 1), VATTN_FULL);
  ExpectError("the reservation is used up: need 1 blocks of " + std::to_string(block_bytes_) +
              " bytes");
  ExpectError("vattn_sequence_reserve");
  sequence.Reserve(300);
  ASSERT_EQ(TryAppend(sequence, rows, 300), VATTN_OK);
  ASSERT_EQ(TrySteps(sequence, rows, 212), VATTN_OK);  // to the end of the block
  EXPECT_EQ(TrySteps(sequence, rows, 1), VATTN_FULL);
  Sequence fork = sequence.Fork();
  Rows forks = rows;
  EXPECT_EQ(TryAppend(fork, forks, 1), VATTN_FULL);
  fork.Reserve(600);
  ASSERT_EQ(TryAppend(fork, forks, 88), VATTN_OK);
  fork.Save(folder_ / "saved");
  Sequence restored = Sequence::Restore(*runtime_, folder_ / "saved");
  Rows restoreds = forks;
  ASSERT_EQ(TrySteps(restored, restoreds, 1), VATTN_OK);
  EXPECT_EQ(TryAppend(restored, restoreds, 256), VATTN_FULL);
  EXPECT_EQ(runtime_->Stats().full_refusals, 4u);
}

}  // namespace
}  // namespace vattn::test
