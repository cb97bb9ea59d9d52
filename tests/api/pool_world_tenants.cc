// The operations of PoolWorld on reservations and kept prefixes, and what tenants hold.
#include <algorithm>
#include <stdexcept>
#include <utility>

#include "tests/api/pool_world.h"

namespace vattn::test {
namespace {

void Expect(bool right, const std::string& what) {
  if (!right) throw std::runtime_error(what);
}

}  // namespace

void PoolWorld::Reserve(Known& one) {
  const int64_t tokens = Draw(3) == 0 ? 0 : Draw(options_.most_tokens / 4);
  if (!Try([&] { one.sequence->Reserve(tokens); })) return;
  one.reserve = tokens;
  ++tally_.reserved;
}

// The numbers that the first layer's rows come from serve as token ids: no two tokens have the
// same.
OwnedPrefix PoolWorld::ArgumentOf(const std::string& salt, const Content& content) {
  return OwnedPrefix(salt, std::vector<int32_t>(content.seeds[0].begin(), content.seeds[0].end()));
}

void PoolWorld::Keep(Known& one) {
  const int64_t count =
      one.content.tokens() - Draw(std::min<int64_t>(one.content.tokens(), 400) + 1);
  if (count < 1) return;
  Prefix kept{Draw(2) == 0 ? "one" : "two", one.content};
  for (auto& seeds : kept.content.seeds) seeds.resize(static_cast<size_t>(count));
  OwnedPrefix argument = ArgumentOf(kept.salt, kept.content);
  argument.tier = VATTN_TIER_MEMORY;
  if (!Try([&] { one.sequence->SavePrefix(argument); })) return;
  ++tally_.kept;
  if (count < 256) return;
  int64_t begins = 0;
  Sequence::Begin(runtime_, argument, &begins);  // asks for no room
  Expect(begins == count, "of " + std::to_string(count) + " tokens kept a sequence begins with " +
                              std::to_string(begins));
  if (prefixes_.size() < kMostPrefixes) {
    prefixes_.push_back(std::move(kept));
  } else {
    prefixes_[Draw(kMostPrefixes)] = std::move(kept);
  }
}

void PoolWorld::Begin() {
  if (prefixes_.empty() || known_.size() >= static_cast<size_t>(options_.most_sequences)) return;
  const Prefix& prefix = prefixes_[Draw(static_cast<int64_t>(prefixes_.size()))];
  const vattn_sequence_options o = NewOptions();
  Content asked = prefix.content;
  const int64_t same = Draw(2) == 0 ? asked.tokens() : Draw(asked.tokens());
  if (same < asked.tokens()) asked.seeds[0][static_cast<size_t>(same)] = UINT32_MAX;  // no token's
  OwnedPrefix argument = ArgumentOf(prefix.salt, asked);
  argument.tier = VATTN_TIER_MEMORY;
  argument.tenant = o.tenant;
  argument.reserve_tokens = o.reserve_tokens;
  int64_t begins = 0;
  std::unique_ptr<Sequence> made;
  const auto begin = [&] {
    try {
      made = std::make_unique<Sequence>(Sequence::Begin(runtime_, argument, &begins));
    } catch (const Error& error) {
      if (error.code() != VATTN_NOT_FOUND) throw;
    }
  };
  if (!Try(begin) || made == nullptr) return;
  Expect(begins >= 256 && begins <= same, "a sequence begins with " + std::to_string(begins) +
                                              " tokens, of which " + std::to_string(same) +
                                              " were kept");
  for (auto& seeds : asked.seeds) seeds.resize(static_cast<size_t>(begins));
  Known& one = Enter(std::move(made), std::move(asked));
  one.tenant = o.tenant;
  one.reserve = o.reserve_tokens;
  ++tally_.begun;
}

void PoolWorld::Forget() {
  const std::string salt = prefixes_.back().salt;
  tally_.forgotten += runtime_.ForgetPrefixes(salt);
  std::erase_if(prefixes_, [&](const Prefix& prefix) { return prefix.salt == salt; });
}

void PoolWorld::CheckTenants() const {
  const vattn_stats stats = runtime_.Stats();
  uint64_t used = 0, reserved = 0, sequences = 0;
  for (uint64_t tenant = 0; tenant < kTenants; ++tenant) {
    const vattn_tenant_use use = runtime_.TenantUse(tenant);
    Expect(use.host_bytes_limit == 0 || use.host_bytes_used <= use.host_bytes_limit,
           "tenant " + std::to_string(tenant) + " is over its quota");
    used += use.host_bytes_used;
    reserved += use.host_bytes_reserved;
    sequences += use.sequences;
  }
  Expect(used == stats.host_bytes_used && reserved == stats.host_bytes_reserved,
         "tenants hold " + std::to_string(used) + " bytes, the pool knows of " +
             std::to_string(stats.host_bytes_used));
  Expect(sequences == stats.sequences, "sequences of tenants are miscounted");
}

}  // namespace vattn::test
