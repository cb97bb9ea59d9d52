// Index codes of whole tiles of tokens (METHOD.md, "Index").
#ifndef VATTN_KERNELS_CPU_ENCODE_H_
#define VATTN_KERNELS_CPU_ENCODE_H_

#include "kernels/params.h"

namespace vattn::cpu {

class Workers;

// Codes tokens [begin, end) of EncodeParams. x_j is a chain of fused multiply-adds over the key's
// elements in order, so that every backend gets the same bits.
void Encode(const EncodeParams& params, Workers* workers);

// The codes of 16 tokens with these rows, as a tile has them: words [words][16][4]. value_codes
// [16][value_code_bytes]: theirs, or null for none.
void EncodeRows(const Storage& storage, const IndexTables& index,
                const uint8_t* const (&rows)[kTileTokens], uint8_t* tile, uint8_t* value_codes);

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

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_ENCODE_H_
