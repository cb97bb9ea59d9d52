// Options of a runtime: checked values, and what follows from them.
#ifndef VATTN_RUNTIME_OPTIONS_H_
#define VATTN_RUNTIME_OPTIONS_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "kernels/params.h"

namespace vattn {

enum class LogLevel : int32_t { kError = 0, kWarning = 1, kInfo = 2, kDebug = 3 };
using Logger = std::function<void(LogLevel, const std::string&)>;

// Fields are those of vattn_options (api/vattn.h has units, ranges and defaults), enums as numbers.
struct Options {
  int32_t num_layers = 1, num_q_heads = 8, num_kv_heads = 2, head_dim_k = 128, head_dim_v = 128;
  int32_t dtype = 2;
  int32_t shared_kv = 0;
  float softmax_scale = 0;
  std::vector<int32_t> layer_kv_heads;  // empty: num_kv_heads in every layer
  int32_t backend = 0, device = 0, num_threads = 0, numa_node = -1, huge_pages = 1, prefault = 0;
  int32_t zero_on_free = 0;
  uint64_t host_bytes = uint64_t{1} << 30;
  int32_t sinks = 16, window = 128, exact_below = 1024;
  int32_t index = 0, index_bytes = 0, value_bits = 0;
  int32_t policy = 0, norm = 0, on_unverified = 0, bound = 0;
  float epsilon = .1f, delta = .1f, norm_floor = .5f;
  int32_t max_looks = 6;
  uint64_t seed = 0;
  int32_t refresh = 64, min_selected = 16;
  float max_selected_share = .5f, topk_share = .05f, base_share = .05f;
  int32_t target = 0;
  float hot_share = .05f;
  std::string profile;    // empty: none
  std::string disk_path;  // empty: none
  uint64_t disk_bytes = 0;
  int32_t spill = 0, io_engine = 0, io_depth = 8, io_block_bytes = 1 << 20, io_buffered = 0,
          io_timeout_ms = 60000;
  std::string sign_maps;  // empty: random hyperplanes
  int32_t pilot = 0, admission = 0;
  uint64_t tenant_bytes = 0;
};

enum class Admission : int32_t { kOvercommit = 0, kReserved = 1 };

enum class IoEngine : int32_t { kAuto = 0, kUring = 1, kPread = 2 };

// Checks every field and resolves those that mean "default" (softmax_scale, layer_kv_heads).
// INVALID_ARGUMENT with name, value and limit.
absl::Status ResolveOptions(Options& options);

// Rows and codes of such a runtime; base is not set.
Storage MakeStorage(const Options& options);
// Sampling constants; quantile is not set.
Promise MakePromise(const Options& options);

}  // namespace vattn

#endif  // VATTN_RUNTIME_OPTIONS_H_
