#include "runtime/files/save.h"

#include <algorithm>
#include <span>

#include "memory/status.h"

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

// How much of a layer is written.
struct Extent {
  int64_t tokens, coded;
};

Extent ExtentOf(const Layer& layer, int64_t most) {
  // A step that failed to open on CUDA leaves tokens to be coded that nothing has coded yet.
  return {std::min(layer.tokens, most), std::min(CodedOf(layer, most), layer.codes_made)};
}

std::vector<SavedSegment> SavedSegments(const Layer& layer, int64_t coded) {
  std::vector<SavedSegment> saved;
  if (coded == 0) return saved;
  for (const Segment& segment : SegmentsOf(layer.segments, coded)) {
    saved.push_back({segment.first_block, segment.made_from, segment.provisional});
  }
  return saved;
}

// The parts of one block that hold tokens, with zeros from `zeros` (a block of them) in between.
void AddBlockParts(const Storage& s, const std::byte* block, const std::byte* zeros,
                   int64_t first_token, const Extent& extent, int64_t sinks,
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
  add(0, s.block.codes, s.row.row_bytes, 0, extent.tokens);
  add(s.block.codes, s.block.value_codes, s.code.bytes(), sinks, extent.coded);
  const int64_t used = s.block.value_codes + int64_t{kBlockTokens} * s.value_code_bytes;
  add(s.block.value_codes, used, s.value_code_bytes, sinks, extent.coded);
  parts.push_back({zeros, static_cast<size_t>(s.block.bytes - used)});
}

absl::Status WritePrefix(SnapshotWriter& writer, const StoredPrefix& prefix) {
  const SavedPrefix saved{prefix.stored, prefix.prefix.salt.size()};
  const std::span<const std::byte> parts[] = {
      BytesOf(saved), std::as_bytes(std::span(prefix.prefix.salt)), BytesOf(prefix.prefix.tokens)};
  return writer.Add(kPrefix, parts);
}

absl::Status WriteTables(SnapshotWriter& writer, const Layer& layer, int64_t most) {
  const Extent extent = ExtentOf(layer, most);
  const std::vector<SavedSegment> segments = SavedSegments(layer, extent.coded);
  for (const KvHead& kv_head : layer.kv_heads) {
    const std::vector<double> moment =
        kv_head.moment ? kv_head.moment->Save() : std::vector<double>();
    const SavedKvHead saved{extent.tokens, extent.coded, static_cast<int64_t>(segments.size()),
                            static_cast<int64_t>(moment.size())};
    std::vector<std::span<const std::byte>> parts = {BytesOf(saved), BytesOf(kv_head.states),
                                                     BytesOf(segments)};
    for (size_t k = 0; k < segments.size(); ++k)
      parts.push_back(BytesOf(kv_head.tables[k].index->floats()));
    parts.push_back(BytesOf(moment));
    VATTN_RETURN_IF_ERROR(writer.Add(kKvHead, parts));
  }
  return absl::OkStatus();
}

absl::Status WriteBlocks(SnapshotWriter& writer, Runtime& runtime, const Layer& layer, int64_t most,
                         const std::byte* zeros) {
  const Extent extent = ExtentOf(layer, most);
  std::vector<std::span<const std::byte>> parts;
  for (const KvHead& kv_head : layer.kv_heads) {
    for (int64_t b = 0; b < BlocksFor(extent.tokens); ++b) {
      parts.clear();
      AddBlockParts(runtime.storage(), runtime.store().data(BlockId{kv_head.blocks[b]}), zeros,
                    b * kBlockTokens, extent, runtime.options().sinks, parts);
      VATTN_RETURN_IF_ERROR(writer.Add(kBlock, parts));
    }
  }
  return absl::OkStatus();
}

}  // namespace

uint64_t SavedBytes(const Runtime& runtime, const std::vector<Layer>& layers) {
  const uint64_t block_bytes = static_cast<uint64_t>(runtime.storage().block.bytes);
  uint64_t bytes = kSnapshotFileAlignment + 2 * kSnapshotHeaderBytes;
  for (const Layer& layer : layers) {
    for (const KvHead& kv_head : layer.kv_heads) {
      bytes += sizeof(SavedKvHead) + 3 * kSnapshotHeaderBytes +
               kv_head.states.size() * sizeof(HeadState);
      for (const SegmentTables& tables : kv_head.tables) {
        bytes += sizeof(SavedSegment) + tables.index->floats().size() * sizeof(float);
      }
      const uint64_t dim = kv_head.moment ? static_cast<uint64_t>(kv_head.moment->dim()) : 0;
      if (kv_head.moment) bytes += (dim * dim + 1) * sizeof(double);
      bytes +=
          static_cast<uint64_t>(BlocksFor(layer.tokens)) * (block_bytes + kSnapshotHeaderBytes);
    }
  }
  return bytes;
}

absl::StatusOr<SavedFile> WriteSequence(Runtime& runtime, const SavedHead& head,
                                        const std::vector<Layer>& layers, const SaveTarget& target,
                                        const StoredPrefix* prefix, bool durable) {
  const Storage& s = runtime.storage();
  absl::StatusOr<std::unique_ptr<SnapshotWriter>> writer = SnapshotWriter::Create(
      target, LayoutOf(runtime.options(), s), SavedBytes(runtime, layers), runtime.io());
  if (!writer.ok()) return writer.status();
  VATTN_RETURN_IF_ERROR((*writer)->Add(kHead, BytesOf(head)));
  if (prefix != nullptr) VATTN_RETURN_IF_ERROR(WritePrefix(**writer, *prefix));
  const int64_t most =
      prefix != nullptr ? static_cast<int64_t>(prefix->prefix.tokens.size()) : kAllTokens;
  for (const Layer& layer : layers) VATTN_RETURN_IF_ERROR(WriteTables(**writer, layer, most));
  const std::vector<std::byte> zeros(static_cast<size_t>(s.block.bytes), std::byte{0});
  for (const Layer& layer : layers)
    VATTN_RETURN_IF_ERROR(WriteBlocks(**writer, runtime, layer, most, zeros.data()));
  VATTN_RETURN_IF_ERROR((*writer)->Commit(durable));
  return SavedFile{(*writer)->bytes_written(), (*writer)->file_id()};
}

}  // namespace vattn
