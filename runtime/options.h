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

enum class BackendKind : int32_t { kAuto = 0, kCpu = 1, kCuda = 2 };
enum class Admission : int32_t { kOvercommit = 0, kReserved = 1 };
enum class IoEngine : int32_t { kAuto = 0, kUring = 1, kPread = 2 };

// Fields are those of vattn_options; api/vattn.h has units, ranges and defaults. An enumeration may
// hold any number until ResolveOptions has checked it.
struct Options {
  int32_t num_layers = 1, num_q_heads = 8, num_kv_heads = 2, head_dim_k = 128, head_dim_v = 128;
  DType dtype = DType::kBF16;
  bool shared_kv = false;
  float softmax_scale = 0;
  std::vector<int32_t> layer_kv_heads;  // empty: num_kv_heads in every layer
  BackendKind backend = BackendKind::kAuto;
  int32_t device = 0, num_threads = 0, numa_node = -1;
  bool huge_pages = true, prefault = false, zero_on_free = false;
  uint64_t host_bytes = uint64_t{1} << 30;
  int32_t sinks = 16, window = 128, exact_below = 1024;
  IndexKind index = IndexKind::kBalanced;
  int32_t index_bytes = 0, value_bits = 0;
  Policy policy = Policy::kVerified;
  Norm norm = Norm::kValue;
  OnUnverified on_unverified = OnUnverified::kDense;
  Bound bound = Bound::kSharp;
  float epsilon = .1f, delta = .1f, norm_floor = .5f;
  int32_t max_looks = 6;
  uint64_t seed = 0;
  int32_t refresh = 64, min_selected = 16;
  float max_selected_share = .5f, topk_share = .05f, base_share = .05f;
  Target target = Target::kSdpa;
  float hot_share = .05f;
  std::string profile;    // empty: none
  std::string disk_path;  // empty: none
  uint64_t disk_bytes = 0;
  bool spill = false, io_buffered = false;
  IoEngine io_engine = IoEngine::kAuto;
  int32_t io_depth = 8, io_block_bytes = 1 << 20, io_timeout_ms = 60000;
  std::string sign_maps;  // empty: random hyperplanes
  bool pilot = false;
  Admission admission = Admission::kOvercommit;
  uint64_t tenant_bytes = 0;
  uint64_t first_kv_head = 0;
};

// Checks every field and resolves those that mean "default" (softmax_scale, layer_kv_heads).
// INVALID_ARGUMENT with name, value and limit.
absl::Status ResolveOptions(Options& options);

// The number of a runtime's KV head among the model's, of which it may have some (first_kv_head).
inline uint32_t KvHeadOfModel(const Options& options, int head) {
  return static_cast<uint32_t>(options.first_kv_head) + static_cast<uint32_t>(head);
}
ExactSets ExactSetsOf(const Options& options);
// Rows and codes of such a runtime; base is not set.
Storage MakeStorage(const Options& options);
// Sampling constants; quantile is not set.
Promise MakePromise(const Options& options);

}  // namespace vattn

#endif  // VATTN_RUNTIME_OPTIONS_H_
