#include "api/llama_cpp/runtimes.h"

namespace vattn::llama_cpp {

const Runtime& Runtimes::Get(const Shape& shape, int32_t policy, int32_t threads) {
  const auto key = std::make_tuple(shape, policy, threads);
  const auto found = made_.find(key);
  if (found != made_.end()) return found->second;
  vattn_options o = options_;
  o.num_layers = 1;
  o.layer_kv_heads = nullptr;
  o.num_q_heads = shape.q_heads;
  o.num_kv_heads = shape.kv_heads;
  o.head_dim_k = shape.head_dim_k;
  o.head_dim_v = shape.head_dim_v;
  o.softmax_scale = shape.scale;
  o.dtype = VATTN_F16;
  o.shared_kv = 0;
  o.backend = VATTN_BACKEND_CPU;
  o.policy = policy;
  if (o.num_threads == 0) o.num_threads = threads;
  // Rows and codes of a sequence that tables are learnt from, in whole blocks.
  const int64_t row_bytes = int64_t{2} * (shape.head_dim_k + shape.head_dim_v) + 80;
  o.host_bytes = static_cast<uint64_t>((kMostTaught + 1024) * shape.kv_heads * row_bytes);
  return made_.emplace(key, Runtime(o)).first->second;
}

vattn_stats Runtimes::Stats() const {
  vattn_stats sum = {};
  for (const auto& [key, runtime] : made_) {
    if (std::get<1>(key) != VATTN_POLICY_VERIFIED) continue;
    const vattn_stats s = runtime.Stats();
    sum.heads_exact += s.heads_exact, sum.heads_verified += s.heads_verified;
    sum.heads_dense += s.heads_dense, sum.heads_best_effort += s.heads_best_effort;
    sum.heads_noisy += s.heads_noisy, sum.rows_middle += s.rows_middle;
    sum.rows_selected += s.rows_selected, sum.looks += s.looks, sum.outliers += s.outliers;
  }
  return sum;
}

}  // namespace vattn::llama_cpp
