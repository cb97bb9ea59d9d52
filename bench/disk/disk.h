// How fast sequences go to files and come back, and whether attention is the same afterwards.
#ifndef VATTN_BENCH_DISK_DISK_H_
#define VATTN_BENCH_DISK_DISK_H_

#include <cstdint>
#include <string>
#include <vector>

#include "api/vattn.h"
#include "bench/cli/progress.h"
#include "bench/trace/trace.h"

namespace vattn::bench {

struct DiskPlan {
  std::string directory;     // for a folder of files, which are removed afterwards
  int64_t mebibytes = 1024;  // of a file, about
  std::vector<int32_t> block_kib = {1024};
  std::vector<int32_t> depths = {8};
  int32_t engine = VATTN_IO_AUTO;
  int32_t buffered = 0;
  int32_t repetitions = 5;
};

struct DiskLine {
  int32_t block_kib, depth;
  std::vector<double> save_gbps, restore_gbps;  // of 1e9 bytes of file, one a repetition
};

struct DiskFigures {
  uint64_t file_bytes;
  std::vector<DiskLine> lines;  // block sizes x depths
};

// Saves include fdatasync, rename and fsync of the directory; restores start from files that the
// page cache was asked to forget.
DiskFigures MeasureDisk(const DiskPlan& plan, Progress* progress);

struct RestoredFigures {
  // Query heads x layers x steps; bits of output, error or verdict differ
  int64_t answers = 0, different = 0;
  uint64_t file_bytes = 0;
};

// Decodes a recording twice, the second time from a sequence that was saved halfway, restored in a
// runtime of its own, and from then on step by step beside the first. The file stays at path.
RestoredFigures CompareRestored(const Trace& trace, const vattn_options& options,
                                const std::string& path);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_DISK_DISK_H_
