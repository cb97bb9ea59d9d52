#include "runtime/cuda/sequence.h"

#include <algorithm>

#include "kernels/cpu/rows.h"
#include "memory/status.h"
#include "runtime/sequence.h"

namespace vattn {
namespace {

constexpr int64_t kLeastTableBlocks = 64;
constexpr int64_t kDenseChange = 1024;  // changed entries from which a whole table is sent

}  // namespace

absl::StatusOr<std::unique_ptr<CudaSequence>> CudaSequence::Create(CudaBackend& backend,
                                                                   const Sequence& sequence) {
  std::unique_ptr<CudaSequence> made(new CudaSequence(backend));
  Device& d = backend.device();
  const Runtime& runtime = sequence.runtime();
  const int layers = runtime.options().num_layers;
  int64_t states = 0;
  for (int l = 0; l < layers; ++l) {
    made->first_.push_back(made->groups_);
    made->states_before_.push_back(states);
    const int heads = runtime.kv_heads(l);
    made->group_heads_.push_back(heads == 0 ? 0 : runtime.group_heads(l));
    made->groups_ += heads;
    states += int64_t{heads} * made->group_heads_.back();
  }
  const cuda::DeviceStorage& s = backend.storage();
  absl::StatusOr<DeviceMemory> memory =
      d.Allocate(static_cast<uint64_t>(states) * sizeof(HeadState));
  if (!memory.ok()) return memory.status();
  made->states_ = *std::move(memory);
  memory = d.Allocate(static_cast<uint64_t>(made->groups_) * (s.sinks + s.ring_tokens) *
                      static_cast<uint64_t>(s.host.row.row_bytes));
  if (!memory.ok()) return memory.status();
  made->fixed_ = *std::move(memory);
  memory = d.Allocate(static_cast<uint64_t>(made->groups_) * kMaxSegments * sizeof(IndexSegment));
  if (!memory.ok()) return memory.status();
  made->segments_ = *std::move(memory);
  made->segments_sent_.resize(static_cast<size_t>(made->groups_));
  made->read_step_ = made->passed_step_ = sequence.step();
  if (s.host.code.kind == IndexKind::kBalanced) {
    const uint64_t bytes =
        static_cast<uint64_t>(states) * kRecentQueries * static_cast<uint64_t>(made->query_bytes());
    memory = d.Allocate(bytes);
    if (!memory.ok()) return memory.status();
    made->recent_ = *std::move(memory);
    // Of a step that was opened and never attended, zeros are read.
    VATTN_RETURN_IF_ERROR(d.Fill(made->recent_.data(), 0, bytes, d.stream()));
  }
  std::vector<HeadState> host;
  for (int l = 0; l < layers; ++l) {
    for (const KvHead& kv_head : sequence.layer(l).kv_heads) {
      host.insert(host.end(), kv_head.states.begin(), kv_head.states.end());
    }
  }
  VATTN_RETURN_IF_ERROR(
      d.Copy(made->states_.data(), host.data(), host.size() * sizeof(HeadState), d.stream()));
  VATTN_RETURN_IF_ERROR(d.Synchronize(d.stream()));
  return made;
}

const int32_t* CudaSequence::blocks(int layer, int head) const {
  return tables_.as<int32_t>() + (first_[layer] + head) * table_blocks_;
}

HeadState* CudaSequence::state(int layer, int head) const {
  return states_.as<HeadState>() + states_before_[layer] + int64_t{head} * group_heads_[layer];
}

const IndexSegment* CudaSequence::segments(int layer, int head) const {
  return segments_.as<IndexSegment>() + (first_[layer] + head) * int64_t{kMaxSegments};
}

int64_t CudaSequence::query_bytes() const {
  const RowLayout& row = backend_.storage().host.row;
  return int64_t{row.dim_k} * ElementBytes(row.dtype);
}

std::byte* CudaSequence::recent(int layer, int head, uint64_t step) const {
  const int place = RecentPlace(step);
  if (place < 0 || recent_.size() == 0) return nullptr;
  const int64_t heads = group_heads_[layer];
  return recent_.data() +
         ((states_before_[layer] + head * heads) * kRecentQueries + place * heads) * query_bytes();
}

std::byte* CudaSequence::fixed(int layer, int head) const {
  const cuda::DeviceStorage& s = backend_.storage();
  return fixed_.data() +
         (first_[layer] + head) * int64_t{s.sinks + s.ring_tokens} * s.host.row.row_bytes;
}

template <class T>
absl::StatusOr<const T*> CudaSequence::Send(const std::vector<T>& items, DeviceStream stream) {
  const uint64_t bytes = items.size() * sizeof(T);
  if (bytes > items_.size()) {
    absl::StatusOr<DeviceMemory> memory =
        backend_.device().Allocate(std::max<uint64_t>(2 * bytes, 4096));
    if (!memory.ok()) return memory.status();
    items_ = *std::move(memory);
  }
  VATTN_RETURN_IF_ERROR(backend_.device().Copy(items_.data(), items.data(), bytes, stream));
  return items_.as<const T>();
}

absl::Status CudaSequence::SendTables(Sequence& sequence, DeviceStream stream) {
  Device& d = backend_.device();
  int64_t most = 0, changed = 0;
  for (int l = 0; l < static_cast<int>(first_.size()); ++l) {
    for (const KvHead& kv_head : sequence.layer(l).kv_heads) {
      const int64_t size = static_cast<int64_t>(kv_head.blocks.size());
      most = std::max(most, size);
      changed += std::max<int64_t>(0, size - kv_head.blocks.unsent_from());
    }
  }
  const bool grow = most > table_blocks_;
  if (grow) {
    const int64_t room = std::max(kLeastTableBlocks, 2 * most);
    absl::StatusOr<DeviceMemory> memory =
        d.Allocate(static_cast<uint64_t>(groups_) * static_cast<uint64_t>(room) * sizeof(int32_t));
    if (!memory.ok()) return memory.status();
    tables_ = *std::move(memory);
    table_blocks_ = room;
  }
  std::vector<cuda::Patch> patches;
  for (int l = 0; l < static_cast<int>(first_.size()); ++l) {
    for (int h = 0; h < static_cast<int>(sequence.layer(l).kv_heads.size()); ++h) {
      KvHead& kv_head = sequence.layer(l).kv_heads[h];
      const int64_t size = static_cast<int64_t>(kv_head.blocks.size()),
                    from = grow ? 0 : kv_head.blocks.unsent_from();
      int32_t* table = const_cast<int32_t*>(blocks(l, h));
      if (grow || changed > kDenseChange) {
        if (size > from) {
          VATTN_RETURN_IF_ERROR(d.Copy(table + from, kv_head.blocks.data() + from,
                                       static_cast<uint64_t>(size - from) * sizeof(int32_t),
                                       stream));
        }
      } else {
        for (int64_t b = from; b < size; ++b) patches.push_back({table + b, kv_head.blocks[b]});
      }
      kv_head.blocks.MarkSent();
    }
  }
  if (patches.empty()) return absl::OkStatus();
  absl::StatusOr<const cuda::Patch*> sent = Send(patches, stream);
  if (!sent.ok()) return sent.status();
  return d.Check(cuda::ApplyPatches(*sent, static_cast<int64_t>(patches.size()), {stream}),
                 "updating block tables");
}

absl::Status CudaSequence::SendIndices(Sequence& sequence, DeviceStream stream) {
  Device& d = backend_.device();
  std::vector<IndexSegment> segments;
  for (int l = 0; l < static_cast<int>(first_.size()); ++l) {
    const Layer& layer = sequence.layer(l);
    for (size_t h = 0; h < layer.kv_heads.size(); ++h) {
      KvHead& kv_head = sequence.layer(l).kv_heads[h];
      bool changed = !segments_sent_[first_[l] + h];
      segments.clear();
      for (size_t k = 0; k < kv_head.tables.size(); ++k) {
        SegmentTables& tables = kv_head.tables[k];
        if (!tables.on_device) {
          const uint64_t bytes = static_cast<uint64_t>(tables.index->bytes());
          absl::StatusOr<DeviceMemory> memory = d.Allocate(bytes);
          if (!memory.ok()) return memory.status();
          VATTN_RETURN_IF_ERROR(
              d.Copy(memory->data(), tables.index->floats().data(), bytes, stream));
          tables.on_device = std::make_shared<DeviceMemory>(*std::move(memory));
          changed = true;
        }
        segments.push_back({layer.segments[k].first_block, tables.DeviceTables()});
      }
      if (!changed || segments.empty()) continue;
      VATTN_RETURN_IF_ERROR(
          d.Copy(const_cast<IndexSegment*>(this->segments(l, static_cast<int>(h))), segments.data(),
                 segments.size() * sizeof(IndexSegment), stream));
      segments_sent_[first_[l] + h] = true;
    }
  }
  return absl::OkStatus();
}

absl::Status CudaSequence::LoadCodes(Sequence& sequence, DeviceStream stream) {
  std::vector<int32_t>& load = sequence.blocks().codes_to_load();
  if (load.empty()) return absl::OkStatus();
  std::vector<int32_t> held;
  for (int l = 0; l < static_cast<int>(first_.size()); ++l) {
    for (const KvHead& kv_head : sequence.layer(l).kv_heads) {
      held.insert(held.end(), kv_head.blocks.begin(), kv_head.blocks.end());
    }
  }
  std::sort(held.begin(), held.end());
  std::erase_if(load,
                [&](int32_t id) { return !std::binary_search(held.begin(), held.end(), id); });
  absl::StatusOr<const int32_t*> sent = Send(load, stream);
  if (!sent.ok()) return sent.status();
  VATTN_RETURN_IF_ERROR(backend_.device().Check(
      cuda::LoadCodes(backend_.storage(), *sent, static_cast<int64_t>(load.size()), {stream}),
      "loading codes"));
  load.clear();
  return absl::OkStatus();
}

absl::Status CudaSequence::SendChanges(Sequence& sequence, DeviceStream stream) {
  Device& d = backend_.device();
  const cuda::DeviceStorage& s = backend_.storage();
  // What an earlier stream does with the tables and with what was sent is not ordered before this
  // one.
  if (busy_ && stream != stream_) VATTN_RETURN_IF_ERROR(d.SynchronizeAll());
  stream_ = stream;
  busy_ = true;  // from the first call on, also if a later one fails
  VATTN_RETURN_IF_ERROR(SendTables(sequence, stream));
  VATTN_RETURN_IF_ERROR(SendIndices(sequence, stream));
  VATTN_RETURN_IF_ERROR(LoadCodes(sequence, stream));
  std::vector<cuda::EncodeItem> encode;
  std::vector<cuda::FixedItem> fixed;
  int64_t most = 0;
  for (int l = 0; l < static_cast<int>(first_.size()); ++l) {
    Layer& layer = sequence.layer(l);
    const int64_t begin = std::max<int64_t>(layer.codes_made, s.sinks);
    for (int h = 0; h < static_cast<int>(layer.kv_heads.size()); ++h) {
      ForSegments(layer, begin, layer.coded, [&](size_t k, int64_t from, int64_t to) {
        encode.push_back({blocks(l, h), layer.kv_heads[h].tables[k].DeviceTables(), from, to,
                          &backend_.counters()->outliers});
        most = std::max(most, to - from);
      });
      if (!fixed_loaded_ && layer.tokens > 0)
        fixed.push_back({blocks(l, h), this->fixed(l, h), layer.tokens});
    }
    layer.codes_made = layer.coded;
  }
  if (!encode.empty()) {
    absl::StatusOr<const cuda::EncodeItem*> sent = Send(encode, stream);
    if (!sent.ok()) return sent.status();
    VATTN_RETURN_IF_ERROR(d.Check(
        cuda::Encode(s, *sent, static_cast<int>(encode.size()), most, {stream}), "coding keys"));
  }
  if (!fixed.empty()) {
    absl::StatusOr<const cuda::FixedItem*> sent = Send(fixed, stream);
    if (!sent.ok()) return sent.status();
    VATTN_RETURN_IF_ERROR(
        d.Check(cuda::LoadFixed(s, *sent, static_cast<int>(fixed.size()), {stream}),
                "loading sinks and window"));
  }
  fixed_loaded_ = true;
  return absl::OkStatus();
}

absl::Status CudaSequence::ReadBackState(Sequence& sequence, bool in_step) {
  if (!busy_) return absl::OkStatus();
  Device& d = backend_.device();
  VATTN_RETURN_IF_ERROR(d.Activate());
  VATTN_RETURN_IF_ERROR(d.SynchronizeAll());
  std::vector<HeadState> host(states_.size() / sizeof(HeadState));
  VATTN_RETURN_IF_ERROR(
      d.Copy(host.data(), states_.data(), host.size() * sizeof(HeadState), d.stream()));
  VATTN_RETURN_IF_ERROR(d.Synchronize(d.stream()));
  size_t at = 0;
  for (int l = 0; l < static_cast<int>(first_.size()); ++l) {
    for (KvHead& kv_head : sequence.layer(l).kv_heads) {
      std::copy_n(host.begin() + static_cast<int64_t>(at), kv_head.states.size(),
                  kv_head.states.begin());
      at += kv_head.states.size();
    }
  }
  passed_step_ = sequence.step() - (in_step ? 1 : 0);
  busy_ = in_step;
  return absl::OkStatus();
}

absl::Status CudaSequence::ReadBackQueries(Sequence& sequence) {
  std::vector<uint64_t> steps;  // whose queries were kept
  for (uint64_t step = read_step_ + 1; step <= passed_step_; ++step) {
    if (RecentPlace(step) >= 0) steps.push_back(step);
  }
  if (recent_.size() == 0 || steps.empty()) return absl::OkStatus();
  Device& d = backend_.device();
  const Storage& s = backend_.storage().host;
  std::vector<std::byte> ring(recent_.size());
  VATTN_RETURN_IF_ERROR(d.Activate());
  VATTN_RETURN_IF_ERROR(d.Copy(ring.data(), recent_.data(), ring.size(), d.stream()));
  VATTN_RETURN_IF_ERROR(d.Synchronize(d.stream()));
  std::vector<float> queries;
  for (int l = 0; l < static_cast<int>(first_.size()); ++l) {
    const int64_t count = int64_t{group_heads_[l]} * s.row.dim_k;
    queries.resize(static_cast<size_t>(count));
    for (int h = 0; h < static_cast<int>(sequence.layer(l).kv_heads.size()); ++h) {
      RecentQueries& to = sequence.layer(l).kv_heads[h].recent;
      for (size_t i = 0; i < steps.size(); ++i) {
        if (i + kRecentQueries < steps.size()) {
          to.Add(nullptr, 0);  // later ones have taken its place: it counts alone
          continue;
        }
        const uint8_t* row = reinterpret_cast<const uint8_t*>(
            ring.data() + (recent(l, h, steps[i]) - recent_.data()));
        cpu::LoadRows({.rows = &row,
                       .count = 1,
                       .offset = 0,
                       .dim = static_cast<int>(count),
                       .dtype = s.row.dtype},
                      queries.data());
        for (float& x : queries) x *= s.scale;
        to.Add(queries.data(), count);
      }
    }
  }
  read_step_ = passed_step_;
  return absl::OkStatus();
}

}  // namespace vattn
