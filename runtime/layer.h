// What a sequence holds of one layer, and layers that share the blocks of another's.
#ifndef VATTN_RUNTIME_LAYER_H_
#define VATTN_RUNTIME_LAYER_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/geometry.h"
#include "memory/device.h"
#include "memory/host_store.h"
#include "runtime/block_table.h"
#include "runtime/cpu/hot_set.h"
#include "runtime/index/index.h"
#include "runtime/index/recent_queries.h"
#include "runtime/index/segments.h"

namespace vattn {

// More tokens than a sequence has.
inline constexpr int64_t kAllTokens = int64_t{1} << 31;

// Tables of one segment of one KV head's index, shared by forks.
struct SegmentTables {
  std::shared_ptr<const Index> index;
  std::shared_ptr<DeviceMemory> on_device;  // on CUDA, once sent
  IndexTables DeviceTables() const { return index->TablesAt(on_device->as<float>()); }
};

// State of one KV head of one layer.
struct KvHead {
  BlockTable blocks;
  std::vector<SegmentTables> tables;    // [segments of the layer]
  std::vector<IndexSegment> segments;   // the same as kernels see them, on the CPU
  std::unique_ptr<QueryMoment> moment;  // of the queries so far; null without any
  // Of the last steps, not in the moment yet; on CUDA the device has them
  RecentQueries recent;
  std::vector<HeadState> states;  // [G]; on CUDA as of the last ReadBackState
  HotSet hot;
};

struct Layer {
  int64_t tokens = 0;      // counted in, not those of an open step that has yet to attend
  int64_t coded = 0;       // tokens before it have tables and codes; multiple of 64, or 0
  int64_t codes_made = 0;  // of those, codes are there; on CUDA making them is enqueued later
  // The last block may have rows past `tokens`, and a hot set may know them.
  bool stale_last_block = false;
  std::vector<Segment> segments;  // of the index: none until the first middle token is coded
  std::vector<KvHead> kv_heads;   // [kv_heads]
};
// After a change of layer.segments or of the tables of a KV head: those of segments that are no
// more go, and what kernels see is brought up to date.
void UpdateSegments(Layer& layer);

// f(segment, begin, end) for the parts of tokens [begin, end) that lie in one segment each.
template <class F>
void ForSegments(const Layer& layer, int64_t begin, int64_t end, F&& f) {
  for (size_t k = 0; k < layer.segments.size(); ++k) {
    const int64_t from = std::max(begin, layer.segments[k].first_block * kBlockTokens);
    const bool last = k + 1 == layer.segments.size();
    const int64_t to = last ? end : std::min(end, layer.segments[k + 1].first_block * kBlockTokens);
    if (to > from) f(k, from, to);
  }
}

// How many tokens stay coded when the first `tokens` tokens stay.
inline int64_t CodedOf(const Layer& layer, int64_t tokens) {
  return layer.tokens <= tokens ? layer.coded
                                : std::min(layer.coded, tokens / kCodeTokens * kCodeTokens);
}

// Layers that hold references to another's blocks, and give them back.
class SharedLayers {
 public:
  SharedLayers() = default;
  // The first `most` tokens of each layer, with index and controller states, without a hot set.
  SharedLayers(HostStore& store, const std::vector<Layer>& layers, int64_t most);
  SharedLayers(SharedLayers&& other) noexcept;
  SharedLayers& operator=(SharedLayers&& other) noexcept;
  ~SharedLayers();

  const std::vector<Layer>& layers() const { return layers_; }
  // The references are the caller's.
  std::vector<Layer> Take() &&;

 private:
  HostStore* store_ = nullptr;
  std::vector<Layer> layers_;
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_LAYER_H_
