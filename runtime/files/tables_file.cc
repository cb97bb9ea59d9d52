#include "runtime/files/tables_file.h"

#include <cmath>
#include <span>

#include "memory/checksum.h"
#include "memory/snapshot.h"
#include "memory/status.h"

namespace vattn {
namespace {

enum TablesRecord : uint32_t { kModel = 1, kTables = 2, kHeads = 3 };

// Everything that the tables of a head depend on.
uint64_t TablesLayout(const Options& o, const Storage& s) {
  const std::string text = absl::StrCat(
      "vattn-tables-2 layers ", o.num_layers, " k ", o.head_dim_k, " v ", o.head_dim_v, " shared ",
      o.shared_kv, " scale ", o.softmax_scale, " index ", static_cast<int32_t>(o.index), " code ",
      s.code.dims8, "/", s.code.dims4, "/", s.code.dims2);
  return ChecksumOf(std::as_bytes(std::span<const char>(text.data(), text.size())));
}

std::span<const std::byte> BytesOf(const std::string& text) {
  return std::as_bytes(std::span<const char>(text.data(), text.size()));
}

// The query heads, and the KV heads of each layer.
std::vector<int32_t> HeadsOf(const Options& o) {
  std::vector<int32_t> heads = {o.num_q_heads};
  heads.insert(heads.end(), o.layer_kv_heads.begin(), o.layer_kv_heads.end());
  return heads;
}

constexpr int32_t kMostHeads = 65536;  // KV heads of a layer, of all ranks

// Whether a file with `saved` heads, as HeadsOf has them, has those of a runtime with these options.
absl::Status CheckHeads(const Options& o, const std::string& path,
                        const std::vector<int32_t>& saved) {
  for (size_t l = 0; l < o.layer_kv_heads.size(); ++l) {
    const int64_t own = o.layer_kv_heads[l], all = saved[l + 1],
                  first = static_cast<int64_t>(o.first_kv_head);
    const bool fits =
        own == 0 ? all == 0 : first + own <= all && o.num_q_heads * all == saved[0] * own;
    if (!fits) {
      return InvalidArgumentError("tables ", path, " have ", saved[0], " query and ", all,
                                  " KV heads in layer ", l, ", must have KV heads [", first, ", ",
                                  first + own, ") with ", own == 0 ? 0 : o.num_q_heads / own,
                                  " query heads each");
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status WriteTables(Runtime& runtime, const std::string& path, const std::string& model,
                         const ModelTables& tables) {
  absl::StatusOr<SaveTarget> target = FindSaveTarget(path, *runtime.io().ops);
  if (!target.ok()) return target.status();
  const std::vector<int32_t> heads = HeadsOf(runtime.options());
  uint64_t bytes = kSnapshotFileAlignment + model.size() + heads.size() * sizeof(int32_t);
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
  VATTN_RETURN_IF_ERROR((*writer)->Add(kHeads, std::as_bytes(std::span<const int32_t>(heads))));
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
  std::vector<int32_t> saved_heads(static_cast<size_t>(runtime.options().num_layers) + 1);
  if (records.size() != 3 || records[0].type != kModel || records[0].bytes > kMostModelBytes ||
      records[1].type != kHeads || records[1].bytes != saved_heads.size() * sizeof(int32_t) ||
      records[2].type != kTables)
    return DataLossError(path, ": holds no tables");
  std::string saved(records[0].bytes, '\0');
  VATTN_RETURN_IF_ERROR(
      (*reader)->Read(0, std::as_writable_bytes(std::span<char>(saved.data(), saved.size()))));
  if (!model.empty() && saved != model) {
    return InvalidArgumentError("model is ", model, ", must be that of tables ", path, ": ", saved);
  }
  VATTN_RETURN_IF_ERROR(
      (*reader)->Read(1, std::as_writable_bytes(std::span<int32_t>(saved_heads))));
  VATTN_RETURN_IF_ERROR(CheckHeads(runtime.options(), path, saved_heads));
  size_t heads = 0;
  for (size_t l = 1; l < saved_heads.size(); ++l) {
    if (saved_heads[l] < 0 || saved_heads[l] > kMostHeads)
      return DataLossError(path, ": layer ", l - 1, " has ", saved_heads[l], " KV heads");
    heads += static_cast<size_t>(saved_heads[l]);
  }
  if (records[2].bytes != heads * each * sizeof(float))
    return DataLossError(path, ": holds no tables");
  std::vector<float> floats(heads * each);
  VATTN_RETURN_IF_ERROR((*reader)->Read(2, std::as_writable_bytes(std::span<float>(floats))));
  for (size_t i = 0; i < floats.size(); ++i) {
    if (!std::isfinite(floats[i]))
      return DataLossError(path, ": number ", i, " is ", floats[i], ", must be finite");
  }
  ModelTables tables(static_cast<size_t>(runtime.options().num_layers));
  size_t layer_begin = 0;
  for (int l = 0; l < runtime.options().num_layers; ++l) {
    for (int h = 0; h < runtime.kv_heads(l); ++h) {
      const size_t head = layer_begin + KvHeadOfModel(runtime.options(), h);
      const auto at = floats.cbegin() + static_cast<int64_t>(head * each);
      tables[l].push_back(
          Index::FromFloats(s, std::vector<float>(at, at + static_cast<int64_t>(each))));
    }
    layer_begin += static_cast<size_t>(saved_heads[l + 1]);
  }
  return tables;
}

}  // namespace vattn
