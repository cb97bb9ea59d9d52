// Quotas: what counts for a tenant, and that one at its quota is no trouble for another.
#include "tests/api/pool_fixture.h"

namespace vattn::test {
namespace {

class ApiTenantTest : public PoolFixture {
 protected:
  int64_t UsedBy(uint64_t tenant) const {
    return Blocks(runtime_->TenantUse(tenant).host_bytes_used);
  }
  int64_t ReservedBy(uint64_t tenant) const {
    return Blocks(runtime_->TenantUse(tenant).host_bytes_reserved);
  }
  void Limit(uint64_t tenant, int64_t blocks) {
    runtime_->LimitTenant(tenant, static_cast<uint64_t>(blocks) * block_bytes_);
  }
};

TEST_F(ApiTenantTest, AQuotaStopsItsTenantAlone) {
  MakeRuntime(20);
  Limit(7, 5);
  Sequence mine(*runtime_, 0, 0, 7), other(*runtime_, 0, 0, 8), nobodys(*runtime_);
  Rows rows, others, nobodys_rows;
  ASSERT_EQ(TryAppend(mine, rows, 1024), VATTN_OK);
  EXPECT_EQ(TryAppend(mine, rows, 257), VATTN_FULL);
  ExpectError(
      "tenant 7 is at its quota of the host pool: need 2 blocks of " +
      std::to_string(block_bytes_) + " bytes, 1 of 5 are free (4 used, 0 reserved), limit " +
      std::to_string(5 * block_bytes_) + " bytes; raise it (vattn_tenant_limit, tenant_bytes)");
  EXPECT_EQ(mine.Length(0), 1024);
  ASSERT_EQ(TryAppend(other, others, 2000), VATTN_OK);
  ASSERT_EQ(TryAppend(nobodys, nobodys_rows, 500), VATTN_OK);
  ASSERT_EQ(TrySteps(mine, rows, 256), VATTN_OK);
  EXPECT_EQ(TrySteps(mine, rows, 1), VATTN_FULL);
  ASSERT_EQ(TrySteps(other, others, 20), VATTN_OK);
  EXPECT_EQ(UsedBy(7), 5);
  EXPECT_EQ(UsedBy(8), 8);
  EXPECT_EQ(UsedBy(0), 2);
  EXPECT_EQ(InUse(), 15);
  const vattn_tenant_use use = runtime_->TenantUse(7);
  EXPECT_EQ(use.host_bytes_limit, 5 * block_bytes_);
  EXPECT_EQ(use.sequences, 1u);
  EXPECT_EQ(use.full_refusals, 2u);
  EXPECT_EQ(use.quota_refusals, 2u);
  EXPECT_EQ(runtime_->Stats().quota_refusals, 2u);
  EXPECT_EQ(runtime_->TenantUse(8).full_refusals, 0u);
  // The pool's own end is not the quota's.
  EXPECT_EQ(TryAppend(other, others, 6 * 256), VATTN_FULL);
  ExpectError("the host pool is full");
  EXPECT_EQ(runtime_->TenantUse(8).full_refusals, 1u);
  EXPECT_EQ(runtime_->TenantUse(8).quota_refusals, 0u);
}

TEST_F(ApiTenantTest, ReservationsCount) {
  MakeRuntime(20);
  Limit(1, 6);
  const Sequence first(*runtime_, 0, 1024, 1);
  EXPECT_EQ(ReservedBy(1), 4);
  EXPECT_THROW(Sequence(*runtime_, 0, 600, 1), Error);
  ExpectError("need 3 blocks");
  const Sequence second(*runtime_, 0, 512, 1), other(*runtime_, 0, 14 * 256, 2);
  EXPECT_EQ(UsedBy(1), 6);
  EXPECT_EQ(Free(), 0);
}

TEST_F(ApiTenantTest, SharedBlocksCountOnce) {
  MakeRuntime(20);
  Limit(1, 5);
  std::unique_ptr<Sequence> first = std::make_unique<Sequence>(*runtime_, 0, 0, 1);
  Rows rows;
  ASSERT_EQ(TryAppend(*first, rows, 1000), VATTN_OK);
  first->BuildIndex();
  std::vector<Sequence> forks;
  for (int i = 0; i < 5; ++i) forks.push_back(first->Fork());
  EXPECT_EQ(UsedBy(1), 4);
  EXPECT_EQ(runtime_->TenantUse(1).sequences, 6u);
  Rows forks_rows = rows;
  ASSERT_EQ(TrySteps(forks[0], forks_rows, 1), VATTN_OK);  // a copy of the tail
  EXPECT_EQ(UsedBy(1), 5);
  Rows seconds_rows = rows;
  EXPECT_EQ(TrySteps(forks[1], seconds_rows, 1), VATTN_FULL);
  first.reset();
  forks.clear();
  EXPECT_EQ(UsedBy(1), 0);
  EXPECT_EQ(InUse(), 0);
}

TEST_F(ApiTenantTest, LimitsOfOnesOwnAndOfAll) {
  options_.tenant_bytes = 3 * block_bytes_ + 5;
  MakeRuntime(20);
  EXPECT_EQ(runtime_->TenantUse(4).host_bytes_limit, 3 * block_bytes_);
  EXPECT_EQ(runtime_->TenantUse(0).host_bytes_limit, 0u);
  EXPECT_THROW(Sequence(*runtime_, 0, 1024, 4), Error);
  Limit(4, 6);
  auto large = std::make_unique<Sequence>(*runtime_, 0, 1500, 4);
  // Lower than what it has: it keeps that.
  Limit(4, 2);
  EXPECT_EQ(UsedBy(4), 6);
  EXPECT_THROW(Sequence(*runtime_, 0, 1, 4), Error);
  ExpectError("0 of 2 are free (0 used, 6 reserved)");
  Rows rows;
  ASSERT_EQ(TryAppend(*large, rows, 1500), VATTN_OK);
  runtime_->LimitTenant(4, 0);
  EXPECT_EQ(runtime_->TenantUse(4).host_bytes_limit, 3 * block_bytes_);
  large.reset();
  const Sequence three(*runtime_, 0, 768, 4), four(*runtime_, 0, 1024);
  runtime_->LimitTenant(9, 1);  // less than a block: nothing
  EXPECT_THROW(Sequence(*runtime_, 0, 1, 9), Error);
}

TEST_F(ApiTenantTest, SleepersAndFilesFindTheirTenant) {
  MakeRuntime(20);
  Limit(1, 4);
  Sequence sequence(*runtime_, 0, 0, 1);
  Rows rows;
  ASSERT_EQ(TryAppend(sequence, rows, 700), VATTN_OK);
  sequence.Save(folder_ / "saved");
  sequence.Hibernate(folder_ / "asleep");
  EXPECT_EQ(UsedBy(1), 0);
  vattn_sequence_options options = Init<vattn_sequence_options>();
  options.tenant = 1;
  {
    const Sequence restored = Sequence::Restore(*runtime_, folder_ / "saved", options);
    EXPECT_EQ(UsedBy(1), 3);
    EXPECT_EQ(vattn_sequence_wake(sequence.get()), VATTN_FULL);
    ExpectError("tenant 1 is at its quota");
  }
  sequence.Wake();
  EXPECT_EQ(UsedBy(1), 3);
  EXPECT_THROW(Sequence::Restore(*runtime_, folder_ / "saved", options), Error);
  const Sequence nobodys = Sequence::Restore(*runtime_, folder_ / "saved");
  EXPECT_EQ(UsedBy(0), 3);
}

// At its quota it spills its own; when the pool is full, its own first.
TEST_F(ApiTenantTest, SpillsItsOwnFirst) {
  const std::string disk = folder_ / "disk";
  options_.disk_path = disk.c_str();
  options_.spill = 1;
  MakeRuntime(10);
  Limit(1, 6);
  Sequence other(*runtime_, 0, 0, 2), first(*runtime_, 0, 0, 1), second(*runtime_, 0, 0, 1);
  Rows others, rows, seconds;
  ASSERT_EQ(TryAppend(other, others, 1000), VATTN_OK);  // unused for longest
  ASSERT_EQ(TryAppend(first, rows, 1000), VATTN_OK);
  ASSERT_EQ(TryAppend(second, seconds, 1000), VATTN_OK);
  EXPECT_EQ(runtime_->Stats().spills, 1u);
  EXPECT_EQ(UsedBy(1), 4);
  EXPECT_EQ(UsedBy(2), 4);
  // Six blocks and no other of its own: too much for its quota, and the other stays.
  EXPECT_EQ(TryAppend(second, seconds, 1000), VATTN_FULL);
  EXPECT_EQ(UsedBy(2), 4);
  EXPECT_EQ(runtime_->TenantUse(1).quota_refusals, 1u);
  Limit(1, 20);
  ASSERT_EQ(TrySteps(first, rows, 1), VATTN_OK);  // wakes in place of the second
  EXPECT_EQ(UsedBy(2), 4);
  // Under its limit it may take others' places in a full pool.
  ASSERT_EQ(TryAppend(first, rows, 1000), VATTN_OK);
  EXPECT_EQ(UsedBy(2), 0);
  ASSERT_EQ(TrySteps(other, others, 1), VATTN_OK);
}

TEST_F(ApiTenantTest, PrometheusTextNamesThem) {
  MakeRuntime(20);
  Limit(12, 5);
  const Sequence mine(*runtime_, 0, 500, 12), other(*runtime_, 0, 100, 3);
  const std::string text = PrometheusText(*runtime_);
  const auto expect = [&](const std::string& line) {
    EXPECT_NE(text.find("\n" + line + "\n"), std::string::npos) << line << " is not in\n" << text;
  };
  expect("# TYPE vattn_tenant_host_bytes_used gauge");
  expect("vattn_tenant_host_bytes_limit{tenant=\"12\"} " + std::to_string(5 * block_bytes_));
  expect("vattn_tenant_host_bytes_limit{tenant=\"3\"} 0");
  expect("vattn_tenant_host_bytes_used{tenant=\"12\"} " + std::to_string(2 * block_bytes_));
  expect("vattn_tenant_host_bytes_reserved{tenant=\"3\"} " + std::to_string(block_bytes_));
  expect("vattn_tenant_sequences{tenant=\"3\"} 1");
  expect("vattn_tenant_quota_refusals{tenant=\"3\"} 0");
  expect("vattn_host_bytes_reserved " + std::to_string(3 * block_bytes_));
  EXPECT_EQ(text.find("tenant=\"0\""), std::string::npos);
}

}  // namespace
}  // namespace vattn::test
