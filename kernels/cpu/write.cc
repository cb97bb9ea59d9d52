#include "kernels/cpu/write.h"

#include <algorithm>
#include <cstring>

#include "kernels/cpu/workers.h"

namespace vattn::cpu {

void Write(const WriteParams& p, Workers* workers) {
  const Storage& s = p.storage;
  const int element = ElementBytes(s.row.dtype);
  const size_t k_bytes = static_cast<size_t>(s.row.dim_k) * element,
               v_bytes = static_cast<size_t>(s.row.dim_v) * element;
  const int64_t chunks = (p.count + kBlockTokens - 1) / kBlockTokens;
  ParallelFor(workers, chunks * p.kv_heads, [&](int64_t i) {
    const int head = static_cast<int>(i % p.kv_heads);
    const int64_t from = i / p.kv_heads * kBlockTokens, to = std::min(p.count, from + kBlockTokens);
    const std::byte* k = static_cast<const std::byte*>(p.k) + head * p.k_head_stride * element;
    const std::byte* v = static_cast<const std::byte*>(p.v) +
                         (p.v == nullptr ? 0 : head * p.v_head_stride * element);
    for (int64_t t = from; t < to; ++t) {
      const int64_t token = p.first + t;
      std::byte* row = s.base + p.blocks[head][token / kBlockTokens] * s.block.bytes +
                       token % kBlockTokens * s.row.row_bytes;
      std::memcpy(row, k + t * p.k_token_stride * element, k_bytes);
      if (!s.row.shared_kv)
        std::memcpy(row + s.row.v_offset, v + t * p.v_token_stride * element, v_bytes);
    }
  });
}

}  // namespace vattn::cpu
