// Which file, or what else has a name, holds which prefix: bookkeeping, without files.
#ifndef VATTN_RUNTIME_PREFIX_LOOKUP_H_
#define VATTN_RUNTIME_PREFIX_LOOKUP_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "memory/checksum.h"

namespace vattn {

// One thread at a time.
class PrefixIndex {
 public:
  // chain: digests of the pieces (ChainOf) of a prefix of `tokens` tokens; empty for a file that
  // only takes room. used: the greater, the later it goes. A name that is there is replaced.
  void Add(const std::string& name, const std::vector<Digest>& chain, int64_t tokens,
           uint64_t bytes, uint64_t used);
  // Bytes of the file; 0 if there is none.
  uint64_t Remove(const std::string& name);
  bool Has(const std::string& name) const { return files_.count(name) > 0; }
  // Marks a file as the last one used.
  void Use(const std::string& name);

  // Files that may begin with pieces of `chain`: those that share most of them first, of those the
  // longest.
  std::vector<std::string> Find(const std::vector<Digest>& chain) const;
  // Pieces that the first of those may share.
  int64_t Pieces(const std::vector<Digest>& chain) const;
  // The file unused for longest; empty without files.
  std::string Oldest() const;
  // As Oldest, of those that `wanted(name)` is true for.
  template <class Wanted>
  std::string OldestWhere(Wanted&& wanted) const {
    for (const auto& [use, name] : by_use_) {
      if (wanted(name)) return name;
    }
    return "";
  }
  std::vector<std::string> Names() const;

  int64_t size() const { return static_cast<int64_t>(files_.size()); }
  uint64_t bytes() const { return bytes_; }
  // Greater than that of any file.
  uint64_t next_use() const { return next_use_; }
  // INTERNAL with the first contradiction found.
  absl::Status CheckInvariants() const;

 private:
  struct File {
    std::vector<Digest> chain;
    int64_t tokens;
    uint64_t bytes, used;
  };

  std::map<std::string, File> files_;
  std::multimap<Digest, std::string> by_digest_;  // a name for each digest of its chain
  std::map<uint64_t, std::string> by_use_;
  uint64_t bytes_ = 0, next_use_ = 1;
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_PREFIX_LOOKUP_H_
