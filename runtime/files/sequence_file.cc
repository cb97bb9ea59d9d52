#include "runtime/files/sequence_file.h"

#include <cstring>
#include <span>

#include "memory/status.h"
#include "runtime/sequence.h"

namespace vattn {
namespace {

template <class T>
std::span<const std::byte> BytesOf(const T& value) {
  return std::as_bytes(std::span<const T, 1>(&value, 1));
}

template <class T>
std::span<const std::byte> BytesOf(const std::vector<T>& values) {
  return std::as_bytes(std::span<const T>(values));
}

// The parts of one block that hold tokens, with zeros from `zeros` (a block of them) in between.
void AddBlockParts(const Storage& s, const std::byte* block, const std::byte* zeros,
                   int64_t first_token, int64_t tokens, int64_t coded_from, int64_t coded_to,
                   std::vector<std::span<const std::byte>>& parts) {
  const auto add = [&](int64_t area, int64_t area_end, int64_t unit, int64_t from, int64_t to) {
    const auto clamp = [&](int64_t t) {
      return std::clamp<int64_t>(t - first_token, 0, kBlockTokens);
    };
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

std::vector<SavedSegment> SavedSegments(const Layer& layer, int64_t coded) {
  std::vector<SavedSegment> saved;
  if (coded == 0) return saved;
  for (const Segment& segment : SegmentsOf(layer.segments, coded)) {
    saved.push_back({segment.first_block, segment.made_from, segment.provisional});
  }
  return saved;
}

// A kGroup record taken apart.
struct LoadedGroup {
  SavedGroup saved;
  std::vector<HeadState> states;
  std::vector<SavedSegment> segments;
  std::vector<std::vector<float>> floats;  // of each segment
  std::vector<double> doubles;
  std::vector<SegmentTables> tables;    // of floats
  std::unique_ptr<QueryMoment> moment;  // of doubles, null without
};

// Segments begin with the first block and lie one behind the other within what is coded; the last
// may be provisional.
bool AreSegments(const std::vector<SavedSegment>& segments, const SavedGroup& saved) {
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
bool Parse(const std::vector<std::byte>& bytes, const Storage& s, LoadedGroup& group) {
  SavedGroup& saved = group.saved;
  const size_t states = group.states.size() * sizeof(HeadState);
  if (bytes.size() < sizeof(saved) + states) return false;
  std::memcpy(&saved, bytes.data(), sizeof(saved));
  const bool fits =
      saved.segments >= 0 && saved.segments <= kMaxSegments &&
      (saved.moment_doubles == 0 || saved.moment_doubles == int64_t{s.row.dim_k} * s.row.dim_k + 1);
  if (!fits || saved.tokens < 0 || saved.tokens > int64_t{1} << 31 || saved.coded < 0 ||
      saved.coded > saved.tokens || (saved.coded > 0 && saved.segments == 0)) {
    return false;
  }
  group.segments.resize(static_cast<size_t>(saved.segments));
  group.floats.assign(group.segments.size(),
                      std::vector<float>(static_cast<size_t>(Index::NumFloats(s))));
  group.doubles.resize(static_cast<size_t>(saved.moment_doubles));
  const std::byte* at = bytes.data() + sizeof(saved);
  const auto take = [&](auto& values) {
    if (!values.empty()) std::memcpy(values.data(), at, values.size() * sizeof(values[0]));
    at += values.size() * sizeof(values[0]);
  };
  const size_t per_segment =
      sizeof(SavedSegment) + static_cast<size_t>(Index::NumFloats(s)) * sizeof(float);
  if (bytes.size() !=
      sizeof(saved) + states + group.segments.size() * per_segment + group.doubles.size() * 8)
    return false;
  take(group.states);
  take(group.segments);
  for (std::vector<float>& floats : group.floats) take(floats);
  take(group.doubles);
  return AreSegments(group.segments, saved);
}

}  // namespace

uint64_t LayoutOf(const Options& o, const Storage& s) {
  std::string text =
      absl::StrCat("vattn-sequence-3 layers ", o.num_layers, " q_heads ", o.num_q_heads, " k ",
                   o.head_dim_k, " v ", o.head_dim_v, " dtype ", o.dtype, " shared ", o.shared_kv,
                   " scale ", o.softmax_scale, " sinks ", o.sinks, " index ", o.index, " code ");
  absl::StrAppend(&text, s.code.dims8, "/", s.code.dims4, "/", s.code.dims2, " values ",
                  s.value_bits, " block ", s.block.bytes, " kv_heads");
  if (s.code.dims1 + s.code.centroids > 0)
    absl::StrAppend(&text, " signs ", s.code.dims1, " centroids ", s.code.centroids);
  for (const int32_t heads : o.layer_kv_heads) absl::StrAppend(&text, " ", heads);
  return ChecksumOf(std::as_bytes(std::span<const char>(text.data(), text.size())));
}

absl::StatusOr<std::unique_ptr<SnapshotReader>> OpenSaved(const std::string& path, uint64_t layout,
                                                          const IoOptions& io, SavedHead& head) {
  absl::StatusOr<std::unique_ptr<SnapshotReader>> reader = SnapshotReader::Open(path, layout, io);
  if (!reader.ok()) return reader.status();
  const std::vector<SnapshotRecord>& records = (*reader)->records();
  if (records.empty() || records[0].type != kHead || records[0].bytes != sizeof(head)) {
    return DataLossError(path, ": has no sequence head");
  }
  VATTN_RETURN_IF_ERROR(
      (*reader)->Read(0, std::as_writable_bytes(std::span<SavedHead, 1>(&head, 1))));
  return reader;
}

absl::StatusOr<StoredPrefix> ReadPrefix(SnapshotReader& reader, const std::string& path) {
  const std::vector<SnapshotRecord>& records = reader.records();
  if (records.size() < 2 || records[1].type != kPrefix)
    return DataLossError(path, ": has no prefix");
  std::vector<std::byte> bytes(records[1].bytes);
  VATTN_RETURN_IF_ERROR(reader.Read(1, bytes));
  SavedPrefix saved;
  if (bytes.size() < sizeof(saved)) return DataLossError(path, ": record 1 is too short");
  std::memcpy(&saved, bytes.data(), sizeof(saved));
  const size_t rest = bytes.size() - sizeof(saved);
  if (saved.salt_bytes > rest || (rest - saved.salt_bytes) % sizeof(int32_t) != 0) {
    return DataLossError(path, ": record 1 contradicts itself");
  }
  StoredPrefix stored;
  stored.stored = saved.stored;
  stored.prefix.salt.assign(reinterpret_cast<const char*>(bytes.data()) + sizeof(saved),
                            saved.salt_bytes);
  stored.prefix.tokens.resize((rest - saved.salt_bytes) / sizeof(int32_t));
  if (!stored.prefix.tokens.empty()) {
    std::memcpy(stored.prefix.tokens.data(), bytes.data() + sizeof(saved) + saved.salt_bytes,
                rest - saved.salt_bytes);
  }
  return stored;
}

uint64_t Sequence::SavedBytes() const {
  uint64_t bytes = kSnapshotFileAlignment + 2 * kSnapshotHeaderBytes;
  for (const Layer& layer : layers_) {
    for (const KvHead& kv_head : layer.kv_heads) {
      bytes +=
          sizeof(SavedGroup) + 3 * kSnapshotHeaderBytes + kv_head.states.size() * sizeof(HeadState);
      for (const SegmentTables& tables : kv_head.tables) {
        bytes += sizeof(SavedSegment) + tables.index->floats().size() * sizeof(float);
      }
      const uint64_t dim = kv_head.moment ? static_cast<uint64_t>(kv_head.moment->dim()) : 0;
      if (kv_head.moment) bytes += (dim * dim + 1) * sizeof(double);
      bytes += static_cast<uint64_t>(BlocksFor(layer.tokens)) *
               (runtime_->store().block_bytes() + kSnapshotHeaderBytes);
    }
  }
  return bytes;
}

absl::StatusOr<SavedFile> Sequence::WriteFile(const SaveTarget& target, const StoredPrefix* prefix,
                                              bool durable) {
  // A lost device does not keep the host's copy from being saved, with the state of the last Pull.
  const absl::Status pulled = Pull();
  if (!pulled.ok() && CodeOf(pulled) != Code::kDeviceLost) return pulled;
  TakeRecentQueries();
  const Storage& s = runtime_->storage();
  absl::StatusOr<std::unique_ptr<SnapshotWriter>> writer = SnapshotWriter::Create(
      target, LayoutOf(runtime_->options(), s), SavedBytes(), runtime_->io());
  if (!writer.ok()) return writer.status();
  const SavedHead head{id_, step_};
  VATTN_RETURN_IF_ERROR((*writer)->Add(kHead, BytesOf(head)));
  int64_t most = kAllTokens;
  if (prefix != nullptr) {
    const SavedPrefix saved{prefix->stored, prefix->prefix.salt.size()};
    const std::span<const std::byte> parts[] = {BytesOf(saved),
                                                std::as_bytes(std::span(prefix->prefix.salt)),
                                                BytesOf(prefix->prefix.tokens)};
    VATTN_RETURN_IF_ERROR((*writer)->Add(kPrefix, parts));
    most = static_cast<int64_t>(prefix->prefix.tokens.size());
  }
  const auto tokens = [&](const Layer& layer) { return std::min(layer.tokens, most); };
  const auto coded = [&](const Layer& layer) {
    // On CUDA a step that failed to open leaves tokens to be coded that no flush has coded yet.
    const int64_t coded = CodedOf(layer, most);
    return runtime_->cuda() == nullptr ? coded : std::min(coded, layer.coded_on_device);
  };
  for (const Layer& layer : layers_) {
    for (const KvHead& kv_head : layer.kv_heads) {
      const std::vector<double> moment =
          kv_head.moment ? kv_head.moment->Save() : std::vector<double>();
      const std::vector<SavedSegment> segments = SavedSegments(layer, coded(layer));
      const SavedGroup saved{tokens(layer), coded(layer), static_cast<int64_t>(segments.size()),
                             static_cast<int64_t>(moment.size())};
      std::vector<std::span<const std::byte>> tables = {BytesOf(saved), BytesOf(kv_head.states),
                                                        BytesOf(segments)};
      for (size_t k = 0; k < segments.size(); ++k)
        tables.push_back(BytesOf(kv_head.tables[k].index->floats()));
      tables.push_back(BytesOf(moment));
      VATTN_RETURN_IF_ERROR((*writer)->Add(kGroup, tables));
    }
  }
  const std::vector<std::byte> zeros(static_cast<size_t>(s.block.bytes), std::byte{0});
  std::vector<std::span<const std::byte>> parts;
  for (const Layer& layer : layers_) {
    for (const KvHead& kv_head : layer.kv_heads) {
      for (int64_t b = 0; b < BlocksFor(tokens(layer)); ++b) {
        parts.clear();
        AddBlockParts(s, runtime_->store().data(BlockId{kv_head.blocks[b]}), zeros.data(),
                      b * kBlockTokens, tokens(layer), runtime_->options().sinks, coded(layer),
                      parts);
        VATTN_RETURN_IF_ERROR((*writer)->Add(kBlock, parts));
      }
    }
  }
  VATTN_RETURN_IF_ERROR((*writer)->Commit(durable));
  return SavedFile{(*writer)->bytes_written(), (*writer)->file_id()};
}

absl::Status Sequence::Load(SnapshotReader& reader, const std::string& path, int64_t most) {
  const Storage& s = runtime_->storage();
  const std::vector<SnapshotRecord>& records = reader.records();
  const auto lost = [&](size_t record, const char* what) {
    return DataLossError(path, ": record ", record, " ", what);
  };
  // Tables: all groups at once.
  const size_t first_group = records.size() > 1 && records[1].type == kPrefix ? 2 : 1;
  size_t groups = 0;
  for (const Layer& layer : layers_) groups += layer.kv_heads.size();
  if (groups > records.size() - first_group) return lost(records.size(), "is missing");
  std::vector<std::vector<std::byte>> tables;
  std::vector<std::span<std::byte>> payloads;
  for (size_t g = first_group; g < first_group + groups; ++g) tables.emplace_back(records[g].bytes);
  for (std::vector<std::byte>& table : tables) payloads.push_back(table);
  VATTN_RETURN_IF_ERROR(reader.Read(first_group, payloads));
  std::vector<LoadedGroup> loaded(groups);
  size_t at = 0, in_file = 0;
  int64_t needed = 0, to_come = 0;  // blocks of the file, and those of the reservation beyond
  for (const Layer& layer : layers_) {
    for (const KvHead& kv_head : layer.kv_heads) {
      loaded[at].states.resize(kv_head.states.size());
      if (records[first_group + at].type != kGroup || !Parse(tables[at], s, loaded[at])) {
        return lost(first_group + at, "contradicts itself");
      }
      const SavedGroup& saved = loaded[at].saved;
      const SavedGroup& before =
          loaded[at - static_cast<size_t>(&kv_head - layer.kv_heads.data())].saved;
      const auto same = [&](const SavedSegment& a, const SavedSegment& b) {
        return a.first_block == b.first_block && a.made_from == b.made_from &&
               a.provisional == b.provisional;
      };
      const std::vector<SavedSegment>& segments = loaded[at].segments;
      const std::vector<SavedSegment>& first =
          loaded[at - static_cast<size_t>(&kv_head - layer.kv_heads.data())].segments;
      if (saved.tokens != before.tokens || saved.coded != before.coded ||
          !std::equal(segments.begin(), segments.end(), first.begin(), first.end(), same)) {
        return lost(first_group + at, "disagrees with its layer");
      }
      in_file += static_cast<size_t>(BlocksFor(saved.tokens));
      const int64_t blocks = BlocksFor(std::min(saved.tokens, most));
      needed += blocks;
      to_come += std::max<int64_t>(0, BlocksFor(reserve_tokens_) - blocks);
      ++at;
    }
  }
  const size_t first_block = first_group + groups;
  if (in_file != records.size() - first_block) {
    return lost(records.size(),
                in_file > records.size() - first_block ? "is missing" : "is one too many");
  }
  for (size_t record = first_block; record < records.size(); ++record) {
    const bool whole = records[record].type == kBlock &&
                       records[record].bytes == static_cast<uint64_t>(s.block.bytes);
    if (!whole) return lost(record, "is no block");
  }

  // What may fail for want of memory comes before the first block is taken.
  for (LoadedGroup& group : loaded) {
    for (std::vector<float>& floats : group.floats) {
      group.tables.push_back({Index::FromFloats(s, std::move(floats)), nullptr});
    }
    if (!group.doubles.empty()) {
      group.moment = std::make_unique<QueryMoment>(QueryMoment::Load(s.row.dim_k, group.doubles));
    }
  }
  at = 0;
  for (Layer& layer : layers_) {
    for (KvHead& kv_head : layer.kv_heads) {
      kv_head.blocks.reserve(
          static_cast<size_t>(BlocksFor(std::min(loaded[at++].saved.tokens, most))));
    }
  }
  std::vector<BlockId> ids(static_cast<size_t>(needed));
  payloads.reserve(ids.size());
  if (runtime_->cuda() != nullptr) codes_to_load_.reserve(ids.size());

  // Blocks: all or none from the pool, then as few long reads as their order allows.
  VATTN_RETURN_IF_ERROR(ReserveUpTo(needed + to_come));
  VATTN_RETURN_IF_ERROR(TakeBlocks(needed, needed, ids.data()));
  size_t id = 0, record = first_block, run = first_block;
  payloads.clear();
  at = 0;
  absl::Status status;
  const auto read_run = [&] {
    if (status.ok()) status = reader.Read(run, payloads);
    payloads.clear();
  };
  for (Layer& layer : layers_) {
    for (KvHead& kv_head : layer.kv_heads) {
      const SavedGroup& saved = loaded[at++].saved;
      const size_t keep = static_cast<size_t>(BlocksFor(std::min(saved.tokens, most)));
      if (run + payloads.size() != record) {
        read_run();
        run = record;
      }
      for (size_t b = 0; b < keep; ++b, ++id) {
        kv_head.blocks.push_back(static_cast<int32_t>(ids[id]));
        if (runtime_->cuda() != nullptr) {
          runtime_->cuda()->Renew(static_cast<int32_t>(ids[id]));
          codes_to_load_.push_back(static_cast<int32_t>(ids[id]));
        }
        payloads.push_back({runtime_->store().data(ids[id]), static_cast<size_t>(s.block.bytes)});
      }
      record += static_cast<size_t>(BlocksFor(saved.tokens));
    }
  }
  read_run();
  VATTN_RETURN_IF_ERROR(status);

  at = 0;
  for (int l = 0; l < static_cast<int>(layers_.size()); ++l) {
    Layer& layer = layers_[l];
    for (KvHead& kv_head : layer.kv_heads) {
      LoadedGroup& from = loaded[at++];
      if (&kv_head == &layer.kv_heads[0]) {
        const int64_t tokens = std::min(from.saved.tokens, most);
        AddTokens(l, tokens);
        layer.coded = tokens == from.saved.tokens
                          ? from.saved.coded
                          : std::min(from.saved.coded, tokens / kCodeTokens * kCodeTokens);
        layer.coded_on_device = layer.coded;
        for (const SavedSegment& saved : from.segments) {
          layer.segments.push_back({saved.first_block, saved.made_from, saved.provisional != 0});
        }
      }
      kv_head.states = std::move(from.states);
      kv_head.tables = std::move(from.tables);
      kv_head.moment = std::move(from.moment);
    }
    layer.segments = SegmentsOf(layer.segments, layer.coded);
    UpdateSegments(layer);
  }
  CountTables();
  return absl::OkStatus();
}

}  // namespace vattn
