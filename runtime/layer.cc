#include "runtime/layer.h"

#include <algorithm>
#include <utility>

namespace vattn {

void UpdateSegments(Layer& layer) {
  for (KvHead& kv_head : layer.kv_heads) {
    kv_head.tables.resize(layer.segments.size());
    kv_head.segments.resize(layer.segments.size());
    for (size_t k = 0; k < layer.segments.size(); ++k) {
      kv_head.segments[k] = {layer.segments[k].first_block, kv_head.tables[k].index->tables()};
    }
  }
}

SharedLayers::SharedLayers(HostStore& store, const std::vector<Layer>& layers, int64_t most)
    : layers_(layers.size()) {
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer& from = layers[l];
    Layer& to = layers_[l];
    to.tokens = std::min(from.tokens, most);
    to.coded = CodedOf(from, most);
    to.codes_made = std::min(from.codes_made, to.coded);
    to.stale_last_block = to.tokens < from.tokens || from.stale_last_block;
    to.kv_heads.resize(from.kv_heads.size());
    for (size_t g = 0; g < from.kv_heads.size(); ++g) {
      const KvHead& source = from.kv_heads[g];
      KvHead& copy = to.kv_heads[g];
      copy.blocks = BlockTable(source.blocks, BlocksFor(to.tokens));
      copy.tables = source.tables;
      if (source.moment) copy.moment = std::make_unique<QueryMoment>(*source.moment);
      copy.states = source.states;
      copy.recent = source.recent;
    }
    to.segments = SegmentsOf(from.segments, to.coded);
    UpdateSegments(to);
  }
  // Nothing can fail from here on.
  store_ = &store;
  for (const Layer& layer : layers_) {
    for (const KvHead& kv_head : layer.kv_heads) {
      for (const int32_t block : kv_head.blocks) store.AddReference(BlockId{block});
    }
  }
}

SharedLayers::SharedLayers(SharedLayers&& other) noexcept { *this = std::move(other); }

SharedLayers& SharedLayers::operator=(SharedLayers&& other) noexcept {
  std::swap(store_, other.store_);
  layers_.swap(other.layers_);
  return *this;
}

SharedLayers::~SharedLayers() {
  if (store_ == nullptr) return;
  for (const Layer& layer : layers_) {
    for (const KvHead& kv_head : layer.kv_heads) {
      for (const int32_t block : kv_head.blocks) store_->Release(BlockId{block});
    }
  }
}

std::vector<Layer> SharedLayers::Take() && {
  store_ = nullptr;
  return std::move(layers_);
}

}  // namespace vattn
