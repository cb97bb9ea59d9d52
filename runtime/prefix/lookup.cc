#include "runtime/prefix/lookup.h"

#include <algorithm>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "memory/status.h"

namespace vattn {

void PrefixIndex::Add(const std::string& name, const std::vector<Digest>& chain, int64_t tokens,
                      uint64_t bytes, uint64_t used) {
  Remove(name);
  while (by_use_.count(used) > 0) ++used;
  next_use_ = std::max(next_use_, used + 1);
  files_.emplace(name, File{chain, tokens, bytes, used});
  bytes_ += bytes;
  absl::Cleanup undo = [&] { Remove(name); };  // when memory runs out on the way
  by_use_[used] = name;
  for (const Digest& digest : chain) by_digest_.emplace(digest, name);
  std::move(undo).Cancel();
}

uint64_t PrefixIndex::Remove(const std::string& name) {
  const auto file = files_.find(name);
  if (file == files_.end()) return 0;
  const uint64_t bytes = file->second.bytes;
  for (const Digest& digest : file->second.chain) {
    const auto [begin, end] = by_digest_.equal_range(digest);
    const auto entry =
        std::find_if(begin, end, [&](const auto& other) { return other.second == name; });
    if (entry != end) by_digest_.erase(entry);
  }
  by_use_.erase(file->second.used);
  files_.erase(file);
  bytes_ -= bytes;
  return bytes;
}

void PrefixIndex::Use(const std::string& name) {
  const auto file = files_.find(name);
  if (file == files_.end()) return;
  auto use = by_use_.extract(file->second.used);
  use.key() = file->second.used = next_use_++;
  by_use_.insert(std::move(use));
}

std::vector<std::string> PrefixIndex::Find(const std::vector<Digest>& chain) const {
  std::vector<std::string> names;
  for (size_t pieces = chain.size(); pieces > 0; --pieces) {
    const auto [begin, end] = by_digest_.equal_range(chain[pieces - 1]);
    const size_t first = names.size();
    for (auto entry = begin; entry != end; ++entry) {
      if (std::find(names.begin(), names.end(), entry->second) == names.end())
        names.push_back(entry->second);
    }
    std::stable_sort(
        names.begin() + static_cast<ptrdiff_t>(first), names.end(),
        [&](const auto& a, const auto& b) { return files_.at(a).tokens > files_.at(b).tokens; });
  }
  return names;
}

int64_t PrefixIndex::Pieces(const std::vector<Digest>& chain) const {
  size_t pieces = chain.size();
  while (pieces > 0 && by_digest_.count(chain[pieces - 1]) == 0) --pieces;
  return static_cast<int64_t>(pieces);
}

std::string PrefixIndex::Oldest() const { return by_use_.empty() ? "" : by_use_.begin()->second; }

std::vector<std::string> PrefixIndex::Names() const {
  std::vector<std::string> names;
  for (const auto& [name, file] : files_) names.push_back(name);
  return names;
}

absl::Status PrefixIndex::CheckInvariants() const {
  uint64_t bytes = 0;
  size_t digests = 0;
  for (const auto& [name, file] : files_) {
    bytes += file.bytes;
    digests += file.chain.size();
    const auto used = by_use_.find(file.used);
    if (used == by_use_.end() || used->second != name)
      return InternalError("prefix index: ", name, " has no use");
    if (file.used >= next_use_)
      return InternalError("prefix index: ", name, " was used in the future");
  }
  if (bytes != bytes_ || digests != by_digest_.size() || by_use_.size() != files_.size()) {
    return InternalError("prefix index: ", bytes, " bytes, ", digests, " digests and ",
                         files_.size(), " files are counted as ", bytes_, ", ", by_digest_.size(),
                         " and ", by_use_.size());
  }
  return absl::OkStatus();
}

}  // namespace vattn
