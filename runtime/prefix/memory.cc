#include "runtime/prefix/memory.h"

#include <algorithm>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"

namespace vattn {
namespace {

template <class F>
void ForEachBlock(const std::vector<Layer>& layers, F&& f) {
  for (const Layer& layer : layers) {
    for (const KvHead& kv_head : layer.kv_heads) {
      for (const int32_t block : kv_head.blocks) f(block);
    }
  }
}

uint64_t TableBytes(const Prefix& prefix, const std::vector<Layer>& layers) {
  uint64_t bytes = prefix.salt.size() + prefix.tokens.size() * sizeof(int32_t);
  for (const Layer& layer : layers) {
    for (const KvHead& kv_head : layer.kv_heads) {
      bytes += sizeof(KvHead) + kv_head.blocks.size() * sizeof(int32_t) +
               kv_head.states.size() * sizeof(HeadState);
      for (const SegmentTables& tables : kv_head.tables)
        bytes += static_cast<uint64_t>(tables.index->bytes());
    }
  }
  return bytes;
}

}  // namespace

MemoryPrefixes::SavedMap::const_iterator MemoryPrefixes::FindLocked(const Prefix& prefix,
                                                                    int64_t* shared) const {
  SavedMap::const_iterator best = prefixes_.end();
  *shared = 0;
  for (const std::string& name : index_.Find(ChainOf(prefix))) {
    const SavedMap::const_iterator saved = prefixes_.find(name);
    const int64_t tokens = SharedTokens(saved->second.prefix, prefix);  // a digest is no proof
    if (tokens < kPrefixTokens) {
      ++counters_.prefix_mismatches;
      continue;
    }
    // As many whole pieces or fewer follow
    if (tokens / kPrefixTokens < *shared / kPrefixTokens) break;
    if (tokens > *shared) {
      best = saved;
      *shared = tokens;
    }
  }
  return best;
}

bool MemoryPrefixes::Covers(const Prefix& prefix) {
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t shared;
  const SavedMap::const_iterator best = FindLocked(prefix, &shared);
  if (best == prefixes_.end() || shared < static_cast<int64_t>(prefix.tokens.size())) return false;
  index_.Use(best->first);
  return true;
}

void MemoryPrefixes::Save(Prefix prefix, SharedLayers layers, OpenTenant tenant) {
  if (static_cast<int64_t>(prefix.tokens.size()) < kPrefixTokens) return;  // none would find it
  std::vector<SavedMap::node_type> gone;  // give their blocks back without the lock
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<Digest> chain = ChainOf(prefix);
  const int64_t tokens = static_cast<int64_t>(prefix.tokens.size());
  const std::vector<std::string> like = index_.Find(chain);
  for (const std::string& name : like) {
    // Another thread may have saved as much meanwhile.
    if (SharedTokens(prefixes_.at(name).prefix, prefix) == tokens) return index_.Use(name);
  }
  gone.reserve(like.size());
  const std::string name = absl::StrCat("memory-", next_name_++);
  const uint64_t table_bytes = TableBytes(prefix, layers.layers());
  const auto [place, added] = prefixes_.emplace(
      name, Saved{std::move(prefix), std::move(tenant), std::move(layers), table_bytes});
  absl::Cleanup undo = [this, place = place] { prefixes_.erase(place); };  // when memory runs out
  index_.Add(name, chain, tokens, 0, index_.next_use());
  std::move(undo).Cancel();
  table_bytes_ += table_bytes;
  ++counters_.memory_prefixes_saved;
  for (const std::string& shorter : like) {
    const Prefix& other = prefixes_.at(shorter).prefix;
    if (SharedTokens(other, place->second.prefix) == static_cast<int64_t>(other.tokens.size())) {
      gone.push_back(RemoveLocked(shorter));
    }
  }
}

int64_t MemoryPrefixes::Begin(const Prefix& prefix, SharedLayers* layers) {
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t shared;
  const SavedMap::const_iterator best = FindLocked(prefix, &shared);
  if (best == prefixes_.end() || layers == nullptr) return shared;
  *layers = SharedLayers(store_, best->second.layers.layers(), shared);
  index_.Use(best->first);
  return shared;
}

MemoryPrefixes::SavedMap::node_type MemoryPrefixes::RemoveLocked(const std::string& name) {
  SavedMap::node_type saved = prefixes_.extract(name);
  table_bytes_ -= saved.mapped().table_bytes;
  index_.Remove(saved.key());
  return saved;
}

int64_t MemoryPrefixes::Forget(const std::string& salt) {
  std::vector<SavedMap::node_type> gone;
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<std::string> names = index_.Names();
  gone.reserve(names.size());
  for (const std::string& name : names) {
    if (prefixes_.at(name).prefix.salt == salt) gone.push_back(RemoveLocked(name));
  }
  return static_cast<int64_t>(gone.size());
}

std::vector<int32_t> MemoryPrefixes::OnlyHereLocked() const {
  std::vector<int32_t> all, only;
  for (const auto& [name, saved] : prefixes_) {
    ForEachBlock(saved.layers.layers(), [&](int32_t block) { all.push_back(block); });
  }
  std::sort(all.begin(), all.end());
  for (auto block = all.begin(); block != all.end();) {
    const auto end = std::upper_bound(block, all.end(), *block);
    if (store_.NumReferences(BlockId{*block}) == end - block) only.push_back(*block);
    block = end;
  }
  return only;
}

std::string MemoryPrefixes::ToEvictLocked(TenantSlot tenant, bool for_quota,
                                          const std::vector<int32_t>* only_here) const {
  const auto gives = [&](const Saved& saved) {
    bool any = false;
    ForEachBlock(saved.layers.layers(), [&](int32_t block) {
      if (any || (for_quota && store_.TenantOf(BlockId{block}) != tenant)) return;
      any = only_here == nullptr ? store_.IsUnique(BlockId{block})
                                 : std::binary_search(only_here->begin(), only_here->end(), block);
    });
    return any;
  };
  for (const bool own : {true, false}) {
    std::string name = index_.OldestWhere([&](const std::string& candidate) {
      const Saved& saved = prefixes_.at(candidate);
      return (saved.tenant.slot() == tenant) == own && gives(saved);
    });
    if (!name.empty()) return name;
  }
  return "";
}

bool MemoryPrefixes::Evict(TenantSlot tenant, bool for_quota) {
  SavedMap::node_type gone;
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string name = ToEvictLocked(tenant, for_quota, nullptr);
  if (name.empty() && prefixes_.size() > 1) {
    const std::vector<int32_t> only_here = OnlyHereLocked();
    name = ToEvictLocked(tenant, for_quota, &only_here);
  }
  if (name.empty()) return false;
  gone = RemoveLocked(name);
  ++counters_.memory_prefixes_evicted;
  return true;
}

int64_t MemoryPrefixes::size() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return index_.size();
}

uint64_t MemoryPrefixes::table_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return table_bytes_;
}

}  // namespace vattn
