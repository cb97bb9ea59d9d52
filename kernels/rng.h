// Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011), the same bits on every
// backend. A number is a pure function of (seed, sequence, layer, KV head, use, token, epoch).
#ifndef VATTN_KERNELS_RNG_H_
#define VATTN_KERNELS_RNG_H_

#include <cstdint>

#include "kernels/host_device.h"

namespace vattn {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

struct Philox4 {
  uint32_t word[4];
};

VATTN_HD inline Philox4 Philox(Philox4 c, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{kPhiloxM0} * c.word[0];
    const uint64_t p1 = uint64_t{kPhiloxM1} * c.word[2];
    c = {{static_cast<uint32_t>(p1 >> 32) ^ c.word[1] ^ key0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.word[3] ^ key1, static_cast<uint32_t>(p0)}};
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
  return c;
}

// What a number is drawn for. It is part of the counter, so that two uses never share a number.
enum class RandomUse : uint32_t { kSelect = 0, kRedraw = 1 };  // kRedraw + n: the n-th in a step

// Where the numbers of one (sequence, layer, KV head) come from.
struct RandomKey {
  uint32_t key0 = 0, key1 = 0;  // from seed and sequence
  uint32_t stream = 0;          // layer and KV head
};

VATTN_HD inline RandomKey MakeRandomKey(uint64_t seed, uint64_t sequence, uint32_t layer,
                                        uint32_t kv_head) {
  const Philox4 mixed = Philox({{static_cast<uint32_t>(sequence),
                                 static_cast<uint32_t>(sequence >> 32), 0x76617474u, 0x6e000000u}},
                               static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return {mixed.word[0], mixed.word[1], layer << 16 | kv_head};
}

// A number in (0, 1): 23 bits and a half. The sum is exact, so that no number is rounded to 1.
VATTN_HD inline float UnitFloat(uint32_t bits) {
  return (static_cast<float>(bits >> 9) + .5f) * 0x1p-23f;
}

// Four tokens, 16 apart, share a Philox call, so that 16 lanes of counters give the numbers of 64
// tokens in order. Token t takes word (t >> 4) & 3 of lane t & 15 in run t >> 6.
VATTN_HD inline uint32_t TokenCounter(uint32_t token) { return (token >> 6) * 16 + (token & 15); }

// The renewal number of a counter at a step. It rises by one every `refresh` steps, each counter at
// another phase, so that one number in `refresh` is renewed in each step.
struct Epochs {
  uint32_t refresh, whole, rest;

  VATTN_HD Epochs(uint64_t step, uint32_t every)
      : refresh(every),
        whole(static_cast<uint32_t>(step / every)),
        rest(static_cast<uint32_t>(step % every)) {}
  VATTN_HD uint32_t Of(uint32_t counter) const {
    const uint32_t phase =
        static_cast<uint32_t>((uint64_t{counter * 0x9E3779B1u} * refresh) >> 32);  // [0, refresh)
    return whole + (uint64_t{phase} + rest >= refresh ? 1 : 0);
  }
};
VATTN_HD inline uint32_t Epoch(uint32_t counter, uint64_t step, uint32_t refresh) {
  return Epochs(step, refresh).Of(counter);
}

// Which random numbers a draw takes: the permanent ones, of which one in `refresh` is renewed in each
// step, or those of the step's n-th redraw, n from 1, which are new in each step.
struct Randomness {
  uint32_t refresh = 1;
  uint32_t redraw = 0;
  uint32_t rank = 0;  // of those that hold slices of a context, whose numbers are independent

  VATTN_HD uint32_t renewal() const { return redraw > 0 ? 1 : refresh; }
  VATTN_HD uint32_t use() const {
    const RandomUse first = redraw > 0 ? RandomUse::kRedraw : RandomUse::kSelect;
    return (rank << 16) + static_cast<uint32_t>(first) + (redraw > 0 ? redraw - 1 : 0);
  }
};

// The random number u of a token (METHOD.md, "Random numbers").
VATTN_HD inline float TokenUniform(const RandomKey& key, uint32_t token, const Epochs& epochs,
                                   uint32_t use) {
  const uint32_t counter = TokenCounter(token);
  const Philox4 r = Philox({{counter, epochs.Of(counter), key.stream, use}}, key.key0, key.key1);
  return UnitFloat(r.word[(token >> 4) & 3]);
}
VATTN_HD inline float TokenUniform(const RandomKey& key, uint32_t token, uint64_t step,
                                   const Randomness& randomness) {
  return TokenUniform(key, token, Epochs(step, randomness.renewal()), randomness.use());
}
// The permanent one.
VATTN_HD inline float TokenUniform(const RandomKey& key, uint32_t token, uint64_t step,
                                   uint32_t refresh) {
  return TokenUniform(key, token, step, Randomness{refresh, 0});
}

}  // namespace vattn

#endif  // VATTN_KERNELS_RNG_H_
