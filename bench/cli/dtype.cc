#include "bench/cli/dtype.h"

#include <bit>
#include <cstring>

namespace vattn::bench {
namespace {

float FromHalfBits(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 0x1f;
  const uint32_t fraction = half & 0x3ff;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
  }
  const uint32_t wide = exponent == 31 ? 0xff : exponent + 112;
  return std::bit_cast<float>(sign | wide << 23 | fraction << 13);
}

uint16_t ToHalfBits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;   // NaN
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
  if (magnitude < 0x38800000) {                       // below 2^-14: subnormal
    // Adding .5 puts the last kept bit at the last bit of the sum, and the addition rounds.
    const float sum = std::bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(sum) - 0x3f000000);
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded - 0x38000000) >> 13);
}

uint16_t ToBfloatBits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

size_t ElementBytes(int32_t dtype) { return dtype == VATTN_F32 ? 4 : 2; }

void ToFloat(int32_t dtype, const void* from, size_t count, float* to) {
  if (dtype == VATTN_F32) {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  const auto* bits = static_cast<const uint16_t*>(from);
  if (dtype == VATTN_BF16) {
    for (size_t i = 0; i < count; ++i) {
      to[i] = std::bit_cast<float>(static_cast<uint32_t>(bits[i]) << 16);
    }
  } else {
    for (size_t i = 0; i < count; ++i) to[i] = FromHalfBits(bits[i]);
  }
}

void FromFloat(int32_t dtype, const float* from, size_t count, void* to) {
  if (dtype == VATTN_F32) {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  auto* bits = static_cast<uint16_t*>(to);
  if (dtype == VATTN_BF16) {
    for (size_t i = 0; i < count; ++i) bits[i] = ToBfloatBits(from[i]);
  } else {
    for (size_t i = 0; i < count; ++i) bits[i] = ToHalfBits(from[i]);
  }
}

}  // namespace vattn::bench
