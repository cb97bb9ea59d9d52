// Shapes of rows, codes and blocks: the one place that says which byte means what.
//
//   block  = 256 tokens of one (sequence, layer, KV head):
//            | rows [256][row_bytes] | codes [16 tiles][words][16 tokens][4] | value codes [256][bytes] |
//   row    = | K [dim_k] | V [dim_v] | padding to 128 bytes |; with shared_kv V is the head of K.
//   codes  = tiles of 16 tokens, so that a 64-byte load holds one code word of each token. A word
//            holds dimensions in runs of 4, one a byte: 8-bit words 1 run (7 bits used), 4-bit words
//            2 runs (low nibbles first), 2-bit words 4 runs and 1-bit words 8 (lowest bits first).
//            Kinds without levels: kPage, tiles of | largest [dim_k] | least [dim_k] | in bf16;
//            kPooled, | mean [dim_k] | in bf16; kClusters, the 16-bit centroid of each token.
//   value codes = per token, 16 bytes for each chunk of 64 (2 bits) or 32 (4 bits) elements; byte l
//            of a chunk holds elements l, 16 + l, 32 + l, ... from its lowest bits up.
#ifndef VATTN_KERNELS_GEOMETRY_H_
#define VATTN_KERNELS_GEOMETRY_H_

#include <cstdint>

#include "kernels/host_device.h"

namespace vattn {

enum class DType : int32_t { kF32 = 0, kF16 = 1, kBF16 = 2 };

constexpr int kBlockTokens = 256;
constexpr int kTileTokens = 16;
constexpr int kCodeTokens = 64;  // tokens leave the window for the index in runs of this length
constexpr int kMaxCodeDims = 256;
// Largest head_dim of keys and of values: the arrays of kernels hold no more, and options that ask
// for more are refused (runtime/options.cc).
constexpr int kMaxDim = 1024;

// Where predicted scores come from (METHOD.md, "Index").
enum class IndexKind : int32_t {
  kBalanced = 0,
  kExact = 1,      // keys; no codes
  kSign = 2,       // signs of a linear map, by Hamming distance
  kHadamard2 = 3,  // 2-bit levels after a Hadamard rotation
  kPage = 4,       // least and largest of each dimension over a tile
  kPooled = 5,     // mean key of a tile
  kClusters = 6,   // nearest of the index's centroids
  kExternal = 7    // the caller; no codes
};

// The number of blocks that hold `tokens` tokens.
VATTN_HD constexpr int64_t BlocksFor(int64_t tokens) {
  return (tokens + kBlockTokens - 1) / kBlockTokens;
}

constexpr int ElementBytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

struct RowLayout {
  DType dtype = DType::kBF16;
  int32_t dim_k = 0;
  int32_t dim_v = 0;
  int64_t v_offset = 0;   // bytes from the start of the row
  int32_t row_bytes = 0;  // multiple of 128
  bool shared_kv = false;
};

inline RowLayout MakeRowLayout(DType dtype, int dim_k, int dim_v, bool shared_kv) {
  const int used = (shared_kv ? dim_k : dim_k + dim_v) * ElementBytes(dtype);
  return {.dtype = dtype,
          .dim_k = dim_k,
          .dim_v = dim_v,
          .v_offset = shared_kv ? 0 : dim_k * ElementBytes(dtype),
          .row_bytes = (used + 127) / 128 * 128,
          .shared_kv = shared_kv};
}

// How many dimensions are kept at each precision, in the order of falling score variance; or the
// bytes that a kind without levels keeps.
struct CodeLayout {
  int32_t dims8 = 0;  // multiple of 4; 7 bits used, so that pair sums stay within int16
  int32_t dims4 = 0;  // multiple of 8
  int32_t dims2 = 0;  // multiple of 16
  int32_t dims1 = 0;  // multiple of 32
  IndexKind kind = IndexKind::kBalanced;
  int32_t other_bytes = 0;  // per token, of kinds without levels
  int32_t centroids = 0;    // of kClusters

  VATTN_HD int dims() const { return dims8 + dims4 + dims2 + dims1; }
  VATTN_HD int words() const { return dims8 / 4 + dims4 / 8 + dims2 / 16 + dims1 / 32; }
  int bytes() const { return 4 * words() + other_bytes; }
  VATTN_HD int runs() const { return dims() / 4; }             // runs of 4 dimensions
  int padded_dims() const { return (dims() + 15) / 16 * 16; }  // row length of IndexTables::encode
  // Of code dimension j in levels, not signs: half the number of levels, and the coordinate that level
  // 0 stands for, in units of the level's width.
  VATTN_HD float half(int j) const { return j < dims8 ? 64.f : j < dims8 + dims4 ? 8.f : 2.f; }
  VATTN_HD float middle(int j) const { return .5f - half(j); }
  // kBalanced: row length of IndexTables::rest, which has the directions of a key without a code.
  int padded_rest(int dim) const { return (dim - dims() + 15) / 16 * 16; }
};

// The layout for a budget of `bytes` a token and keys of `dim` elements. Of all layouts that fit it is
// the one with the least expected score noise, if the score variance falls over the dimensions as
// exp(-j / (0.18 dim)), which recorded attention lies near, and each precision adds the quantisation
// noise of a Gaussian.
CodeLayout MakeCodeLayout(int bytes, int dim);

// The layout of any kind. With kBalanced and kSign `bytes` is the size of a token's code. With
// kClusters it is a token's share in the fp32 centroids when a sequence has 16,384 tokens. The sizes
// of the other kinds follow from dim.
CodeLayout MakeIndexLayout(IndexKind kind, int bytes, int dim);

// Bytes of a token's value code: dim elements of 2 or 4 bits, in whole chunks. 0 bits: no code.
constexpr int ValueCodeBytes(int bits, int dim) {
  return bits == 0 ? 0 : (dim * bits + 127) / 128 * 16;
}

// Blocks of one KV head in the host pool, or of all KV heads in a pool of an engine's own.
struct BlockLayout {
  // Bytes from the start of a block to its codes, in the host pool.
  int64_t codes = 0;
  int64_t value_codes = 0;
  // Bytes from a block to the next one, from a token's row to the next one's, and from a KV head's
  // row to the next one's of the same token (0: each KV head has blocks of its own).
  int64_t bytes = 0;
  int64_t token_bytes = 0;
  int64_t head_bytes = 0;
  int32_t tokens = kBlockTokens;  // multiple of 16
};

inline BlockLayout MakeBlockLayout(const RowLayout& row, int code_bytes, int value_code_bytes) {
  BlockLayout b;
  b.codes = int64_t{kBlockTokens} * row.row_bytes;
  b.value_codes = b.codes + int64_t{kBlockTokens} * code_bytes;
  b.bytes = b.value_codes + int64_t{kBlockTokens} * value_code_bytes;
  b.token_bytes = row.row_bytes;
  return b;
}

}  // namespace vattn

#endif  // VATTN_KERNELS_GEOMETRY_H_
