#include "memory/host_store.h"

#include <algorithm>
#include <atomic>
#include <cassert>
#include <cstring>
#include <mutex>
#include <utility>

#include "memory/status.h"

namespace vattn {
namespace {

absl::Status CheckCount(int64_t count, int64_t num_blocks) {
  if (count >= 0) return absl::OkStatus();
  return OutOfRangeError("count of blocks", count, 0, num_blocks);
}

}  // namespace

OpenTenant::OpenTenant(HostStore& store, uint64_t tenant) {
  const std::lock_guard lock(store.mutex_);
  slot_ = store.tenants_.Open(tenant);
  store_ = &store;
  number_ = tenant;
}

OpenTenant::OpenTenant(OpenTenant&& other) noexcept { *this = std::move(other); }

OpenTenant& OpenTenant::operator=(OpenTenant&& other) noexcept {
  std::swap(store_, other.store_);
  std::swap(slot_, other.slot_);
  std::swap(number_, other.number_);
  return *this;
}

OpenTenant::~OpenTenant() {
  if (store_ == nullptr) return;
  const std::lock_guard lock(store_->mutex_);
  store_->tenants_.Close(slot_);
}

HostStore::HostStore(VirtualRange range, VirtualRange states, uint64_t block_bytes,
                     int64_t num_blocks, int64_t tenant_blocks, bool zero_on_free)
    : range_(std::move(range)),
      states_(std::move(states)),
      block_bytes_(block_bytes),
      num_blocks_(num_blocks),
      zero_on_free_(zero_on_free),
      used_(num_blocks),
      tenants_(tenant_blocks) {}

HostStore::~HostStore() = default;

HostStore::BlockState& HostStore::State(BlockId block) const {
  const int32_t index = static_cast<int32_t>(block);
  assert(index >= 0 && index < num_blocks_);
  return reinterpret_cast<BlockState*>(states_.data())[index];
}

int64_t HostStore::FreeLocked() const { return num_blocks_ - used_.num_taken() - num_reserved_; }

absl::Status HostStore::CheckRoomLocked(int64_t count, TenantSlot tenant) const {
  const TenantUse& use = tenants_.use(tenant);
  if (count > use.room()) {
    return FullError("tenant ", use.tenant, " is at its quota of the host pool: need ", count,
                     " blocks of ", block_bytes_, " bytes, ", std::max<int64_t>(0, use.room()),
                     " of ", use.limit, " are free (", use.used, " used, ", use.reserved,
                     " reserved), limit ", static_cast<uint64_t>(use.limit) * block_bytes_,
                     " bytes; raise it (vattn_tenant_limit, tenant_bytes) or free its sequences");
  }
  if (count <= FreeLocked()) return absl::OkStatus();
  return FullError("the host pool is full: need ", count, " blocks of ", block_bytes_, " bytes, ",
                   FreeLocked(), " of ", num_blocks_, " are free (", used_.num_taken(), " used, ",
                   num_reserved_, " reserved), limit ", range_.size(),
                   " bytes; raise host_bytes or free sequences");
}

void HostStore::TakeLocked(int64_t count, BlockId* out, TenantSlot tenant) {
  tenants_.Take(tenant, count);
  used_.Take(count, [&](int64_t first, int64_t length) {
    for (int64_t i = first; i < first + length; ++i) {
      const BlockId block = static_cast<BlockId>(i);
      State(block).tenant = tenant;
      std::atomic_ref<int32_t>(State(block).references).store(1, std::memory_order_relaxed);
      *out++ = block;
    }
  });
}

absl::Status HostStore::Allocate(int64_t count, BlockId* out, TenantSlot tenant) {
  VATTN_RETURN_IF_ERROR(CheckCount(count, num_blocks_));
  const std::lock_guard lock(mutex_);
  VATTN_RETURN_IF_ERROR(CheckRoomLocked(count, tenant));
  TakeLocked(count, out, tenant);
  return absl::OkStatus();
}

void HostStore::AddReference(BlockId block) {
  // Relaxed: the caller's own reference orders this against the block's release.
  [[maybe_unused]] const int32_t before =
      std::atomic_ref<int32_t>(State(block).references).fetch_add(1, std::memory_order_relaxed);
  assert(before >= 1);
  extra_references_.fetch_add(1, std::memory_order_relaxed);
}

bool HostStore::Drop(BlockId block) {
  // Release: what this holder did is visible to whoever sees the lower count (IsUnique) or gets the
  // block next. Acquire: with the last reference, what all others did.
  const int32_t before =
      std::atomic_ref<int32_t>(State(block).references).fetch_sub(1, std::memory_order_acq_rel);
  assert(before >= 1);
  if (before != 1) {
    extra_references_.fetch_sub(1, std::memory_order_release);
    return false;
  }
  if (zero_on_free_) std::memset(data(block), 0, block_bytes_);
  return true;
}

void HostStore::Release(BlockId block) {
  if (!Drop(block)) return;
  const std::lock_guard lock(mutex_);
  used_.Give(static_cast<int64_t>(block));
  tenants_.Give(State(block).tenant, 1);
}

void HostStore::ReleaseToReserve(BlockId block) {
  [[maybe_unused]] const bool last = Drop(block);
  assert(last);
  const std::lock_guard lock(mutex_);
  used_.Give(static_cast<int64_t>(block));
  tenants_.Reserve(State(block).tenant, 1);  // first: it may hold nothing else
  tenants_.Give(State(block).tenant, 1);
  ++num_reserved_;
}

bool HostStore::IsUnique(BlockId block) const {
  return std::atomic_ref<int32_t>(State(block).references).load(std::memory_order_acquire) == 1;
}

int64_t HostStore::NumReferences(BlockId block) const {
  return std::atomic_ref<int32_t>(State(block).references).load(std::memory_order_relaxed);
}

absl::Status HostStore::Reserve(int64_t count, TenantSlot tenant) {
  VATTN_RETURN_IF_ERROR(CheckCount(count, num_blocks_));
  const std::lock_guard lock(mutex_);
  VATTN_RETURN_IF_ERROR(CheckRoomLocked(count, tenant));
  tenants_.Reserve(tenant, count);
  num_reserved_ += count;
  return absl::OkStatus();
}

void HostStore::Unreserve(int64_t count, TenantSlot tenant) {
  const std::lock_guard lock(mutex_);
  assert(count >= 0 && count <= num_reserved_);
  tenants_.Unreserve(tenant, count);
  num_reserved_ -= count;
}

absl::Status HostStore::AllocateReserved(int64_t count, BlockId* out, TenantSlot tenant) {
  VATTN_RETURN_IF_ERROR(CheckCount(count, num_blocks_));
  const std::lock_guard lock(mutex_);
  if (const TenantUse& use = tenants_.use(tenant); count > use.reserved) {
    return InternalError("allocation of ", count, " reserved blocks, but only ", use.reserved,
                         " are reserved");
  }
  tenants_.Unreserve(tenant, count);
  num_reserved_ -= count;
  TakeLocked(count, out, tenant);
  return absl::OkStatus();
}

bool HostStore::QuotaAllows(int64_t count, TenantSlot tenant) const {
  const std::lock_guard lock(mutex_);
  return count <= tenants_.use(tenant).room();
}

int64_t HostStore::MostBlocks(TenantSlot tenant) const {
  const std::lock_guard lock(mutex_);
  return std::min(num_blocks_, tenants_.use(tenant).limit);
}

void HostStore::CountRefusal(bool for_quota, TenantSlot tenant) {
  const std::lock_guard lock(mutex_);
  tenants_.Refuse(tenant, for_quota);
}

void HostStore::SetTenantLimit(uint64_t tenant, uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  if (bytes == 0) return tenants_.ClearLimit(tenant);
  tenants_.SetLimit(tenant, static_cast<int64_t>(bytes / block_bytes_));
}

TenantUse HostStore::UseOf(uint64_t tenant) const {
  const std::lock_guard lock(mutex_);
  return tenants_.Find(tenant);
}

std::vector<TenantUse> HostStore::UseOfAll() const {
  const std::lock_guard lock(mutex_);
  return tenants_.All();
}

bool HostStore::AllFree(int64_t first, int64_t end) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return !used_.AnyTaken(first, end);
}

