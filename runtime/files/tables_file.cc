#include "runtime/files/tables_file.h"

#include <cmath>
#include <span>

#include "memory/checksum.h"
#include "memory/snapshot.h"
#include "memory/status.h"

namespace vattn {
namespace {

enum TablesRecord : uint32_t { kModel = 1, kTables = 2 };

// Everything that the tables depend on.
uint64_t TablesLayout(const Options& o, const Storage& s) {
  std::string text =
      absl::StrCat("vattn-tables-1 layers ", o.num_layers, " q_heads ", o.num_q_heads, " k ",
                   o.head_dim_k, " v ", o.head_dim_v, " shared ", o.shared_kv, " scale ",
                   o.softmax_scale, " index ", static_cast<int32_t>(o.index), " code ",
                   s.code.dims8, "/", s.code.dims4, "/", s.code.dims2, " kv_heads");
  for (const int32_t heads : o.layer_kv_heads) absl::StrAppend(&text, " ", heads);
  return ChecksumOf(std::as_bytes(std::span<const char>(text.data(), text.size())));
}

std::span<const std::byte> BytesOf(const std::string& text) {
  return std::as_bytes(std::span<const char>(text.data(), text.size()));
}

}  // namespace

absl::Status WriteTables(Runtime& runtime, const std::string& path, const std::string& model,
                         const ModelTables& tables) {
  absl::StatusOr<SaveTarget> target = FindSaveTarget(path, *runtime.io().ops);
  if (!target.ok()) return target.status();
  uint64_t bytes = kSnapshotFileAlignment + model.size();
  std::vector<std::span<const std::byte>> parts;
  for (const auto& layer : tables) {
    for (const std::shared_ptr<const Index>& index : layer) {
      parts.push_back(std::as_bytes(std::span<const float>(index->floats())));
      bytes += parts.back().size();
    }
  }
  absl::StatusOr<std::unique_ptr<SnapshotWriter>> writer = SnapshotWriter::Create(
      *target, TablesLayout(runtime.options(), runtime.storage()), bytes, runtime.io());
  if (!writer.ok()) return writer.status();
  VATTN_RETURN_IF_ERROR((*writer)->Add(kModel, BytesOf(model)));
  VATTN_RETURN_IF_ERROR((*writer)->Add(kTables, parts));
  return (*writer)->Commit();
}

absl::StatusOr<ModelTables> ReadTables(Runtime& runtime, const std::string& path,
                                       const std::string& model) {
  const Storage& s = runtime.storage();
  absl::StatusOr<std::unique_ptr<SnapshotReader>> reader =
      SnapshotReader::Open(path, TablesLayout(runtime.options(), s), runtime.io());
  if (!reader.ok()) return reader.status();
  const std::vector<SnapshotRecord>& records = (*reader)->records();
  const size_t each = static_cast<size_t>(Index::NumFloats(s));
  size_t heads = 0;
  for (int l = 0; l < runtime.options().num_layers; ++l)
    heads += static_cast<size_t>(runtime.kv_heads(l));
  if (records.size() != 2 || records[0].type != kModel || records[0].bytes > kMostModelBytes ||
      records[1].type != kTables || records[1].bytes != heads * each * sizeof(float))
    return DataLossError(path, ": holds no tables");
  std::string saved(records[0].bytes, '\0');
  VATTN_RETURN_IF_ERROR(
      (*reader)->Read(0, std::as_writable_bytes(std::span<char>(saved.data(), saved.size()))));
  if (!model.empty() && saved != model) {
    return InvalidArgumentError("model is ", model, ", must be that of tables ", path, ": ", saved);
  }
  std::vector<float> floats(heads * each);
  VATTN_RETURN_IF_ERROR((*reader)->Read(1, std::as_writable_bytes(std::span<float>(floats))));
  for (size_t i = 0; i < floats.size(); ++i) {
    if (!std::isfinite(floats[i]))
      return DataLossError(path, ": number ", i, " is ", floats[i], ", must be finite");
  }
  ModelTables tables(static_cast<size_t>(runtime.options().num_layers));
  auto at = floats.cbegin();
  for (int l = 0; l < runtime.options().num_layers; ++l) {
    for (int h = 0; h < runtime.kv_heads(l); ++h, at += static_cast<int64_t>(each))
      tables[l].push_back(
          Index::FromFloats(s, std::vector<float>(at, at + static_cast<int64_t>(each))));
  }
  return tables;
}

}  // namespace vattn
