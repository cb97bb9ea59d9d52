#include "bench/trace/reused_scores.h"

#include <cmath>

#include "bench/cli/dtype.h"

namespace vattn::bench {

const float* ReusedScores::At(int64_t step) {
  const bool prompt = step == 0 && trace_.prompt_queries > 0;
  const int64_t from = prompt ? -1 : step == 0 ? 0 : (step - 1) / kStride * kStride;
  if (from == from_) return scores_.data();
  from_ = from;
  const int64_t dim = trace_.head_dim_k, seen = trace_.prompt_tokens + from + 1,
                group = trace_.q_heads / trace_.kv_heads;
  scores_.assign(
      static_cast<size_t>(static_cast<int64_t>(layers_.size()) * trace_.q_heads * stride()), 0.f);
  const float scale = 1 / std::sqrt(static_cast<float>(dim));
  std::vector<float> queries(static_cast<size_t>(group * dim)), key(static_cast<size_t>(dim));
  for (size_t l = 0; l < layers_.size(); ++l) {
    for (int64_t kv_head = 0; kv_head < trace_.kv_heads; ++kv_head) {
      for (int64_t g = 0; g < group; ++g) {
        const Tensor& q = prompt ? trace_.q_prompt : trace_.q;
        const int64_t at = prompt ? trace_.prompt_queries - 1 : from;
        ToFloat(q.dtype, q.Row(layers_[l], kv_head * group + g, at), static_cast<size_t>(dim),
                &queries[g * dim]);
      }
      float* out =
          &scores_[(static_cast<int64_t>(l) * trace_.q_heads + kv_head * group) * stride()];
      for (int64_t t = 0; t < seen; ++t) {
        ToFloat(trace_.k.dtype, trace_.k.Row(layers_[l], kv_head, t), static_cast<size_t>(dim),
                key.data());
        for (int64_t g = 0; g < group; ++g) {
          float sum = 0;
          for (int64_t c = 0; c < dim; ++c) sum += queries[g * dim + c] * key[c];
          out[g * stride() + t] = sum * scale;
        }
      }
    }
  }
  return scores_.data();
}

}  // namespace vattn::bench
