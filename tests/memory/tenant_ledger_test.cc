#include "memory/tenant_ledger.h"

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <random>
#include <vector>

#include "memory/host_store.h"
#include "memory/status.h"

namespace vattn {
namespace {

TEST(TenantLedgerTest, KnownAsLongAsThereIsSomethingToKnow) {
  TenantLedger ledger(10);
  EXPECT_EQ(ledger.All().size(), 1u);  // 0
  EXPECT_EQ(ledger.use(TenantSlot::kNone).limit, kNoTenantLimit);
  EXPECT_EQ(ledger.Find(5).limit, 10);
  const TenantSlot five = ledger.Open(5);
  EXPECT_EQ(ledger.Open(5), five);
  ledger.Take(five, 3);
  ledger.Refuse(five, true);
  ledger.Close(five);
  ledger.Close(five);
  EXPECT_EQ(ledger.Find(5).used, 3);
  EXPECT_EQ(ledger.Find(5).quota_refusals, 1u);
  ledger.Give(five, 3);
  EXPECT_EQ(ledger.All().size(), 1u);
  EXPECT_EQ(ledger.Find(5).quota_refusals, 0u);
  // Its slot serves the next.
  EXPECT_EQ(ledger.Open(6), five);
  EXPECT_EQ(ledger.num_slots(), 2u);
  ledger.SetLimit(6, 4);
  ledger.Close(five);
  EXPECT_EQ(ledger.Find(6).limit, 4);
  ledger.ClearLimit(6);
  ledger.ClearLimit(7);
  EXPECT_EQ(ledger.All().size(), 1u);
  EXPECT_TRUE(ledger.CheckInvariants({0, 0}, 0).ok());
}

TEST(TenantLedgerTest, ContradictionsAreFound) {
  TenantLedger ledger(kNoTenantLimit);
  const TenantSlot one = ledger.Open(1);
  ledger.Take(one, 2);
  ledger.Reserve(one, 1);
  EXPECT_TRUE(ledger.CheckInvariants({0, 2}, 1).ok());
  EXPECT_EQ(CodeOf(ledger.CheckInvariants({0, 3}, 1)), Code::kInternal);
  EXPECT_EQ(CodeOf(ledger.CheckInvariants({2, 0}, 1)), Code::kInternal);
  EXPECT_EQ(CodeOf(ledger.CheckInvariants({0, 2}, 0)), Code::kInternal);
}

// A pool of several tenants, whose blocks change hands.
TEST(TenantLedgerTest, RandomOperationsOnAPoolMatchAModel) {
  constexpr int64_t kBlocks = 120;
  absl::StatusOr<std::unique_ptr<HostStore>> made = HostStore::Create({.limit_bytes = kBlocks * 64,
                                                                       .block_bytes = 64,
                                                                       .tenant_bytes = 50 * 64,
                                                                       .huge_pages = false});
  ASSERT_TRUE(made.ok()) << made.status();
  HostStore& store = **made;
  store.SetTenantLimit(2, 30 * 64);
  struct Holder {
    OpenTenant tenant;
    std::vector<int64_t> blocks;
    int64_t reserved = 0;
  };
  std::vector<Holder> holders;
  std::map<int64_t, int> references;
  std::map<int64_t, uint64_t> owner;
  std::mt19937 random(3);
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  for (uint64_t i = 0; i < 8; ++i) holders.push_back({OpenTenant(store, i % 4), {}, 0});
  const auto drop = [&](int64_t block) {
    if (--references[block] > 0) return;
    references.erase(block);
    owner.erase(block);
  };
  const auto held = [&](uint64_t tenant) {
    int64_t blocks = 0;
    for (const auto& [block, whose] : owner) blocks += whose == tenant;
    for (const Holder& holder : holders) {
      if (holder.tenant.number() == tenant) blocks += holder.reserved;
    }
    return blocks;
  };
  for (int step = 0; step < 20000; ++step) {
    Holder& holder = holders[below(holders.size())];
    const uint64_t tenant = holder.tenant.number();
    const int64_t limit = tenant == 0 ? kBlocks : tenant == 2 ? 30 : 50;
    int64_t all = 0;
    for (uint64_t i = 0; i < 4; ++i) all += held(i);
    const int64_t count = static_cast<int64_t>(below(12));
    const bool fits = count <= kBlocks - all && held(tenant) + count <= limit;
    BlockId ids[12];
    switch (below(6)) {
      case 0:
      case 1: {
        const bool from_reserve = below(2) == 0;
        if (from_reserve && count > holder.reserved) break;
        const absl::Status status = from_reserve
                                        ? store.AllocateReserved(count, ids, holder.tenant.slot())
                                        : store.Allocate(count, ids, holder.tenant.slot());
        ASSERT_EQ(CodeOf(status), from_reserve || fits ? Code::kOk : Code::kFull) << status;
        if (!status.ok()) break;
        if (from_reserve) holder.reserved -= count;
        for (int64_t i = 0; i < count; ++i) {
          const int64_t block = static_cast<int64_t>(ids[i]);
          ASSERT_TRUE(owner.emplace(block, tenant).second);
          references[block] = 1;
          holder.blocks.push_back(block);
        }
        break;
      }
      case 2: {
        const absl::Status status = store.Reserve(count, holder.tenant.slot());
        ASSERT_EQ(CodeOf(status), fits ? Code::kOk : Code::kFull) << status;
        if (status.ok()) holder.reserved += count;
        break;
      }
      case 3: {  // to another holder, of whatever tenant
        Holder& other = holders[below(holders.size())];
        for (const int64_t block : std::vector<int64_t>(holder.blocks)) {
          if (other.blocks.size() > 40 || below(3) > 0) continue;
          store.AddReference(BlockId{static_cast<int32_t>(block)});
          ++references[block];
          other.blocks.push_back(block);
        }
        break;
      }
      case 4:
        while (!holder.blocks.empty() && below(8) > 0) {
          const int64_t block = holder.blocks.back();
          const BlockId id{static_cast<int32_t>(block)};
          holder.blocks.pop_back();
          ASSERT_EQ(store.NumReferences(id), references[block]);
          ASSERT_EQ(store.TenantOf(id) == holder.tenant.slot(), owner[block] == tenant);
          if (references[block] == 1 && owner[block] == tenant && below(2) == 0) {
            store.ReleaseToReserve(id);
            ++holder.reserved;
          } else {
            store.Release(id);
          }
          drop(block);
        }
        break;
      default: {
        const int64_t back = std::min(count, holder.reserved);
        store.Unreserve(back, holder.tenant.slot());
        holder.reserved -= back;
      }
    }
    for (uint64_t i = 0; i < 4; ++i) {
      const TenantUse use = store.UseOf(i);
      ASSERT_EQ(use.used + use.reserved, held(i));
      ASSERT_EQ(store.QuotaAllows(31, holders[i].tenant.slot()),
                i == 0 || held(i) + 31 <= use.limit);
    }
    if (step % 16 != 0) continue;
    const absl::Status invariants = store.CheckInvariants();
    ASSERT_TRUE(invariants.ok()) << invariants;
  }
}

}  // namespace
}  // namespace vattn
