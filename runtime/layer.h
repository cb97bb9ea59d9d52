// What a sequence holds of one layer, and layers that share the blocks of another's.
#ifndef VATTN_RUNTIME_LAYER_H_
#define VATTN_RUNTIME_LAYER_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "memory/device.h"
#include "memory/host_store.h"
#include "runtime/cpu/hot_set.h"
#include "runtime/index/index.h"

namespace vattn {

// State of one KV head of one layer.
struct HeadGroup {
  std::vector<int32_t> blocks;          // ids by block number
  std::shared_ptr<const Index> index;   // null until the first middle token is coded
  std::unique_ptr<QueryMoment> moment;  // null once the index is frozen
  std::vector<HeadState> states;        // [G]; on CUDA as of the last CudaSequence::Pull
  HotSet hot;

  // On CUDA: block table entries from here on are not on the device yet, and its copy of the index.
  int64_t changed_from = 0;
  int64_t unseen_from = 0;  // entries from here on are not known to the hot set of Sequence::hot_set
  std::shared_ptr<DeviceMemory> device_index;
  IndexTables DeviceTables() const { return index->TablesAt(device_index->as<float>()); }
};

struct Layer {
  int64_t tokens = 0;
  int64_t coded = 0;  // tokens before it have codes; multiple of 64, or 0
  int64_t coded_on_device = 0;  // on CUDA coding is enqueued later: up to here it has been
  bool stale_tail = false;  // the last block may have rows past `tokens`, and a hot set may know them
  std::vector<HeadGroup> groups;  // [kv_heads]
};

inline int64_t BlocksFor(int64_t tokens) { return (tokens + kBlockTokens - 1) / kBlockTokens; }
// What stays coded when so many tokens stay.
inline int64_t CodedOf(const Layer& layer, int64_t tokens) {
  return layer.tokens <= tokens ? layer.coded : std::min(layer.coded, tokens / kCodeTokens * kCodeTokens);
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
