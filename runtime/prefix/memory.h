// Prefixes in the host pool: shared blocks, found by digests, given back when room is wanted.
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

// No prefix here begins another one of the same salt: the longer one serves for both.
//
// Thread-safe. Asks nothing of the pool, so that whoever wants room there may evict.
class MemoryPrefixes {
 public:
  MemoryPrefixes(HostStore& store, Counters& counters) : store_(store), counters_(counters) {}

  // True if one of them begins with this one, which then counts as used.
  bool Covers(const Prefix& prefix);
  // layers hold as many tokens as the prefix has; tenant: whose room it takes.
  void Save(Prefix prefix, SharedLayers layers, OpenTenant tenant);
  // Tokens that the best of them has in common with this one, 0 if fewer than kPrefixTokens;
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
  struct Saved {
    Prefix prefix;
    OpenTenant tenant;
    SharedLayers layers;
    uint64_t table_bytes;
  };
  using SavedMap = std::map<std::string, Saved>;

  // The one that has most in common with a prefix, and how much; end() if fewer than kPrefixTokens.
  SavedMap::const_iterator FindLocked(const Prefix& prefix, int64_t* shared) const;
  SavedMap::node_type RemoveLocked(const std::string& name);
  // Blocks that these prefixes hold and nobody else, sorted.
  std::vector<int32_t> OnlyHereLocked() const;
  // Whom Evict means; "" if nobody. Blocks are given back that one prefix alone holds or, with
  // only_here, those listed, which may take letting go of several.
  std::string ToEvictLocked(TenantSlot tenant, bool for_quota,
                            const std::vector<int32_t>* only_here) const;

  HostStore& store_;
  Counters& counters_;
  mutable std::mutex mutex_;  // guards what follows
  PrefixIndex index_;
  SavedMap prefixes_;
  uint64_t next_name_ = 0, table_bytes_ = 0;
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_PREFIX_MEMORY_H_
