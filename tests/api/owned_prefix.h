// Arguments of the calls for stored prefixes.
#ifndef VATTN_TESTS_API_OWNED_PREFIX_H_
#define VATTN_TESTS_API_OWNED_PREFIX_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "api/vattn.hpp"

namespace vattn::test {

// A vattn_prefix with what it points to.
struct OwnedPrefix : vattn_prefix {
  OwnedPrefix(std::string of_salt, std::vector<int32_t> of_tokens)
      : vattn_prefix(Init<vattn_prefix>()),
        owned_salt(std::move(of_salt)),
        ids(std::move(of_tokens)) {
    salt = owned_salt.data();
    salt_bytes = owned_salt.size();
    tokens = ids.data();
    num_tokens = static_cast<int64_t>(ids.size());
  }
  OwnedPrefix(const OwnedPrefix&) = delete;
  OwnedPrefix& operator=(const OwnedPrefix&) = delete;

  const std::string owned_salt;
  const std::vector<int32_t> ids;
};

}  // namespace vattn::test

#endif  // VATTN_TESTS_API_OWNED_PREFIX_H_
