// Scan of the index: predicted scores of every middle token for every query head of a group.
#ifndef VATTN_KERNELS_CPU_SCAN_H_
#define VATTN_KERNELS_CPU_SCAN_H_

#include "kernels/params.h"

namespace vattn::cpu {

class Workers;

// Prepares the group's scaled queries (scratch.query) for the scan of an index of this kind.
void PrepareQueries(const Storage& storage, IndexKind kind, Group& group);

// Predicted scores of the block that holds `token` (a multiple of 256) for all heads into scores
// [G][256], natural logarithm units; -inf outside the middle. The codes of block number `soon` of
// the sequence, if any, are fetched on the way.
void ScoreBlock(const Storage& storage, IndexKind kind, const Group& group, int64_t token,
                float* scores, int64_t soon = -1);

// The whole middle as scratch.estimate, shift and mass. e^ of a token is estimate * exp(shift of
// its block and head), estimates are rounded to fp16 and at most 1; they are 0 outside the middle
// only.
void ScanEstimates(const Storage& storage, IndexKind kind, const Group& group, Workers* workers);

// The whole middle as scratch.score [G][stride], token - middle_begin along the row.
void ScanScores(const Storage& storage, IndexKind kind, const Group& group, Workers* workers);

// e^ of one token and head, in the unit exp(shift) of their block.
float EstimateOf(const Group& group, int64_t token, int head);

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_SCAN_H_
