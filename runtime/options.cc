#include "runtime/options.h"

#include <algorithm>
#include <cmath>

#include "kernels/geometry.h"
#include "memory/status.h"

namespace vattn {
namespace {

template <class T>
absl::Status InRange(const char* name, T value, T low, T high) {
  if (value >= low && value <= high) return absl::OkStatus();  // also refuses NaN
  return OutOfRangeError(name, value, low, high);
}

// One of the enumerators from 0 to `last`.
template <class Enum>
absl::Status Listed(const char* name, Enum value, Enum last) {
  return InRange(name, static_cast<int32_t>(value), 0, static_cast<int32_t>(last));
}

// Over `low`, which itself is refused.
absl::Status Over(const char* name, float value, float low, float high) {
  if (value > low && value <= high) return absl::OkStatus();
  return InvalidArgumentError(name, " is ", value, ", must be over ", low, " and at most ", high);
}

absl::Status MultipleOf(const char* name, int value, int unit) {
  if (value % unit == 0) return absl::OkStatus();
  return InvalidArgumentError(name, " is ", value, ", must be a multiple of ", unit);
}

absl::Status CheckShape(Options& o) {
  VATTN_RETURN_IF_ERROR(InRange("num_layers", o.num_layers, 1, 1024));
  VATTN_RETURN_IF_ERROR(InRange("num_q_heads", o.num_q_heads, 1, 1024));
  VATTN_RETURN_IF_ERROR(InRange("num_kv_heads", o.num_kv_heads, 1, 1024));
  VATTN_RETURN_IF_ERROR(InRange("head_dim_k", o.head_dim_k, 16, kMaxDim));
  VATTN_RETURN_IF_ERROR(MultipleOf("head_dim_k", o.head_dim_k, 16));
  VATTN_RETURN_IF_ERROR(InRange("head_dim_v", o.head_dim_v, 16, kMaxDim));
  VATTN_RETURN_IF_ERROR(MultipleOf("head_dim_v", o.head_dim_v, 16));
  VATTN_RETURN_IF_ERROR(Listed("dtype", o.dtype, DType::kBF16));
  if (o.shared_kv && o.head_dim_v > o.head_dim_k) {
    return InvalidArgumentError("head_dim_v is ", o.head_dim_v,
                                ", must be at most head_dim_k = ", o.head_dim_k, " with shared_kv");
  }
  if (!(o.softmax_scale >= 0) || !std::isfinite(o.softmax_scale)) {
    return InvalidArgumentError("softmax_scale is ", o.softmax_scale,
                                ", must be finite and 0 or more");
  }
  if (o.softmax_scale == 0) o.softmax_scale = 1 / std::sqrt(static_cast<float>(o.head_dim_k));
  if (o.layer_kv_heads.empty()) o.layer_kv_heads.assign(o.num_layers, o.num_kv_heads);
  if (static_cast<int>(o.layer_kv_heads.size()) != o.num_layers) {
    return InvalidArgumentError("layer_kv_heads has ", o.layer_kv_heads.size(),
                                " entries, must have num_layers = ", o.num_layers);
  }
  for (int l = 0; l < o.num_layers; ++l) {
    const int heads = o.layer_kv_heads[l];
    if (heads < 0 || heads > 1024)
      return OutOfRangeError(absl::StrCat("layer_kv_heads[", l, "]"), heads, 0, 1024);
    if (heads > 0 && o.num_q_heads % heads != 0) {
      return InvalidArgumentError("num_q_heads is ", o.num_q_heads, ", must be a multiple of the ",
                                  heads, " KV heads of layer ", l);
    }
  }
  return absl::OkStatus();
}

absl::Status CheckMachine(const Options& o) {
  VATTN_RETURN_IF_ERROR(Listed("backend", o.backend, BackendKind::kCuda));
  VATTN_RETURN_IF_ERROR(InRange("device", o.device, 0, 1023));
  VATTN_RETURN_IF_ERROR(InRange("num_threads", o.num_threads, 0, 4096));
  VATTN_RETURN_IF_ERROR(InRange("numa_node", o.numa_node, -1, 1023));
  VATTN_RETURN_IF_ERROR(Listed("admission", o.admission, Admission::kReserved));
  // A layer has at most 1024 KV heads, and a random key 16 bits for the number of one.
  VATTN_RETURN_IF_ERROR(
      InRange("first_kv_head", o.first_kv_head, uint64_t{0}, uint64_t{65536 - 1024}));
  const uint64_t block = MakeStorage(o).block.bytes;
  if (o.host_bytes < block || o.host_bytes > uint64_t{1} << 46) {
    return InvalidArgumentError("host_bytes is ", o.host_bytes, ", must be at least one block of ",
                                block, " bytes and at most 64 TiB");
  }
  return absl::OkStatus();
}

absl::Status CheckPromise(const Options& o) {
  VATTN_RETURN_IF_ERROR(Listed("policy", o.policy, Policy::kDense));
  VATTN_RETURN_IF_ERROR(Listed("norm", o.norm, Norm::kOutput));
  VATTN_RETURN_IF_ERROR(Listed("on_unverified", o.on_unverified, OnUnverified::kBestEffort));
  VATTN_RETURN_IF_ERROR(Listed("bound", o.bound, Bound::kSafe));
  VATTN_RETURN_IF_ERROR(Over("epsilon", o.epsilon, 0, 10));
  VATTN_RETURN_IF_ERROR(Over("delta", o.delta, 0, .215f));
  VATTN_RETURN_IF_ERROR(InRange("norm_floor", o.norm_floor, 0.f, 1.f));
  VATTN_RETURN_IF_ERROR(InRange("max_looks", o.max_looks, 1, kMaxLooks));
  VATTN_RETURN_IF_ERROR(InRange("refresh", o.refresh, 1, 4096));
  VATTN_RETURN_IF_ERROR(InRange("min_selected", o.min_selected, 0, 65536));
  VATTN_RETURN_IF_ERROR(Over("max_selected_share", o.max_selected_share, 0, 1));
  VATTN_RETURN_IF_ERROR(InRange("topk_share", o.topk_share, 0.f, 1.f));
  VATTN_RETURN_IF_ERROR(InRange("base_share", o.base_share, 0.f, 1.f));
  VATTN_RETURN_IF_ERROR(Listed("target", o.target, Target::kDenominator));
  VATTN_RETURN_IF_ERROR(InRange("hot_share", o.hot_share, 0.f, 1.f));
  return absl::OkStatus();
}

absl::Status CheckDisk(Options& o) {
  if (o.spill && o.disk_path.empty()) {
    return InvalidArgumentError("disk_path is not given, must be with spill = 1");
  }
  VATTN_RETURN_IF_ERROR(Listed("io_engine", o.io_engine, IoEngine::kPread));
  if (o.io_depth == 0) o.io_depth = 8;
  VATTN_RETURN_IF_ERROR(InRange("io_depth", o.io_depth, 1, 256));
  if (o.io_block_bytes == 0) o.io_block_bytes = 1 << 20;
  VATTN_RETURN_IF_ERROR(InRange("io_block_bytes", o.io_block_bytes, 4096, 1 << 28));
  VATTN_RETURN_IF_ERROR(MultipleOf("io_block_bytes", o.io_block_bytes, 4096));
  if (o.io_timeout_ms == 0) o.io_timeout_ms = 60000;
  return InRange("io_timeout_ms", o.io_timeout_ms, 1, 1 << 30);
}

absl::Status CheckIndex(Options& o) {
  VATTN_RETURN_IF_ERROR(Listed("index", o.index, IndexKind::kExternal));
  const IndexKind kind = o.index;
  // Two bits a dimension: with fewer, codes take tokens that matter for others that do not.
  if (o.index_bytes == 0)
    o.index_bytes =
        kind == IndexKind::kBalanced ? std::clamp((o.head_dim_k / 4 + 15) / 16 * 16, 32, 64) : 32;
  if (kind == IndexKind::kSign) {
    if (o.index_bytes != 4 && o.index_bytes != 8 && o.index_bytes != 16 && o.index_bytes != 32) {
      return InvalidArgumentError("index_bytes is ", o.index_bytes,
                                  ", must be 4, 8, 16 or 32 with index sign");
    }
  } else if (kind == IndexKind::kHadamard2 && o.head_dim_k > kMaxCodeDims) {
    return InvalidArgumentError("head_dim_k is ", o.head_dim_k, ", must be at most ", kMaxCodeDims,
                                " with index hadamard2");
  } else if (kind == IndexKind::kHadamard2 || kind == IndexKind::kPage ||
             kind == IndexKind::kPooled) {
    o.index_bytes = MakeIndexLayout(kind, 0, o.head_dim_k).bytes();
  } else if (o.index_bytes != 16 && o.index_bytes != 32 && o.index_bytes != 48 &&
             o.index_bytes != 64) {
    return InvalidArgumentError("index_bytes is ", o.index_bytes, ", must be 16, 32, 48 or 64");
  }
  if (!o.sign_maps.empty() && kind != IndexKind::kSign) {
    return InvalidArgumentError("sign_maps is given, must be NULL with index ",
                                static_cast<int32_t>(kind), ", which has no learned maps");
  }
  return absl::OkStatus();
}

absl::Status CheckSets(Options& o) {
  VATTN_RETURN_IF_ERROR(InRange("sinks", o.sinks, 0, 256));
  VATTN_RETURN_IF_ERROR(MultipleOf("sinks", o.sinks, 16));
  VATTN_RETURN_IF_ERROR(InRange("window", o.window, 1, 65536));
  VATTN_RETURN_IF_ERROR(InRange("exact_below", o.exact_below, 64, 1 << 30));
  VATTN_RETURN_IF_ERROR(CheckIndex(o));
  if (o.value_bits != 0 && o.value_bits != 2 && o.value_bits != 4) {
    return InvalidArgumentError("value_bits is ", o.value_bits, ", must be 0, 2 or 4");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ResolveOptions(Options& o) {
  VATTN_RETURN_IF_ERROR(CheckShape(o));
  VATTN_RETURN_IF_ERROR(CheckSets(o));
  VATTN_RETURN_IF_ERROR(CheckMachine(o));
  VATTN_RETURN_IF_ERROR(CheckDisk(o));
  return CheckPromise(o);
}

ExactSets ExactSetsOf(const Options& o) {
  return {.sinks = o.sinks, .window = o.window, .exact_below = o.exact_below};
}

Storage MakeStorage(const Options& o) {
  Storage s;
  s.row = MakeRowLayout(o.dtype, o.head_dim_k, o.head_dim_v, o.shared_kv);
  s.code = MakeIndexLayout(o.index, o.index_bytes, o.head_dim_k);
  s.value_bits = o.value_bits;
  s.value_code_bytes = ValueCodeBytes(o.value_bits, o.head_dim_v);
  s.block = MakeBlockLayout(s.row, s.code.bytes(), s.value_code_bytes);
  s.scale = o.softmax_scale;
  return s;
}

Promise MakePromise(const Options& o) {
  return {.policy = o.policy,
          .index = o.index,
          .norm = o.norm,
          .on_unverified = o.on_unverified,
          .bound = o.bound,
          .target = o.target,
          .epsilon = o.epsilon,
          .delta = o.delta,
          .norm_floor = o.norm_floor,
          .max_looks = o.max_looks,
          .min_selected = o.min_selected,
          .max_selected_share = o.max_selected_share,
          .topk_share = o.topk_share,
          .base_share = o.base_share,
          .refresh = static_cast<uint32_t>(o.refresh),
          .pilot = o.pilot};
}

}  // namespace vattn
