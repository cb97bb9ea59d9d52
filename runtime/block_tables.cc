#include "runtime/block_tables.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "memory/status.h"
#include "runtime/backend.h"
#include "runtime/room.h"
#include "runtime/runtime.h"

namespace vattn {

BlockTables::BlockTables(Runtime& runtime, const Sequence& owner, TenantSlot tenant,
                         std::vector<Layer>& layers)
    : runtime_(runtime), store_(runtime.store()), owner_(owner), tenant_(tenant), layers_(layers) {}

int64_t BlockTables::Unmet(int64_t reserve_tokens, int64_t keep_tokens,
                           int64_t shared_tokens) const {
  const int64_t reserved = BlocksFor(reserve_tokens), shared = BlocksFor(shared_tokens);
  int64_t blocks = 0;
  for (const Layer& layer : layers_) {
    const int64_t tokens = std::min(layer.tokens, keep_tokens);
    // Rows are written behind the tokens, codes behind those that are coded.
    const int64_t write_from = std::max<int64_t>(CodedOf(layer, tokens), runtime_.options().sinks);
    const int64_t first = std::min(write_from, tokens) / kBlockTokens;
    for (const KvHead& kv_head : layer.kv_heads) {
      const int64_t size = static_cast<int64_t>(kv_head.blocks.size());
      const int64_t have = layer.tokens <= keep_tokens ? size : BlocksFor(tokens);
      blocks += std::max<int64_t>(0, reserved - have);
      for (int64_t b = first; b < std::min(have, reserved); ++b) {
        if (b < shared || !store_.IsUnique(BlockId{kv_head.blocks[b]})) ++blocks;
      }
    }
  }
  return blocks;
}

absl::Status BlockTables::Reserve(int64_t tokens) {
  VATTN_RETURN_IF_ERROR(ReserveUpTo(Unmet(tokens, kAllTokens, 0)));
  reserve_tokens_ = tokens;
  GiveBackExcess();
  return absl::OkStatus();
}

absl::Status BlockTables::ReserveForSharing(int64_t tokens) {
  if (reserve_tokens_ == 0) return absl::OkStatus();
  return ReserveUpTo(Unmet(reserve_tokens_, kAllTokens, tokens));
}

absl::Status BlockTables::ReserveForCut(int64_t tokens) {
  if (reserve_tokens_ == 0) return absl::OkStatus();
  int64_t returned = 0;
  for (const Layer& layer : layers_) {
    const int64_t keep = BlocksFor(std::min(layer.tokens, tokens));
    for (const KvHead& kv_head : layer.kv_heads) {
      for (int64_t b = keep; b < static_cast<int64_t>(kv_head.blocks.size()); ++b)
        returned += ReturnsToReservation(kv_head.blocks, b);
    }
  }
  return ReserveUpTo(Unmet(reserve_tokens_, tokens, 0) - returned);
}

absl::Status BlockTables::ReserveUpTo(int64_t blocks) {
  if (blocks <= reserved_) return absl::OkStatus();
  VATTN_RETURN_IF_ERROR(runtime_.room().Reserve(owner_, blocks - reserved_));
  reserved_ = blocks;
  return absl::OkStatus();
}

void BlockTables::GiveBackExcess() {
  const int64_t unmet = reserve_tokens_ == 0 ? 0 : Unmet(reserve_tokens_, kAllTokens, 0);
  if (reserved_ <= unmet) return;
  store_.Unreserve(reserved_ - unmet, tenant_);
  reserved_ = unmet;
}

void BlockTables::ListNeeds(int layer, int64_t begin, int64_t end,
                            std::vector<BlockNeed>& needs) const {
  for (int h = 0; h < static_cast<int>(layers_[layer].kv_heads.size()); ++h) {
    const BlockTable& blocks = layers_[layer].kv_heads[h].blocks;
    const int64_t have = static_cast<int64_t>(blocks.size());
    for (int64_t b = begin / kBlockTokens; b < BlocksFor(end); ++b) {
      const bool copy = b < have;
      if (copy && store_.IsUnique(BlockId{blocks[b]})) continue;
      needs.push_back({layer, h, b, copy});
    }
  }
}

absl::Status BlockTables::Take(const std::vector<BlockNeed>& needs) {
  if (needs.empty()) return absl::OkStatus();
  const bool copies_codes = runtime_.backend().copies_codes();
  const int64_t promised = BlocksFor(reserve_tokens_), count = static_cast<int64_t>(needs.size());
  // Whatever may fail comes before the first block is taken.
  std::vector<BlockId> taken(needs.size());
  int64_t own = 0;
  // The last blocks of a table first, so that it grows once.
  for (auto need = needs.rbegin(); need != needs.rend(); ++need) {
    layers_[need->layer].kv_heads[need->kv_head].blocks.Reserve(static_cast<size_t>(need->block) +
                                                                1);
    own += need->block < promised;
  }
  if (copies_codes) codes_to_load_.reserve(codes_to_load_.size() + needs.size());
  VATTN_RETURN_IF_ERROR(TakeBlocks(own, count, taken.data()));
  for (size_t i = 0; i < needs.size(); ++i) {
    BlockTable& blocks = layers_[needs[i].layer].kv_heads[needs[i].kv_head].blocks;
    const int32_t id = static_cast<int32_t>(taken[i]);
    runtime_.backend().BumpGeneration(id);
    if (!needs[i].copy) {
      blocks.Append(id);
      continue;
    }
    const BlockId shared{blocks[needs[i].block]};
    std::memcpy(store_.data(taken[i]), store_.data(shared), store_.block_bytes());
    if (copies_codes) codes_to_load_.push_back(id);
    blocks.Replace(needs[i].block, id);
    store_.Release(shared);
    ++runtime_.counters().blocks_copied;
  }
  // Others may have made copies that this sequence was ready for.
  if (reserve_tokens_ > 0) GiveBackExcess();
  return absl::OkStatus();
}

absl::Status BlockTables::TakeBlocks(int64_t own, int64_t count, BlockId* out) {
  int64_t from = own, to = own;  // of out: those that were taken
  absl::Cleanup undo = [&] {
    for (; from < own; ++from) store_.ReleaseToReserve(out[from]);
    for (; from < to; ++from) store_.Release(out[from]);
  };
  if (count > own) VATTN_RETURN_IF_ERROR(runtime_.room().Allocate(owner_, count - own, out + own));
  to = count;
  if (own > 0) VATTN_RETURN_IF_ERROR(store_.AllocateReserved(own, out, tenant_));
  from = 0;
  VATTN_RETURN_IF_ERROR(runtime_.backend().HoldCodes(out, count));
  std::move(undo).Cancel();
  reserved_ -= own;
  return absl::OkStatus();
}

void BlockTables::ClaimLastBlock(Layer& layer) {
  if (!std::exchange(layer.stale_last_block, false)) return;
  const int64_t last = layer.tokens / kBlockTokens;
  for (KvHead& kv_head : layer.kv_heads) {
    if (last >= static_cast<int64_t>(kv_head.blocks.size())) continue;
    runtime_.backend().BumpGeneration(kv_head.blocks[static_cast<size_t>(last)]);
    kv_head.blocks.MarkChanged(last);
  }
}

absl::Status BlockTables::TakeForFile(int64_t count, int64_t beyond, BlockId* out) {
  if (runtime_.backend().copies_codes()) codes_to_load_.reserve(static_cast<size_t>(count));
  VATTN_RETURN_IF_ERROR(ReserveUpTo(count + beyond));
  return TakeBlocks(count, count, out);
}

void BlockTables::AppendFromFile(BlockTable& table, BlockId id) {
  table.Append(static_cast<int32_t>(id));
  runtime_.backend().BumpGeneration(static_cast<int32_t>(id));
  if (runtime_.backend().copies_codes()) codes_to_load_.push_back(static_cast<int32_t>(id));
}

bool BlockTables::ReturnsToReservation(const BlockTable& table, int64_t block) const {
  const BlockId id{table[static_cast<size_t>(block)]};
  return block < BlocksFor(reserve_tokens_) && store_.IsUnique(id) &&
         store_.TenantOf(id) == tenant_;
}

void BlockTables::ReleaseSpare() {
  int64_t released = 0;
  for (Layer& layer : layers_) {
    const size_t keep = static_cast<size_t>(BlocksFor(layer.tokens));
    for (KvHead& kv_head : layer.kv_heads) {
      for (size_t b = keep; b < kv_head.blocks.size(); ++b) {
        ++released;
        if (ReturnsToReservation(kv_head.blocks, static_cast<int64_t>(b))) {
          store_.ReleaseToReserve(BlockId{kv_head.blocks[b]});
          ++reserved_;
        } else {
          store_.Release(BlockId{kv_head.blocks[b]});
        }
      }
      kv_head.blocks.Shorten(keep);
    }
  }
  runtime_.backend().CountReleased(released);
}

void BlockTables::ReleaseAll() {
  int64_t released = 0;
  for (Layer& layer : layers_) {
    for (KvHead& kv_head : layer.kv_heads) {
      for (const int32_t block : kv_head.blocks) store_.Release(BlockId{block});
      released += static_cast<int64_t>(kv_head.blocks.size());
      kv_head.blocks.Clear();
    }
  }
  runtime_.backend().CountReleased(released);
  store_.Unreserve(reserved_, tenant_);
  reserved_ = 0;
}

bool BlockTables::HoldsBlocks() const {
  for (const Layer& layer : layers_) {
    for (const KvHead& kv_head : layer.kv_heads) {
      if (!kv_head.blocks.empty()) return true;
    }
  }
  return false;
}

}  // namespace vattn
