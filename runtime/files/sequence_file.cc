#include "runtime/files/sequence_file.h"

#include <cstring>
#include <span>

#include "memory/status.h"

namespace vattn {

uint64_t LayoutOf(const Options& o, const Storage& s) {
  std::string text =
      absl::StrCat("vattn-sequence-3 layers ", o.num_layers, " q_heads ", o.num_q_heads, " k ",
                   o.head_dim_k, " v ", o.head_dim_v, " dtype ", static_cast<int32_t>(o.dtype),
                   " shared ", o.shared_kv, " scale ", o.softmax_scale, " sinks ", o.sinks,
                   " index ", static_cast<int32_t>(o.index), " code ");
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

}  // namespace vattn
