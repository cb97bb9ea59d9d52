#include "runtime/files/restore.h"

#include <algorithm>
#include <cstring>
#include <span>
#include <utility>

#include "memory/status.h"

namespace vattn {
namespace {

// A kKvHead record taken apart.
struct LoadedKvHead {
  SavedKvHead saved;
  std::vector<HeadState> states;
  std::vector<SavedSegment> segments;
  std::vector<std::vector<float>> floats;  // of each segment
  std::vector<double> doubles;
  std::vector<SegmentTables> tables;    // of floats
  std::unique_ptr<QueryMoment> moment;  // of doubles, null without
};

// Segments begin with the first block and lie one behind the other within what is coded; the last
// may be provisional.
bool AreSegments(const std::vector<SavedSegment>& segments, const SavedKvHead& saved) {
  int64_t least = 0;
  for (size_t k = 0; k < segments.size(); ++k) {
    const SavedSegment& segment = segments[k];
    const bool begins = k == 0 ? segment.first_block == 0 : segment.first_block >= least;
    if (!begins || segment.first_block > saved.coded / kBlockTokens || segment.made_from < 0 ||
        segment.made_from > saved.coded ||
        segment.provisional != (segment.provisional == 1 && k + 1 == segments.size())) {
      return false;
    }
    least = segment.first_block + 1;
  }
  return true;
}

// False if the record contradicts itself or the layout.
bool Parse(const std::vector<std::byte>& bytes, const Storage& s, LoadedKvHead& loaded) {
  SavedKvHead& saved = loaded.saved;
  const size_t states = loaded.states.size() * sizeof(HeadState);
  if (bytes.size() < sizeof(saved) + states) return false;
  std::memcpy(&saved, bytes.data(), sizeof(saved));
  const bool fits =
      saved.segments >= 0 && saved.segments <= kMaxSegments &&
      (saved.moment_doubles == 0 || saved.moment_doubles == int64_t{s.row.dim_k} * s.row.dim_k + 1);
  if (!fits || saved.tokens < 0 || saved.tokens > kAllTokens || saved.coded < 0 ||
      saved.coded > saved.tokens || (saved.coded > 0 && saved.segments == 0)) {
    return false;
  }
  loaded.segments.resize(static_cast<size_t>(saved.segments));
  loaded.floats.assign(loaded.segments.size(),
                       std::vector<float>(static_cast<size_t>(Index::NumFloats(s))));
  loaded.doubles.resize(static_cast<size_t>(saved.moment_doubles));
  const std::byte* at = bytes.data() + sizeof(saved);
  const auto take = [&](auto& values) {
    if (!values.empty()) std::memcpy(values.data(), at, values.size() * sizeof(values[0]));
    at += values.size() * sizeof(values[0]);
  };
  const size_t per_segment =
      sizeof(SavedSegment) + static_cast<size_t>(Index::NumFloats(s)) * sizeof(float);
  if (bytes.size() !=
      sizeof(saved) + states + loaded.segments.size() * per_segment + loaded.doubles.size() * 8)
    return false;
  take(loaded.states);
  take(loaded.segments);
  for (std::vector<float>& floats : loaded.floats) take(floats);
  take(loaded.doubles);
  return AreSegments(loaded.segments, saved);
}

// True if two KV heads of a layer say the same of what is the layer's.
bool AgreeOnLayer(const LoadedKvHead& a, const LoadedKvHead& b) {
  const auto same = [](const SavedSegment& x, const SavedSegment& y) {
    return x.first_block == y.first_block && x.made_from == y.made_from &&
           x.provisional == y.provisional;
  };
  return a.saved.tokens == b.saved.tokens && a.saved.coded == b.saved.coded &&
         std::equal(a.segments.begin(), a.segments.end(), b.segments.begin(), b.segments.end(),
                    same);
}

// One reading, by the steps of ReadSequence.
class Restoring {
 public:
  Restoring(Runtime& runtime, SnapshotReader& reader, const std::string& path, int64_t most,
            std::vector<Layer>& layers, BlockTables& blocks)
      : runtime_(runtime),
        reader_(reader),
        path_(path),
        most_(most),
        layers_(layers),
        blocks_(blocks),
        first_kv_head_(reader.records().size() > 1 && reader.records()[1].type == kPrefix ? 2 : 1) {
  }

