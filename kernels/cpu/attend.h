// Exact attention over token ranges and weighted attention over listed rows.
#ifndef VATTN_KERNELS_CPU_ATTEND_H_
#define VATTN_KERNELS_CPU_ATTEND_H_

#include "kernels/params.h"

namespace vattn::cpu {

class Workers;

constexpr int kTileRows = 64;

// scratch.query = scale * group.q as fp32.
void ScaleQueries(const Storage& storage, Group& group);

// The row of a token.
inline const uint8_t* RowOf(const Storage& s, const Group& group, int64_t token) {
  return reinterpret_cast<const uint8_t*>(RowAt(s, group.blocks, group.kv_head, token));
}

// Adds `count` <= 64 rows to the states [heads][dim_v + 3] of scaled queries [heads][dim_k]. `rows`
// has `listed` rows; the ones after the first `count` are prefetched. log_weights [count] are added to
// the logits, unless null. Without value_norms the states' sums of e |v|^2 stay as they are, which
// saves a pass over the values.
void AttendRows(const Storage& storage, const uint8_t* const* rows, int count, int listed,
                const float* queries, int heads, const float* log_weights, float* states,
                bool value_norms = true);

// Adds tokens [begin, end) of the group to states; long ranges in parallel through scratch.state.
void AttendRange(const Storage& storage, const Group& group, int64_t begin, int64_t end,
                 const float* queries, int heads, float* states, Workers* workers,
                 bool value_norms = true);

// Adds to the state of each listed head (ascending; null: the first num_heads) the tokens from
// `begin` on that it sees. queries and states are those of the list.
void AttendVisible(const Storage& storage, const Group& group, int64_t begin, const int32_t* heads,
                   int num_heads, const float* queries, float* states, Workers* workers,
                   bool value_norms = true);

// Writes out and lse of one head from a finished state.
void WriteHead(const Storage& storage, const Group& group, int head, const float* output,
               float lse);
void SetVerdict(const Group& group, int head, Verdict verdict, float error);
// Called after all heads are written. A head whose output has an element that is not finite becomes
// kBestEffort with an infinite error. Rows or queries may have had such an element, or a sum, a score
// or the type of the output has no room for it.
void FlagNotFinite(const Storage& storage, const Group& group);

// Attention over the listed tokens of every group and nothing else.
void AttendSelected(const AttendSelectedParams& params, Workers* workers);

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_ATTEND_H_
