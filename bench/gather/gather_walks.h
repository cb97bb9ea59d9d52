// Other ways to walk a list of rows, to compare bench/gather/rows.h with; and the pattern that
// tells whether the right rows arrived. Device pointers, enqueued on a stream, a cudaError_t value.
#ifndef VATTN_BENCH_GATHER_GATHER_WALKS_H_
#define VATTN_BENCH_GATHER_GATHER_WALKS_H_

#include <cstdint>

struct CUstream_st;

namespace vattn::bench {

// Word i of the region is (i + 1) * kPattern.
inline constexpr uint64_t kPattern = 0x9e3779b97f4a7c15u;

struct RowList {
  const uint64_t* source = nullptr;  // [rows] addresses; null: rows from `first` on without gaps
  uint64_t first = 0;
  int64_t rows = 0;
  int32_t row_bytes = 0;
  void* destination = nullptr;  // [rows, row_bytes]
};

// One warp a row and row after row, 16 bytes a lane, blocks of 1024 threads: what HiSparse runs,
// with one block per request.
int WalkByWarps(const RowList& list, int blocks, CUstream_st* stream);

// The list is num_heads lists of equal length. Each is walked by `team` blocks of 256 threads:
// tiles of 64 rows are dealt to them in turn, a warp has four loads of 16 bytes a lane under way.
int WalkByTeams(const RowList& list, int num_heads, int team, CUstream_st* stream);

// Adds the number of words at the destination that are not those of the region, which starts at
// device address `region`, to *wrong.
int CountWrongWords(const RowList& list, uint64_t region, unsigned long long* wrong,
                    CUstream_st* stream);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_GATHER_GATHER_WALKS_H_
