// Prefixes kept in the host pool: shared blocks, found by digests, given back when room is wanted.
#ifndef VATTN_RUNTIME_PREFIX_MEMORY_H_
#define VATTN_RUNTIME_PREFIX_MEMORY_H_

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "runtime/layer.h"
#include "runtime/prefix/lookup.h"
#include "runtime/prefix/prefix.h"
#include "runtime/stats.h"

namespace vattn {

// No kept prefix begins another one of the same salt: the longer one serves for both.
//
// Thread-safe. Asks nothing of the pool, so that whoever wants room there may evict.
class KeptPrefixes {
 public:
  KeptPrefixes(HostStore& store, Counters& counters) : store_(store), counters_(counters) {}

  // True if a kept prefix begins with this one, which then counts as used.
  bool Covers(const Prefix& prefix);
  // layers hold as many tokens as the prefix has; tenant: whose room it takes.
  void Keep(Prefix prefix, SharedLayers layers, OpenTenant tenant);
  // Tokens that the best kept prefix has in common with this one, 0 if fewer than kPrefixTokens;
  // *layers, unless NULL, are those tokens, and the prefix counts as used.
  int64_t Begin(const Prefix& prefix, SharedLayers* layers);
  // How many of a salt went.
  int64_t Forget(const std::string& salt);

  // Lets go of one prefix that gives a block back to the pool: the tenant's that was unused for
  // longest, else, unless the tenant's own limit is what keeps it (for_quota), anyone's. False if
  // there is none.
  bool Evict(TenantSlot tenant, bool for_quota);

  int64_t size() const;
  uint64_t table_bytes() const;

 private:
  struct Kept {
    Prefix prefix;
    OpenTenant tenant;
    SharedLayers layers;
    uint64_t table_bytes;
  };
  using KeptMap = std::map<std::string, Kept>;

  // The one that has most in common with a prefix, and how much; end() if fewer than kPrefixTokens.
  KeptMap::const_iterator FindLocked(const Prefix& prefix, int64_t* shared) const;
  KeptMap::node_type RemoveLocked(const std::string& name);
  // Blocks that kept prefixes hold and nobody else, sorted.
  std::vector<int32_t> OnlyKeptLocked() const;
  // Whom Evict means; "" if nobody. Blocks are given back that one prefix alone holds or, with
  // only_kept, those listed, which may take letting go of several.
  std::string ToEvictLocked(TenantSlot tenant, bool for_quota,
                            const std::vector<int32_t>* only_kept) const;

  HostStore& store_;
  Counters& counters_;
  mutable std::mutex mutex_;  // guards what follows
  PrefixIndex index_;
  KeptMap kept_;
  uint64_t next_name_ = 0, table_bytes_ = 0;
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_PREFIX_MEMORY_H_
