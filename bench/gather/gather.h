// How fast scattered rows of host memory reach the device, for `vattn gather`.
#ifndef VATTN_BENCH_GATHER_GATHER_H_
#define VATTN_BENCH_GATHER_GATHER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "bench/cli/progress.h"

namespace vattn::bench {

// The region is [layers][kv_heads][tokens] rows; a repetition selects the same share of the tokens
// of every KV head of one layer, uniformly and without replacement.
struct GatherShape {
  int32_t layers = 4;
  int32_t kv_heads = 8;
  int64_t tokens = 1 << 20;
  int32_t row_bytes = 512;
  std::vector<double> shares = {.0005, .002, .005, .01, .02, .05};
  int32_t repetitions = 8;  // different rows each
  int32_t threads = 1;      // that fill the region
  uint64_t seed = 1;

  uint64_t layer_bytes() const { return static_cast<uint64_t>(kv_heads) * tokens * row_bytes; }
  uint64_t region_bytes() const { return layers * layer_bytes(); }
  int64_t RowsPerHead(double share) const;  // at least 1
};

struct GatherLine {
  double share = 0;
  int64_t rows = 0;    // of a repetition, all heads
  std::string mover;   // "memcpy", "bulk", "warp per row" or "team"
  std::string order;   // of the rows: "contiguous", "token" or "random"
  int32_t blocks = 0;  // thread blocks in all; 0: the copy engine
  double us_p50 = 0, us_min = 0;
  double gbps_p50 = 0, gbps_max = 0;
};

struct GatherFigures {
  std::string device;
  double fill_seconds = 0;  // first touch and registration of the region
  uint64_t large_copy_bytes = 0;
  double large_copy_gbps = 0;     // one contiguous copy of so many bytes, median
  std::vector<GatherLine> lines;  // per share: memcpy first
};

// UsageError in a build without CUDA or on a machine without a device.
void RequireGatherDevice();

// Every repetition's bytes are compared with the region's: Failure if one differs, or if a CUDA
// call fails. REQUIRES a device.
GatherFigures MeasureGather(const GatherShape& shape, Progress* progress);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_GATHER_GATHER_H_
