// Saved sequences. Records of the snapshot, in this order:
//   kHead    SavedHead
//   and for each layer, for each of its KV heads:
//   kGroup   SavedGroup, HeadState [G], then index floats or query moment doubles as flagged
//   kBlocks  the blocks in order; bytes that belong to no token are zero
#include <cstring>
#include <span>

#include "memory/checksum.h"
#include "memory/snapshot.h"
#include "memory/status.h"
#include "runtime/batch.h"
#include "runtime/sequence.h"

namespace vattn {
namespace {

enum RecordType : uint32_t { kHead = 1, kGroup = 2, kBlocks = 3 };

struct SavedHead {
  uint64_t id, step;
};

struct SavedGroup {
  int64_t tokens, coded;
  int64_t index_floats;    // 0: no index yet
  int64_t moment_doubles;  // 0: no queries seen, or the index is frozen
};

template <class T>
std::span<const std::byte> BytesOf(const T& value) {
  return std::as_bytes(std::span<const T, 1>(&value, 1));
}

template <class T>
std::span<const std::byte> BytesOf(const std::vector<T>& values) {
  return std::as_bytes(std::span<const T>(values));
}

// Everything that rows, codes and tables depend on.
uint64_t LayoutOf(const Runtime& runtime) {
  const Options& o = runtime.options();
  const Storage& s = runtime.storage();
  std::string text = absl::StrCat("vattn-sequence-1 layers ", o.num_layers, " q_heads ", o.num_q_heads, " k ",
                                  o.head_dim_k, " v ", o.head_dim_v, " dtype ", o.dtype, " shared ", o.shared_kv,
                                  " scale ", o.softmax_scale, " sinks ", o.sinks, " index ", o.index, " code ");
  absl::StrAppend(&text, s.code.dims8, "/", s.code.dims4, "/", s.code.dims2, " values ", s.value_bits, " block ",
                  s.block.bytes, " kv_heads");
  if (s.code.dims1 + s.code.centroids > 0) absl::StrAppend(&text, " signs ", s.code.dims1, " centroids ", s.code.centroids);
  for (const int32_t heads : o.layer_kv_heads) absl::StrAppend(&text, " ", heads);
  return ChecksumOf(std::as_bytes(std::span<const char>(text.data(), text.size())));
}

// The parts of one block that hold tokens, with zeros from `zeros` (a block of them) in between.
void AddBlockParts(const Storage& s, const std::byte* block, const std::byte* zeros, int64_t first_token,
                   int64_t tokens, int64_t coded_from, int64_t coded_to,
                   std::vector<std::span<const std::byte>>& parts) {
  const auto add = [&](int64_t area, int64_t area_end, int64_t unit, int64_t from, int64_t to) {
    const auto clamp = [&](int64_t t) { return std::clamp<int64_t>(t - first_token, 0, kBlockTokens); };
    const int64_t begin = area + clamp(from) * unit, end = std::max(begin, area + clamp(to) * unit);
    parts.push_back({zeros, static_cast<size_t>(begin - area)});
    parts.push_back({block + begin, static_cast<size_t>(end - begin)});
    parts.push_back({zeros, static_cast<size_t>(area_end - end)});
  };
  add(0, s.block.codes, s.row.row_bytes, 0, tokens);
  add(s.block.codes, s.block.value_codes, s.code.bytes(), coded_from, coded_to);
  const int64_t used = s.block.value_codes + int64_t{kBlockTokens} * s.value_code_bytes;
  add(s.block.value_codes, used, s.value_code_bytes, coded_from, coded_to);
  parts.push_back({zeros, static_cast<size_t>(s.block.bytes - used)});
}

absl::StatusOr<std::unique_ptr<SnapshotReader>> OpenSaved(const Runtime& runtime, const std::string& path,
                                                          SavedHead& head) {
  absl::StatusOr<std::unique_ptr<SnapshotReader>> reader = SnapshotReader::Open(path, LayoutOf(runtime));
  if (!reader.ok()) return reader.status();
  if ((*reader)->records().empty() || (*reader)->records()[0].bytes != sizeof(head)) {
    return DataLossError(path, ": has no sequence head");
  }
  VATTN_RETURN_IF_ERROR((*reader)->Read(0, std::as_writable_bytes(std::span<SavedHead, 1>(&head, 1))));
  return reader;
}

}  // namespace

absl::Status Sequence::Save(const std::string& path) {
  // A lost device does not keep the host's copy from being saved, with the state of the last Pull.
  const absl::Status pulled = Pull();
  if (!pulled.ok() && CodeOf(pulled) != Code::kDeviceLost) return pulled;
  const Storage& s = runtime_->storage();
  absl::StatusOr<std::unique_ptr<SnapshotWriter>> writer = SnapshotWriter::Create(path, LayoutOf(*runtime_));
  if (!writer.ok()) return writer.status();
  const SavedHead head{id_, step_};
  VATTN_RETURN_IF_ERROR((*writer)->Add(kHead, BytesOf(head)));
  const std::vector<std::byte> zeros(static_cast<size_t>(s.block.bytes), std::byte{0});
  for (const Layer& layer : layers_) {
    for (const HeadGroup& group : layer.groups) {
      const std::vector<double> moment = group.moment ? group.moment->Save() : std::vector<double>();
      const std::vector<float> index = group.index ? group.index->floats() : std::vector<float>();
      const SavedGroup saved{layer.tokens, layer.coded, static_cast<int64_t>(index.size()),
                             static_cast<int64_t>(moment.size())};
      const std::span<const std::byte> tables[] = {BytesOf(saved), BytesOf(group.states), BytesOf(index),
                                                   BytesOf(moment)};
      VATTN_RETURN_IF_ERROR((*writer)->Add(kGroup, tables));
      std::vector<std::span<const std::byte>> parts;
      for (size_t b = 0; b < group.blocks.size(); ++b) {
        AddBlockParts(s, runtime_->store().data(BlockId{group.blocks[b]}), zeros.data(),
                      static_cast<int64_t>(b) * kBlockTokens, layer.tokens, runtime_->options().sinks, layer.coded,
                      parts);
      }
      VATTN_RETURN_IF_ERROR((*writer)->Add(kBlocks, parts));
    }
  }
  return (*writer)->Commit();
}

absl::Status Sequence::Load(const SnapshotReader& reader, const std::string& path) {
  const Storage& s = runtime_->storage();
  const auto lost = [&](size_t record, const char* what) {
    return DataLossError(path, ": record ", record, " ", what);
  };
  size_t record = 1;
  for (int l = 0; l < static_cast<int>(layers_.size()); ++l) {
    Layer& layer = layers_[l];
    for (HeadGroup& group : layer.groups) {
      if (record + 1 >= reader.records().size()) return lost(record, "is missing");
      std::vector<std::byte> bytes(reader.records()[record].bytes);
      VATTN_RETURN_IF_ERROR(reader.Read(record, bytes));
      SavedGroup saved;
      const size_t states = group.states.size() * sizeof(HeadState);
      if (bytes.size() < sizeof(saved) + states) return lost(record, "is too short");
      std::memcpy(&saved, bytes.data(), sizeof(saved));
      const bool fits = saved.index_floats >= 0 && saved.moment_doubles >= 0 &&
                        (saved.index_floats == 0 || saved.index_floats == Index::NumFloats(s)) &&
                        (saved.moment_doubles == 0 || saved.moment_doubles == int64_t{s.row.dim_k} * s.row.dim_k + 1) &&
                        bytes.size() == sizeof(saved) + states + static_cast<size_t>(saved.index_floats) * 4 +
                                            static_cast<size_t>(saved.moment_doubles) * 8;
      const uint64_t blocks = reader.records()[record + 1].bytes / static_cast<uint64_t>(s.block.bytes);
      if (!fits || saved.tokens < 0 || saved.coded < 0 || saved.coded > saved.tokens ||
          saved.tokens > static_cast<int64_t>(blocks) * kBlockTokens ||
          blocks * static_cast<uint64_t>(s.block.bytes) != reader.records()[record + 1].bytes ||
          (saved.coded > 0 && saved.index_floats == 0 && Index::NumFloats(s) > 0)) {
        return lost(record, "contradicts itself");
      }
      const std::byte* at = bytes.data() + sizeof(saved);
      std::memcpy(group.states.data(), at, states);
      at += states;
      if (saved.index_floats > 0) {
        std::vector<float> floats(static_cast<size_t>(saved.index_floats));
        std::memcpy(floats.data(), at, floats.size() * 4);
        at += floats.size() * 4;
        group.index = Index::FromFloats(s, std::move(floats));
      }
      if (saved.moment_doubles > 0) {
        std::vector<double> doubles(static_cast<size_t>(saved.moment_doubles));
        std::memcpy(doubles.data(), at, doubles.size() * 8);
        group.moment = std::make_unique<QueryMoment>(QueryMoment::Load(s.row.dim_k, doubles));
      }
      std::vector<BlockId> ids(blocks);
      VATTN_RETURN_IF_ERROR(runtime_->Refused(runtime_->store().Allocate(static_cast<int64_t>(blocks), ids.data())));
      std::vector<std::span<std::byte>> parts;
      for (const BlockId id : ids) {
        group.blocks.push_back(static_cast<int32_t>(id));
        if (runtime_->cuda() != nullptr) {
          runtime_->cuda()->Renew(static_cast<int32_t>(id));
          codes_to_load_.push_back(static_cast<int32_t>(id));
        }
        parts.push_back({runtime_->store().data(id), static_cast<size_t>(s.block.bytes)});
      }
      VATTN_RETURN_IF_ERROR(reader.Read(record + 1, parts));
      if (&group == &layer.groups[0]) {
        AddTokens(l, saved.tokens);
        layer.coded = layer.coded_on_device = saved.coded;
      } else if (layer.tokens != saved.tokens || layer.coded != saved.coded) {
        return lost(record, "disagrees with its layer");
      }
      record += 2;
    }
  }
  if (record != reader.records().size()) return lost(record, "is one too many");
  CountTables();
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Sequence>> Sequence::Restore(std::shared_ptr<Runtime> runtime,
                                                            const std::string& path) {
  SavedHead head;
  absl::StatusOr<std::unique_ptr<SnapshotReader>> reader = OpenSaved(*runtime, path, head);
  if (!reader.ok()) return reader.status();
  std::unique_ptr<Sequence> sequence(new Sequence(std::move(runtime), head.id));
  sequence->step_ = head.step;
  VATTN_RETURN_IF_ERROR(sequence->Load(**reader, path));
  return sequence;
}

absl::Status Sequence::Hibernate(const std::string& path) {
  if (hibernated()) return InvalidArgumentError("sequence hibernates already, must be awake");
  if (batch != nullptr) return InvalidArgumentError("sequence sits in slot ", slot, " of a batch, must be taken out first");
  VATTN_RETURN_IF_ERROR(Save(path));
  ReleaseBlocks();
  cuda_.reset();
  codes_to_load_.clear();
  for (Layer& layer : layers_) {
    layer.coded = layer.coded_on_device = 0;
    for (HeadGroup& group : layer.groups) {
      group.index.reset();
      group.device_index.reset();
      group.moment.reset();
      group.hot = HotSet();
    }
  }
  hibernate_path_ = path;
  CountTables();
  return absl::OkStatus();
}

absl::Status Sequence::Wake() {
  if (!hibernated()) return absl::OkStatus();
  SavedHead head;
  absl::StatusOr<std::unique_ptr<SnapshotReader>> reader = OpenSaved(*runtime_, hibernate_path_, head);
  if (!reader.ok()) return reader.status();
  if (head.id != id_ || head.step != step_) {
    return DataLossError(hibernate_path_, ": holds sequence ", head.id, " at step ", head.step,
                         ", must hold sequence ", id_, " at step ", step_);
  }
  const absl::Status status = Load(**reader, hibernate_path_);
  if (!status.ok()) {
    ReleaseBlocks();
    for (Layer& layer : layers_) {
      layer.coded = 0;
      for (HeadGroup& group : layer.groups) group.index.reset(), group.moment.reset();
    }
    return status;
  }
  hibernate_path_.clear();
  return absl::OkStatus();
}

}  // namespace vattn
