// Value codes of tokens (METHOD.md, "Value codes").
#ifndef VATTN_KERNELS_CPU_VALUES_H_
#define VATTN_KERNELS_CPU_VALUES_H_

#include "kernels/params.h"

namespace vattn::cpu {

// Writes the value codes of values [count][dim_v] to out [count][value_code_bytes].
void EncodeValues(const Storage& storage, const IndexTables& index, const float* values, int count,
                  uint8_t* out);

// The value code of a token.
inline const uint8_t* ValueCodeOf(const Storage& s, const Group& group, uint32_t token) {
  return reinterpret_cast<const uint8_t*>(s.base +
                                          group.blocks[token / kBlockTokens] * s.block.bytes) +
         s.block.value_codes + int64_t{token % kBlockTokens} * s.value_code_bytes;
}

// out[i] = value codes of `count` tokens decoded to fp32, [count][dim_v]; codes[i] points to the
// token's value_code_bytes.
void DecodeValues(const Storage& storage, const IndexTables& index, const uint8_t* const* codes,
                  int count, float* out);

// sum[g] += factor_g * sum_i weights[g * ld + i] * v^_i over `count` consecutive tokens of a block. A
// head's sum takes sum_ld floats, weights are fp16, and factors [heads][2] holds factor_g and
// sum_i weights_i.
void AddValueCodes(const Storage& storage, const IndexTables& index, const uint8_t* codes,
                   const uint16_t* weights, int64_t ld, int count, int heads, const float* factors,
                   float* sum, int64_t sum_ld);

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_VALUES_H_
