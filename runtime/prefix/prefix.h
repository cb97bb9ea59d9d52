// What a stored prefix is found by.
#ifndef VATTN_RUNTIME_PREFIX_PREFIX_H_
#define VATTN_RUNTIME_PREFIX_PREFIX_H_

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "memory/checksum.h"
#include "memory/status.h"

namespace vattn {

// Tokens of a prompt under a salt: whoever has another salt never meets them.
struct Prefix {
  std::string salt;  // 1 byte or more, any
  std::vector<int32_t> tokens;
};

// Tokens of a piece: prefixes are found by digests of whole pieces.
inline constexpr int64_t kPrefixTokens = 256;

// Digests that find a prefix: [i] that of the salt and the first (i + 1) * kPrefixTokens tokens.
inline std::vector<Digest> ChainOf(const Prefix& prefix) {
  std::vector<Digest> chain;
  Digest last = DigestOf(std::as_bytes(std::span(prefix.salt)));
  const std::span<const int32_t> tokens(prefix.tokens);
  for (size_t end = kPrefixTokens; end <= tokens.size(); end += kPrefixTokens) {
    last = DigestOf(std::as_bytes(tokens.subspan(end - kPrefixTokens, kPrefixTokens)), last);
    chain.push_back(last);
  }
  return chain;
}

// Tokens that both begin with; 0 if the salts differ.
inline int64_t SharedTokens(const Prefix& a, const Prefix& b) {
  if (a.salt != b.salt) return 0;
  return std::mismatch(a.tokens.begin(), a.tokens.end(), b.tokens.begin(), b.tokens.end()).first -
         a.tokens.begin();
}

inline absl::Status NoSuchPrefixError(const Prefix& prefix) {
  return NotFoundError("no stored prefix has ", kPrefixTokens,
                       " tokens or more in common with these ", prefix.tokens.size(),
                       " under this salt");
}

}  // namespace vattn

#endif  // VATTN_RUNTIME_PREFIX_PREFIX_H_
