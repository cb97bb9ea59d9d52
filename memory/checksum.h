// XXH3, 64 bits: finds accidents (torn writes, bit rot, a wrong file), not forgers.
#ifndef VATTN_MEMORY_CHECKSUM_H_
#define VATTN_MEMORY_CHECKSUM_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace vattn {

uint64_t ChecksumOf(std::span<const std::byte> bytes);

// The same number over bytes that come in pieces.
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