  // The records of all KV heads, taken apart and checked.
  absl::Status ReadTables();
  // The records behind them are the blocks of these, and all of them.
  absl::Status CheckBlocks() const;
  // Whatever needs memory: indices, moments, room in the block tables.
  void MakeTables();
  // Blocks from the pool, all or none, filled by as few long reads as their order allows.
  absl::Status ReadBlocks();
  // Puts together the layers. Cannot fail.
  void Install();

 private:
  // f(kv_head, what was loaded for it) for the KV heads of all layers.
  template <class F>
  void ForKvHeads(F&& f) {
    size_t at = 0;
    for (Layer& layer : layers_) {
      for (KvHead& kv_head : layer.kv_heads) f(kv_head, loaded_[at++]);
    }
  }
  int64_t Keep(const LoadedKvHead& loaded) const { return std::min(loaded.saved.tokens, most_); }
  absl::Status Lost(size_t record, const char* what) const {
    return DataLossError(path_, ": record ", record, " ", what);
  }

  Runtime& runtime_;
  SnapshotReader& reader_;
  const std::string& path_;
  const int64_t most_;
  std::vector<Layer>& layers_;
  BlockTables& blocks_;
  const size_t first_kv_head_;        // its record
  std::vector<LoadedKvHead> loaded_;  // of all layers
};

absl::Status Restoring::ReadTables() {
  const std::vector<SnapshotRecord>& records = reader_.records();
  size_t kv_heads = 0;
  for (const Layer& layer : layers_) kv_heads += layer.kv_heads.size();
  if (kv_heads > records.size() - first_kv_head_) return Lost(records.size(), "is missing");
  std::vector<std::vector<std::byte>> tables;
  std::vector<std::span<std::byte>> payloads;
  for (size_t h = 0; h < kv_heads; ++h) tables.emplace_back(records[first_kv_head_ + h].bytes);
  for (std::vector<std::byte>& table : tables) payloads.push_back(table);
  VATTN_RETURN_IF_ERROR(reader_.Read(first_kv_head_, payloads));
  loaded_.resize(kv_heads);
  size_t at = 0;
  for (const Layer& layer : layers_) {
    const size_t first = at;
    for (const KvHead& kv_head : layer.kv_heads) {
      LoadedKvHead& loaded = loaded_[at];
      loaded.states.resize(kv_head.states.size());
      if (records[first_kv_head_ + at].type != kKvHead ||
          !Parse(tables[at], runtime_.storage(), loaded)) {
        return Lost(first_kv_head_ + at, "contradicts itself");
      }
      if (!AgreeOnLayer(loaded, loaded_[first]))
        return Lost(first_kv_head_ + at, "disagrees with its layer");
      ++at;
    }
  }
  return absl::OkStatus();
}

absl::Status Restoring::CheckBlocks() const {
  const std::vector<SnapshotRecord>& records = reader_.records();
  const size_t first_block = first_kv_head_ + loaded_.size();
  size_t blocks = 0;
  for (const LoadedKvHead& loaded : loaded_)
    blocks += static_cast<size_t>(BlocksFor(loaded.saved.tokens));
  if (blocks != records.size() - first_block) {
    return Lost(records.size(),
                blocks > records.size() - first_block ? "is missing" : "is one too many");
  }
  for (size_t record = first_block; record < records.size(); ++record) {
    const bool whole =
        records[record].type == kBlock &&
        records[record].bytes == static_cast<uint64_t>(runtime_.storage().block.bytes);
    if (!whole) return Lost(record, "is no block");
  }
  return absl::OkStatus();
}

void Restoring::MakeTables() {
  const Storage& s = runtime_.storage();
  ForKvHeads([&](KvHead& kv_head, LoadedKvHead& loaded) {
    for (std::vector<float>& floats : loaded.floats) {
      loaded.tables.push_back({Index::FromFloats(s, std::move(floats)), nullptr});
    }
    if (!loaded.doubles.empty()) {
      loaded.moment = std::make_unique<QueryMoment>(QueryMoment::Load(s.row.dim_k, loaded.doubles));
    }
    kv_head.blocks.Reserve(static_cast<size_t>(BlocksFor(Keep(loaded))));
  });
}

absl::Status Restoring::ReadBlocks() {
  int64_t needed = 0, to_come = 0;  // blocks of the file, and those of the reservation beyond
  for (const LoadedKvHead& loaded : loaded_) {
    const int64_t blocks = BlocksFor(Keep(loaded));
    needed += blocks;
    to_come += std::max<int64_t>(0, BlocksFor(blocks_.reserve_tokens()) - blocks);
  }
  std::vector<BlockId> ids(static_cast<size_t>(needed));
  std::vector<std::span<std::byte>> payloads;
  payloads.reserve(ids.size());
  VATTN_RETURN_IF_ERROR(blocks_.TakeForFile(needed, to_come, ids.data()));
  // A run of records that follow one another is one read. Every block is in its table, and so goes
  // back to the pool with it, before the first read can fail.
  absl::Status status;
  size_t id = 0, record = first_kv_head_ + loaded_.size(), run = record;
  const auto read_run = [&] {
    if (status.ok()) status = reader_.Read(run, payloads);
    payloads.clear();
  };
  ForKvHeads([&](KvHead& kv_head, const LoadedKvHead& loaded) {
    if (run + payloads.size() != record) {
      read_run();
      run = record;
    }
    for (int64_t b = 0; b < BlocksFor(Keep(loaded)); ++b, ++id) {
      blocks_.AppendFromFile(kv_head.blocks, ids[id]);
      payloads.push_back(
          {runtime_.store().data(ids[id]), static_cast<size_t>(runtime_.storage().block.bytes)});
    }
    record += static_cast<size_t>(BlocksFor(loaded.saved.tokens));
  });
  read_run();
  return status;
}

void Restoring::Install() {
  size_t at = 0;
  for (Layer& layer : layers_) {
    if (!layer.kv_heads.empty()) {
      const LoadedKvHead& first = loaded_[at];
      layer.tokens = Keep(first);
      layer.coded = layer.tokens == first.saved.tokens
                        ? first.saved.coded
                        : std::min(first.saved.coded, layer.tokens / kCodeTokens * kCodeTokens);
      layer.codes_made = layer.coded;
      for (const SavedSegment& saved : first.segments) {
        layer.segments.push_back({saved.first_block, saved.made_from, saved.provisional != 0});
      }
    }
    for (KvHead& kv_head : layer.kv_heads) {
      LoadedKvHead& loaded = loaded_[at++];
      kv_head.states = std::move(loaded.states);
      kv_head.tables = std::move(loaded.tables);
      kv_head.moment = std::move(loaded.moment);
    }
    layer.segments = SegmentsOf(layer.segments, layer.coded);
    UpdateSegments(layer);
  }
}

}  // namespace

absl::Status ReadSequence(Runtime& runtime, SnapshotReader& reader, const std::string& path,
                          int64_t most, std::vector<Layer>& layers, BlockTables& blocks) {
  Restoring restoring(runtime, reader, path, most, layers, blocks);
  VATTN_RETURN_IF_ERROR(restoring.ReadTables());
  VATTN_RETURN_IF_ERROR(restoring.CheckBlocks());
  restoring.MakeTables();
  VATTN_RETURN_IF_ERROR(restoring.ReadBlocks());
  restoring.Install();
  return absl::OkStatus();
}

}  // namespace vattn
