// Blocks of a sequence: what it takes from the pool, shares, has reserved, and gives back.
//
// A reservation is for a number of tokens in every layer. As long as it is kept, the pool holds a
// block ready for each block number below it that the sequence has not yet, or that it has, shares,
// and may have to copy: Unmet. What the sequence takes there it draws from its reservation, and
// what it gives back there returns to it.
#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "memory/status.h"
#include "runtime/batch.h"
#include "runtime/sequence.h"

namespace vattn {

int64_t Sequence::Unmet(int64_t reserve_tokens, int64_t keep_tokens, int64_t shared_tokens) const {
  const HostStore& store = runtime_->store();
  const int64_t reserved = BlocksFor(reserve_tokens), shared = BlocksFor(shared_tokens);
  int64_t blocks = 0;
  for (const Layer& layer : layers_) {
    const int64_t tokens = std::min(layer.tokens, keep_tokens);
    // Rows are written behind the tokens, codes behind those that are coded.
    const int64_t write_from = std::max<int64_t>(CodedOf(layer, tokens), runtime_->options().sinks);
    const int64_t first = std::min(write_from, tokens) / kBlockTokens;
    for (const KvHead& kv_head : layer.kv_heads) {
      const int64_t size = static_cast<int64_t>(kv_head.blocks.size());
      const int64_t have = layer.tokens <= keep_tokens ? size : BlocksFor(tokens);
      blocks += std::max<int64_t>(0, reserved - have);
      for (int64_t b = first; b < std::min(have, reserved); ++b) {
        if (b < shared || !store.IsUnique(BlockId{kv_head.blocks[b]})) ++blocks;
      }
    }
  }
  return blocks;
}

absl::Status Sequence::Reserve(int64_t tokens) {
  VATTN_RETURN_IF_ERROR(ReserveUpTo(Unmet(tokens, kAllTokens, 0)));
  reserve_tokens_ = tokens;
  Settle();
  return absl::OkStatus();
}

absl::Status Sequence::ReserveUpTo(int64_t blocks) {
  if (blocks <= reserved_) return absl::OkStatus();
  VATTN_RETURN_IF_ERROR(runtime_->Reserve(*this, blocks - reserved_));
  reserved_ = blocks;
  return absl::OkStatus();
}

void Sequence::Settle() {
  const int64_t unmet = reserve_tokens_ == 0 ? 0 : Unmet(reserve_tokens_, kAllTokens, 0);
  if (reserved_ <= unmet) return;
  runtime_->store().Unreserve(reserved_ - unmet, tenant_.slot());
  reserved_ = unmet;
}

absl::StatusOr<SharedLayers> Sequence::Share(int64_t tokens) {
  VATTN_RETURN_IF_ERROR(CheckWhole());
  VATTN_RETURN_IF_ERROR(Pull());
  if (cuda_) VATTN_RETURN_IF_ERROR(cuda_->ReadQueries(*this));
  // What was the sequence's own is to be copied before it is written again.
  if (reserve_tokens_ > 0)
    VATTN_RETURN_IF_ERROR(ReserveUpTo(Unmet(reserve_tokens_, kAllTokens, tokens)));
  const absl::Cleanup settle = [this] { Settle(); };
  return SharedLayers(runtime_->store(), layers_, tokens);
}

void Sequence::Adopt(SharedLayers layers) {
  layers_ = std::move(layers).Take();
  for (int l = 0; l < static_cast<int>(layers_.size()); ++l) CountTokens(l, layers_[l].tokens);
  CountTables();
}

void Sequence::ListNeeds(int l, int64_t begin, int64_t end, std::vector<Need>& needs) const {
  for (int g = 0; g < static_cast<int>(layers_[l].kv_heads.size()); ++g) {
    const std::vector<int32_t>& blocks = layers_[l].kv_heads[g].blocks;
    const int64_t have = static_cast<int64_t>(blocks.size());
    for (int64_t b = begin / kBlockTokens; b < BlocksFor(end); ++b) {
      const bool copy = b < have;
      if (copy && runtime_->store().IsUnique(BlockId{blocks[b]})) continue;
      needs.push_back({l, g, b, copy});
    }
  }
}

absl::Status Sequence::Meet(const std::vector<Need>& needs) {
  if (needs.empty()) return absl::OkStatus();
  HostStore& store = runtime_->store();
  const int64_t promised = BlocksFor(reserve_tokens_), count = static_cast<int64_t>(needs.size());
  // Whatever may fail comes before the first block is taken.
  std::vector<BlockId> taken(needs.size());
  bool copies = false;
  int64_t own = 0;
  // The most blocks of a group first
  for (auto need = needs.rbegin(); need != needs.rend(); ++need) {
    std::vector<int32_t>& blocks = layers_[need->layer].kv_heads[need->kv_head].blocks;
    const size_t room = static_cast<size_t>(need->block) + 1;
    if (blocks.capacity() < room) blocks.reserve(std::max(room, blocks.capacity() * 3 / 2));
    copies |= need->copy;
    own += need->block < promised;
  }
  if (runtime_->cuda() != nullptr) codes_to_load_.reserve(codes_to_load_.size() + needs.size());
  if (copies) VATTN_RETURN_IF_ERROR(Pull());  // a step may still read the blocks that are let go
  VATTN_RETURN_IF_ERROR(TakeBlocks(own, count, taken.data()));
  for (size_t i = 0; i < needs.size(); ++i) {
    KvHead& kv_head = layers_[needs[i].layer].kv_heads[needs[i].kv_head];
    std::vector<int32_t>& blocks = kv_head.blocks;
    const int32_t id = static_cast<int32_t>(taken[i]);
    kv_head.changed_from = std::min(kv_head.changed_from, needs[i].block);
    kv_head.unseen_from = std::min(kv_head.unseen_from, needs[i].block);
    if (runtime_->cuda() != nullptr) runtime_->cuda()->Renew(id);
    if (!needs[i].copy) {
      blocks.push_back(id);
      continue;
    }
    const BlockId shared{blocks[needs[i].block]};
    std::memcpy(store.data(taken[i]), store.data(shared), store.block_bytes());
    if (runtime_->cuda() != nullptr) codes_to_load_.push_back(id);
    blocks[needs[i].block] = id;
    store.Release(shared);
    ++runtime_->counters().blocks_copied;
  }
  // Others may have made copies that this sequence was ready for
  if (reserve_tokens_ > 0) Settle();
  return absl::OkStatus();
}

absl::Status Sequence::TakeBlocks(int64_t own, int64_t count, BlockId* out) {
  HostStore& store = runtime_->store();
  int64_t from = own, to = own;  // of out: those that were taken
  absl::Cleanup undo = [&] {
    for (; from < own; ++from) store.ReleaseToReserve(out[from]);
    for (; from < to; ++from) store.Release(out[from]);
  };
  if (count > own) VATTN_RETURN_IF_ERROR(runtime_->Allocate(*this, count - own, out + own));
  to = count;
  if (own > 0) VATTN_RETURN_IF_ERROR(store.AllocateReserved(own, out, tenant_.slot()));
  from = 0;
  if (runtime_->cuda() != nullptr) VATTN_RETURN_IF_ERROR(runtime_->cuda()->HoldCodes(out, count));
  std::move(undo).Cancel();
  reserved_ -= own;
  return absl::OkStatus();
}

void Sequence::ClaimTail(Layer& layer) {
  // The tail is the sequence's own by now. Its rows to come are not those that a hot set may know.
  if (!std::exchange(layer.stale_tail, false) || runtime_->cuda() == nullptr) return;
  const int64_t tail = layer.tokens / kBlockTokens;
  for (KvHead& kv_head : layer.kv_heads) {
    if (tail >= static_cast<int64_t>(kv_head.blocks.size())) continue;
    runtime_->cuda()->Renew(kv_head.blocks[static_cast<size_t>(tail)]);
    kv_head.changed_from = std::min(kv_head.changed_from, tail);
    kv_head.unseen_from = std::min(kv_head.unseen_from, tail);
  }
}

absl::Status Sequence::Truncate(int64_t tokens) {
  if (Batch* const sits_in = batch.load()) VATTN_RETURN_IF_ERROR(sits_in->EndStep());
  VATTN_RETURN_IF_ERROR(Pull());
  if (reserve_tokens_ > 0) {
    // Blocks that others hold too do not return to the reservation.
    int64_t returned = 0;
    for (const Layer& layer : layers_) {
      const int64_t keep = BlocksFor(std::min(layer.tokens, tokens));
      for (const KvHead& kv_head : layer.kv_heads) {
        for (int64_t b = keep; b < static_cast<int64_t>(kv_head.blocks.size()); ++b)
          returned += Returns(kv_head, b);
      }
    }
    VATTN_RETURN_IF_ERROR(ReserveUpTo(Unmet(reserve_tokens_, tokens, 0) - returned));
  }
  CutTo(tokens);
  return absl::OkStatus();
}

void Sequence::CutTo(int64_t tokens) {
  if (cuda_) cuda_->ForgetFixed();
  for (int l = 0; l < static_cast<int>(layers_.size()); ++l) {
    Layer& layer = layers_[l];
    if (layer.tokens <= tokens) continue;
    layer.coded = CodedOf(layer, tokens);
    layer.coded_on_device = std::min(layer.coded_on_device, layer.coded);
    TrimSegments(layer.coded, layer.segments);  // without an allocation that could fail
    UpdateSegments(layer);
    AddTokens(l, tokens - layer.tokens);
    layer.stale_tail = true;
    for (KvHead& kv_head : layer.kv_heads) {
      kv_head.hot.Truncate(tokens);
      kv_head.changed_from = std::min(kv_head.changed_from, tokens / kBlockTokens);
      kv_head.unseen_from = std::min(kv_head.unseen_from, tokens / kBlockTokens);
    }
  }
  ReleaseSpare();
  Settle();
  CountTables();
}

bool Sequence::Returns(const KvHead& kv_head, int64_t block) const {
  const HostStore& store = runtime_->store();
  const BlockId id{kv_head.blocks[static_cast<size_t>(block)]};
  return block < BlocksFor(reserve_tokens_) && store.IsUnique(id) &&
         store.TenantOf(id) == tenant_.slot();
}

void Sequence::ReleaseSpare() {
  int64_t released = 0;
  for (Layer& layer : layers_) {
    const size_t keep = static_cast<size_t>(BlocksFor(layer.tokens));
    for (KvHead& kv_head : layer.kv_heads) {
      for (size_t b = keep; b < kv_head.blocks.size(); ++b) {
        ++released;
        if (Returns(kv_head, static_cast<int64_t>(b))) {
          runtime_->store().ReleaseToReserve(BlockId{kv_head.blocks[b]});
          ++reserved_;
        } else {
          runtime_->store().Release(BlockId{kv_head.blocks[b]});
        }
      }
      kv_head.blocks.resize(std::min(keep, kv_head.blocks.size()));
    }
  }
  if (runtime_->cuda() != nullptr) runtime_->cuda()->LetGo(released);
}

void Sequence::ReleaseBlocks() {
  int64_t released = 0;
  for (int l = 0; l < static_cast<int>(layers_.size()); ++l) {
    AddTokens(l, -layers_[l].tokens);
    for (KvHead& kv_head : layers_[l].kv_heads) {
      for (const int32_t block : kv_head.blocks) runtime_->store().Release(BlockId{block});
      released += static_cast<int64_t>(kv_head.blocks.size());
      kv_head.blocks.clear();
      kv_head.unseen_from = 0;
    }
  }
  if (runtime_->cuda() != nullptr) runtime_->cuda()->LetGo(released);
  runtime_->store().Unreserve(reserved_, tenant_.slot());
  reserved_ = 0;
}

}  // namespace vattn
