// Index codes and value codes of whole tiles of tokens (METHOD.md, "Index" and "Value codes").
#ifndef VATTN_KERNELS_CPU_ENCODE_H_
#define VATTN_KERNELS_CPU_ENCODE_H_

#include "kernels/params.h"

namespace vattn::cpu {

class Workers;

// Codes tokens [begin, end) of EncodeParams. x_j is a chain of fused multiply-adds over the key's
// elements in order, so that every backend gets the same bits.
void Encode(const EncodeParams& params, Workers* workers);

// Codes of one tile of centred keys [16][dim_k], of a layout with levels (kernels/geometry.h).
void EncodeLevels(const Storage& storage, const IndexTables& index, const float* keys,
                  uint8_t* tile);
// The same, but a key that its code misrepresents becomes an outlier (IndexTables).
void EncodeBalanced(const Storage& storage, const IndexTables& index, const float* keys,
                    uint8_t* tile);

// What EncodeBalanced compares with the limits of IndexTables.
struct CodeErrors {
  float residual2 = 0, noise2 = 0;
};
// True if a key with these errors is no outlier. False for NaN.
bool CodeTells(const IndexTables& index, const CodeErrors& errors);
// The errors of centred keys [count][dim_k].
void FindCodeErrors(const Storage& storage, const IndexTables& index, const float* keys,
                    int64_t count, CodeErrors* out);

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

#endif  // VATTN_KERNELS_CPU_ENCODE_H_