int64_t HostStore::num_free() const {
  const std::lock_guard lock(mutex_);
  return FreeLocked();
}

int64_t HostStore::num_reserved() const {
  const std::lock_guard lock(mutex_);
  return num_reserved_;
}

int64_t HostStore::num_used() const {
  const std::lock_guard lock(mutex_);
  return used_.num_taken();
}

uint64_t HostStore::bytes_used() const {
  const std::lock_guard lock(mutex_);
  return static_cast<uint64_t>(used_.num_taken() + num_reserved_) * block_bytes_;
}

absl::Status HostStore::CheckInvariants() const {
  const std::lock_guard lock(mutex_);
  if (used_.CountTaken() != used_.num_taken()) {
    return InternalError("host store: ", used_.CountTaken(), " bits are set, counted as ",
                         used_.num_taken());
  }
  if (num_reserved_ < 0 || FreeLocked() < 0) {
    return InternalError("host store: ", num_reserved_, " reserved and ", used_.num_taken(),
                         " used of ", num_blocks_, " blocks");
  }
  std::vector<int64_t> used_by(tenants_.num_slots());
  int64_t extra = 0;
  for (int64_t i = 0; i < num_blocks_; ++i) {
    const BlockId block = static_cast<BlockId>(i);
    const int32_t references = std::atomic_ref<int32_t>(State(block).references).load();
    if (used_.IsTaken(i) ? references < 1 : references != 0) {
      return InternalError("host store: block ", i, " is ", used_.IsTaken(i) ? "used" : "free",
                           " with ", references, " references");
    }
    extra += std::max(references - 1, 0);
    if (used_.IsTaken(i)) ++used_by[static_cast<size_t>(State(block).tenant)];
  }
  if (extra != extra_references_) {
    return InternalError("host store: ", extra,
                         " references beyond one for each block, counted as ",
                         extra_references_.load());
  }
  return tenants_.CheckInvariants(used_by, num_reserved_);
}

}  // namespace vattn
