// What the kinds of index share: each codes tiles of keys, prepares queries, and scores blocks.
#ifndef VATTN_KERNELS_CPU_INDEX_H_
#define VATTN_KERNELS_CPU_INDEX_H_

#include "kernels/params.h"

namespace vattn::cpu {

// Tokens [begin, end) of a sequence's block, both multiples of 16. The codes of block number
// `soon`, if not negative, are wanted next.
struct BlockPart {
  int64_t block = 0;
  int begin = 0, end = 0;
  int64_t soon = -1;
};

struct IndexFunctions {
  // Codes of one tile of centred keys [16][dim_k]. Null: no codes.
  void (*encode)(const Storage&, const IndexTables&, const float* keys, uint8_t* tile);
  // scratch.query to scratch.packed and scratch.prepared. Null: queries are used as they are.
  void (*prepare)(const Storage&, Group&);
  // Writes the scores of the part to scores [G][256], in nats, and leaves the others alone.
  void (*score)(const Storage&, const Group&, const BlockPart&, float* scores);
};
const IndexFunctions& FunctionsOf(IndexKind kind);

// kBalanced, kSign, kHadamard2: linear maps to a few bits a dimension. Their encode is in encode.h.
void PackQueries(const Storage& storage, Group& group);
void ScoreLevels(const Storage& storage, const Group& group, const BlockPart& part, float* scores);

// kPage and kPooled: one score for the 16 tokens of a tile.
void EncodeBounds(const Storage& storage, const IndexTables& index, const float* keys,
                  uint8_t* tile);
void EncodeMeans(const Storage& storage, const IndexTables& index, const float* keys,
                 uint8_t* tile);
void PreparePages(const Storage& storage, Group& group);
void ScorePages(const Storage& storage, const Group& group, const BlockPart& part, float* scores);

// kClusters: a token has the score of its centroid.
void EncodeClusters(const Storage& storage, const IndexTables& index, const float* keys,
                    uint8_t* tile);
void PrepareClusters(const Storage& storage, Group& group);
void ScoreClusters(const Storage& storage, const Group& group, const BlockPart& part,
                   float* scores);

// |q| of a scaled query.
float QueryNorm(const Storage& storage, const Group& group, int head);

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_INDEX_H_
