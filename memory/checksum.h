// XXH3: finds accidents (torn writes, bit rot, a wrong file), not forgers.
#ifndef VATTN_MEMORY_CHECKSUM_H_
#define VATTN_MEMORY_CHECKSUM_H_

#include <compare>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace vattn {

// 64 bits.
uint64_t ChecksumOf(std::span<const std::byte> bytes);

// 128 bits, for finding equal bytes; what they find is to be compared.
struct Digest {
  uint64_t low = 0, high = 0;
  auto operator<=>(const Digest&) const = default;
};

// Digest of `bytes` that follow whatever `before` is the digest of.
Digest DigestOf(std::span<const std::byte> bytes, const Digest& before = {});

// ChecksumOf bytes that come in pieces.
class Checksum {
 public:
  Checksum();
  ~Checksum();
  Checksum(const Checksum&) = delete;
  Checksum& operator=(const Checksum&) = delete;

  void Add(std::span<const std::byte> bytes);
  uint64_t value() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace vattn

#endif  // VATTN_MEMORY_CHECKSUM_H_
