// Prefixes kept in the host pool: found by their tokens, shared, let go when room is wanted.
#include "tests/api/pool_fixture.h"

namespace vattn::test {
namespace {

class ApiKeptTest : public PoolFixture {
 protected:
  // A sequence with rows of its own under these ids, kept and destroyed.
  Rows Keep(const std::string& salt, const std::vector<int32_t>& tokens, uint64_t tenant = 0) {
    Sequence sequence(*runtime_, 0, 0, tenant);
    Rows rows;
    EXPECT_EQ(TryAppend(sequence, rows, static_cast<int64_t>(tokens.size())), VATTN_OK);
    sequence.SavePrefix(OwnedPrefix(salt, tokens));
    return rows;
  }
  // Tokens that a sequence begins with; 0: none.
  int64_t Begins(const std::string& salt, const std::vector<int32_t>& tokens) {
    int64_t begins = -1;
    vattn_sequence* made = nullptr;
    const OwnedPrefix prefix(salt, tokens);
    const vattn_code code = vattn_prefix_restore(runtime_->get(), &prefix, 0, &begins, &made);
    EXPECT_TRUE(code == VATTN_OK || (code == VATTN_NOT_FOUND && begins == 0)) << vattn_last_error();
    vattn_sequence_destroy(made);
    return begins;
  }
};

TEST_F(ApiKeptTest, SequencesBeginFromIt) {
  MakeRuntime(20);
  Rows rows;
  {
    Sequence sequence(*runtime_);
    ASSERT_EQ(TryAppend(sequence, rows, 1000), VATTN_OK);
    sequence.SavePrefix(OwnedPrefix("model", Tokens(900)));
    sequence.SavePrefix(OwnedPrefix("model", Tokens(900)));  // there already
    sequence.SavePrefix(OwnedPrefix("model", Tokens(400)));  // the longer one serves
    EXPECT_EQ(InUse(), 4);
    Rows longer = rows;
    ASSERT_EQ(TrySteps(sequence, longer, 3), VATTN_OK);
    EXPECT_EQ(InUse(), 5);  // its tail is a copy
  }
  EXPECT_EQ(InUse(), 4);
  EXPECT_EQ(runtime_->Stats().sequences, 0u);
  EXPECT_EQ(runtime_->Stats().tokens, 0u);
  std::vector<int32_t> tokens = Tokens(1200);
  tokens[700] = -1;
  int64_t begins = 0;
  Sequence begun = Sequence::Begin(*runtime_, OwnedPrefix("model", tokens), &begins, 5);
  EXPECT_EQ(begins, 700);
  EXPECT_EQ(begun.Length(0), 700);
  EXPECT_EQ(InUse(), 4);
  rows.Truncate(kShape, 700);
  Rows begun_rows = rows;
  ASSERT_EQ(TryAppend(begun, begun_rows, 300), VATTN_OK);
  ASSERT_EQ(TrySteps(begun, begun_rows, 10), VATTN_OK);
  // Its writes went to copies: another one begins with the same rows.
  Sequence second = Sequence::Begin(*runtime_, OwnedPrefix("model", tokens), &begins);
  ASSERT_EQ(TrySteps(second, rows, 10), VATTN_OK);
  const vattn_stats stats = runtime_->Stats();
  EXPECT_EQ(stats.memory_prefixes, 1u);
  EXPECT_EQ(stats.memory_prefixes_saved, 1u);
  EXPECT_EQ(stats.disk_prefixes_saved, 0u);
  EXPECT_EQ(stats.memory_prefix_hits, 2u);
  EXPECT_EQ(stats.prefix_hits, 2u);
  EXPECT_EQ(stats.prefix_tokens, 1400u);
}

TEST_F(ApiKeptTest, SaltsNeverMeetAndTokensAreCompared) {
  MakeRuntime(20);
  Keep("a", Tokens(600));
  EXPECT_EQ(Begins("a", Tokens(600)), 600);
  EXPECT_EQ(Begins("a", Tokens(2000)), 600);
  EXPECT_EQ(Begins("a", Tokens(599)), 599);
  EXPECT_EQ(Begins("a", Tokens(255)), 0);
  EXPECT_EQ(Begins("b", Tokens(600)), 0);
  EXPECT_EQ(Begins("a", Tokens(600, 1)), 0);
  EXPECT_EQ(runtime_->Stats().prefix_misses, 3u);
  Keep("b", Tokens(300));
  EXPECT_EQ(Begins("b", Tokens(600)), 300);
  EXPECT_EQ(runtime_->ForgetPrefixes("a"), 1);
  EXPECT_EQ(Begins("a", Tokens(600)), 0);
  EXPECT_EQ(InUse(), 2);
  EXPECT_EQ(runtime_->ForgetPrefixes("b"), 1);
  EXPECT_EQ(InUse(), 0);
}

// Of prefixes that begin alike the one that goes on alike is taken, whole pieces or not.
TEST_F(ApiKeptTest, TheLongestSharedIsTaken) {
  MakeRuntime(40);
  std::vector<int32_t> other = Tokens(2000);
  other[650] = -1;
  Keep("m", Tokens(600));
  Keep("m", other);  // 650 alike, and more pieces than the next
  std::vector<int32_t> third = Tokens(800);
  third[700] = -2;
  Keep("m", third);
  EXPECT_EQ(Begins("m", Tokens(1000)), 700);
  EXPECT_EQ(Begins("m", other), 2000);
  EXPECT_EQ(runtime_->Stats().memory_prefixes, 2u);  // that of 600 begins both others
}

TEST_F(ApiKeptTest, TheOldestGoesBeforeAnybodyIsRefused) {
  MakeRuntime(10);
  Keep("m", Tokens(700));                    // 3 blocks
  Keep("m", Tokens(700, 1000));              // 3
  Keep("m", Tokens(700, 2000));              // 3
  EXPECT_EQ(Begins("m", Tokens(700)), 700);  // used: the second is the oldest
  Sequence sequence(*runtime_);
  Rows rows;
  ASSERT_EQ(TryAppend(sequence, rows, 1000), VATTN_OK);
  EXPECT_EQ(runtime_->Stats().memory_prefixes_evicted, 1u);
  EXPECT_EQ(Begins("m", Tokens(700, 1000)), 0);
  EXPECT_EQ(Begins("m", Tokens(700, 2000)), 700);
  EXPECT_EQ(Begins("m", Tokens(700)), 700);
  // What would never fit costs nobody anything.
  EXPECT_EQ(TryAppend(sequence, rows, 3000), VATTN_FULL);
  EXPECT_EQ(runtime_->Stats().memory_prefixes, 2u);
  sequence.Reserve(10 * 256);
  EXPECT_EQ(runtime_->Stats().memory_prefixes, 0u);
  EXPECT_EQ(Free(), 0);
}

// Letting go of what others hold gives no room: it stays.
TEST_F(ApiKeptTest, WhatIsInUseAnywayStays) {
  MakeRuntime(6);
  Sequence sequence(*runtime_);
  Rows rows;
  ASSERT_EQ(TryAppend(sequence, rows, 1024), VATTN_OK);
  sequence.SavePrefix(OwnedPrefix("m", Tokens(1024)));
  Sequence other(*runtime_);
  Rows others;
  EXPECT_EQ(TryAppend(other, others, 700), VATTN_FULL);
  EXPECT_EQ(Begins("m", Tokens(1024)), 1024);
}

// The same rows under two names, of which neither would give room alone.
TEST_F(ApiKeptTest, TwoNamesOfTheSameRowsGoTogether) {
  MakeRuntime(6);
  {
    Sequence sequence(*runtime_);
    Rows rows;
    ASSERT_EQ(TryAppend(sequence, rows, 1024), VATTN_OK);
    sequence.SavePrefix(OwnedPrefix("a", Tokens(1024)));
    sequence.SavePrefix(OwnedPrefix("b", Tokens(1024)));
  }
  EXPECT_EQ(InUse(), 4);
  const Sequence all(*runtime_, 0, 6 * 256);
  EXPECT_EQ(runtime_->Stats().memory_prefixes, 0u);
}

TEST_F(ApiKeptTest, QuotasCoverThem) {
  MakeRuntime(20);
  runtime_->LimitTenant(1, 6 * block_bytes_);
  Keep("m", Tokens(500, 5000), 2);
  Keep("m", Tokens(1000), 1);
  EXPECT_EQ(Blocks(runtime_->TenantUse(1).host_bytes_used), 4);
  EXPECT_EQ(runtime_->TenantUse(1).sequences, 0u);
  // Another tenant may begin from it; the blocks stay the first one's.
  int64_t begins = 0;
  OwnedPrefix prefix("m", Tokens(1000));
  prefix.tenant = 3;
  prefix.reserve_tokens = 1300;
  std::unique_ptr<Sequence> begun =
      std::make_unique<Sequence>(Sequence::Begin(*runtime_, prefix, &begins));
  EXPECT_EQ(Blocks(runtime_->TenantUse(1).host_bytes_used), 4);
  // Two to come, and copies of the tail and of where codes go on, which is the block before.
  EXPECT_EQ(Blocks(runtime_->TenantUse(3).host_bytes_used), 3);
  begun.reset();
  EXPECT_EQ(runtime_->TenantUse(3).host_bytes_used, 0u);
  // At its quota the tenant's own goes, the other's older one stays.
  const Sequence mine(*runtime_, 0, 1024, 1);
  EXPECT_EQ(Begins("m", Tokens(1000)), 0);
  EXPECT_EQ(Begins("m", Tokens(500, 5000)), 500);
}

TEST_F(ApiKeptTest, ReservationsSurviveBeingKept) {
  MakeRuntime(6);
  Sequence sequence(*runtime_, 0, 1024);
  Rows rows;
  ASSERT_EQ(TryAppend(sequence, rows, 700), VATTN_OK);
  sequence.SavePrefix(OwnedPrefix("m", Tokens(700)));
  EXPECT_EQ(InUse(), 5);  // a copy of the tail is held ready
  const Sequence hog(*runtime_, 0, 256);
  ASSERT_EQ(TrySteps(sequence, rows, 324), VATTN_OK);
  EXPECT_EQ(sequence.Length(0), 1024);
  // A new one with a reservation of its own, or none.
  OwnedPrefix prefix("m", Tokens(700));
  prefix.reserve_tokens = 1024;
  int64_t begins = 0;
  vattn_sequence* made = nullptr;
  EXPECT_EQ(vattn_prefix_restore(runtime_->get(), &prefix, 0, &begins, &made), VATTN_FULL);
  EXPECT_EQ(made, nullptr);
  EXPECT_EQ(begins, 0);
  EXPECT_EQ(InUse(), 6);
}

TEST_F(ApiKeptTest, TheDiskIsAskedWhereItHasMore) {
  const std::string disk = folder_ / "disk";
  options_.disk_path = disk.c_str();
  MakeRuntime(40);
  Rows rows;
  Sequence sequence(*runtime_);
  ASSERT_EQ(TryAppend(sequence, rows, 1000), VATTN_OK);
  sequence.SavePrefix(OwnedPrefix("m", Tokens(1000)));  // to the disk
  EXPECT_EQ(runtime_->Stats().memory_prefixes_saved, 0u);
  EXPECT_EQ(runtime_->Stats().disk_prefixes_saved, 1u);
  OwnedPrefix shorter("m", Tokens(600)), prefix("m", Tokens(1000));
  shorter.tier = VATTN_TIER_MEMORY;
  sequence.SavePrefix(shorter);
  EXPECT_EQ(Begins("m", Tokens(700)), 600);
  EXPECT_EQ(runtime_->Stats().memory_prefix_hits, 1u);
  EXPECT_EQ(Begins("m", Tokens(1000)), 1000);
  EXPECT_EQ(runtime_->Stats().memory_prefix_hits, 1u);
  EXPECT_EQ(runtime_->Stats().restores, 1u);
  // One place alone.
  int64_t begins = 0;
  prefix.tier = VATTN_TIER_MEMORY;
  Sequence begun = Sequence::Begin(*runtime_, prefix, &begins);
  EXPECT_EQ(begins, 600);
  prefix.tier = VATTN_TIER_DISK;
  begun = Sequence::Begin(*runtime_, prefix, &begins);
  EXPECT_EQ(begins, 1000);
  ASSERT_EQ(TrySteps(begun, rows, 2), VATTN_OK);
  // A damaged file leaves what is in memory.
  for (const auto& entry : std::filesystem::directory_iterator(disk)) {
    if (entry.path().filename().string().rfind("prefix-", 0) != 0) continue;
    std::filesystem::resize_file(entry.path(), entry.file_size() / 2);
  }
  EXPECT_EQ(Begins("m", Tokens(1000)), 600);
  EXPECT_EQ(runtime_->Stats().disk_prefixes_damaged, 1u);
  EXPECT_EQ(runtime_->Stats().prefix_misses, 0u);
  EXPECT_EQ(runtime_->ForgetPrefixes("m"), 1);
}

// Answers from memory are those of the sequence that was kept, to the bit: index and codes are its.
TEST_F(ApiKeptTest, VerifiedAnswersAreTheSame) {
  options_.policy = VATTN_POLICY_VERIFIED;
  options_.epsilon = .3f;
  MakeRuntime(60);
  Rows rows;
  Sequence sequence(*runtime_, 5);
  ASSERT_EQ(TryAppend(sequence, rows, 4000), VATTN_OK);
  sequence.SavePrefix(OwnedPrefix("m", Tokens(4000)));
  int64_t begins = 0;
  Sequence begun = Sequence::Begin(*runtime_, OwnedPrefix("m", Tokens(4000)), &begins, 5);
  Call calls[2] = {Call(kShape, 1, 0), Call(kShape, 1, 0)};
  for (int step = 0; step < 5; ++step) {
    calls[0].Fill(engine_, 1);
    calls[1] = calls[0];
    for (int side = 0; side < 2; ++side) {
      Batch batch(*runtime_, 1);
      batch.Set(0, side == 0 ? sequence : begun);
      batch.BeginStep(1);
      batch.Attend(calls[side].Params());
    }
    EXPECT_EQ(calls[0].out, calls[1].out);
    EXPECT_EQ(calls[0].selected, calls[1].selected);
  }
  EXPECT_EQ(runtime_->Stats().heads_exact, 0u);
}

}  // namespace
}  // namespace vattn::test
