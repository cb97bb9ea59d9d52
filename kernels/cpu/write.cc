#include "kernels/cpu/write.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "kernels/cpu/encode.h"
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
      std::byte* const row = RowAt(s, p.blocks[head], head, token);
      std::memcpy(row, k + t * p.k_token_stride * element, k_bytes);
      if (!s.row.shared_kv)
        std::memcpy(row + s.row.v_offset, v + t * p.v_token_stride * element, v_bytes);
    }
  });
}

namespace {

// Rows of slots [first, first + count) of the list for one KV head: written, and coded.
void WriteAt(const WriteSlotsParams& p, int head, int64_t first, int count) {
  const Storage& s = p.storage;
  const int element = ElementBytes(s.row.dtype);
  const size_t k_bytes = static_cast<size_t>(s.row.dim_k) * element,
               v_bytes = static_cast<size_t>(s.row.dim_v) * element;
  const uint8_t* rows[kTileTokens];
  int64_t slots[kTileTokens];
  int used = 0;
  for (int64_t i = first; i < first + count; ++i) {
    const int64_t slot = p.slots[i];
    if (slot < 0 || slot >= p.num_slots) continue;
    std::byte* const row = RowInBlock(s, slot / s.block.tokens, slot % s.block.tokens, head);
    if (p.k != nullptr) {
      std::memcpy(row,
                  static_cast<const std::byte*>(p.k) +
                      (i * p.k_token_stride + head * p.k_head_stride) * element,
                  k_bytes);
    }
    if (p.k != nullptr && !s.row.shared_kv) {
      std::memcpy(row + s.row.v_offset,
                  static_cast<const std::byte*>(p.v) +
                      (i * p.v_token_stride + head * p.v_head_stride) * element,
                  v_bytes);
    }
    rows[used] = reinterpret_cast<const uint8_t*>(row);
    slots[used++] = slot;
  }
  if (p.index == nullptr || used == 0) return;
  std::fill(rows + used, rows + kTileTokens, rows[0]);
  alignas(64) uint8_t tile[kTileTokens * kMaxCodeDims];
  EncodeRows(s, p.index[head], rows, tile, nullptr);
  uint64_t outliers = 0;
  for (int t = 0; t < used; ++t) {
    const int64_t in_block = slots[t] % s.block.tokens, in_tile = in_block % kTileTokens;
    std::byte* const to =
        CodesInBlock(s, slots[t] / s.block.tokens, in_block - in_tile, head) + in_tile * 4;
    uint32_t any = 0;
    for (int w = 0; w < s.code.words(); ++w) {
      uint32_t word;
      std::memcpy(&word, tile + (w * kTileTokens + t) * 4, sizeof(word));
      std::memcpy(to + w * kTileTokens * 4, &word, sizeof(word));
      any |= word;
    }
    if (any == 0) ++outliers;
  }
  if (outliers > 0 && p.outliers != nullptr)
    std::atomic_ref<uint64_t>(*p.outliers).fetch_add(outliers, std::memory_order_relaxed);
}

}  // namespace

void WriteSlots(const WriteSlotsParams& p, Workers* workers) {
  const int64_t tiles = (p.count + kTileTokens - 1) / kTileTokens;
  ParallelFor(workers, tiles * p.kv_heads, [&](int64_t i) {
    const int64_t first = i / p.kv_heads * kTileTokens;
    WriteAt(p, static_cast<int>(i % p.kv_heads), first,
            static_cast<int>(std::min<int64_t>(kTileTokens, p.count - first)));
  });
}

}  // namespace vattn::cpu
