// Sequences into files and back: save, restore, hibernate, spill, wake, and stored prefixes.
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "memory/status.h"
#include "runtime/files/disk.h"
#include "runtime/files/sequence_file.h"
#include "runtime/sequence.h"

namespace vattn {
namespace {

// Counts and reports what became of a file operation.
absl::Status Told(Runtime& runtime, const char* what, absl::Status status) {
  const Code code = CodeOf(status);
  if (code == Code::kIoError) ++runtime.counters().io_errors;
  if (code == Code::kDataLoss) ++runtime.counters().files_refused;
  if (code == Code::kIoError || code == Code::kDataLoss) {
    runtime.Log(LogLevel::kWarning, absl::StrCat(what, " failed: ", status.message()));
  }
  return status;
}

}  // namespace

absl::Status Sequence::Save(const std::string& path) {
  const absl::StatusOr<SaveTarget> target = FindSaveTarget(path, *runtime_->io().ops);
  VATTN_RETURN_IF_ERROR(Told(*runtime_, "save", target.status()));
  return SaveAs(*target, nullptr, /*durable=*/true).status();
}

absl::StatusOr<SavedFile> Sequence::SaveAs(const SaveTarget& target, const StoredPrefix* prefix,
                                           bool durable) {
  VATTN_RETURN_IF_ERROR(CheckWhole());
  absl::StatusOr<SavedFile> saved = WriteFile(target, prefix, durable);
  VATTN_RETURN_IF_ERROR(Told(*runtime_, "save", saved.status()));
  ++runtime_->counters().saves;
  runtime_->counters().bytes_saved += saved->bytes;
  return saved;
}

absl::Status Sequence::LoadCounted(SnapshotReader& reader, const std::string& path, int64_t most) {
  VATTN_RETURN_IF_ERROR(Told(*runtime_, "restore", Load(reader, path, most)));
  ++runtime_->counters().restores;
  for (const Layer& layer : layers_) {
    for (const KvHead& kv_head : layer.kv_heads) {
      runtime_->counters().bytes_restored += kv_head.blocks.size() * runtime_->store().block_bytes();
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Sequence>> Sequence::Restore(std::shared_ptr<Runtime> runtime,
                                                            const std::string& path,
                                                            const SequenceOptions& options) {
  Runtime& r = *runtime;
  SavedHead head;
  absl::StatusOr<std::unique_ptr<SnapshotReader>> reader =
      OpenSaved(path, LayoutOf(r.options(), r.storage()), r.io(), head);
  VATTN_RETURN_IF_ERROR(Told(r, "restore", reader.status()));
  SequenceOptions chosen = options;
  if (chosen.id == 0) chosen.id = head.id;
  std::unique_ptr<Sequence> sequence(new Sequence(std::move(runtime), chosen));
  sequence->step_ = head.step;
  sequence->reserve_tokens_ = options.reserve_tokens;
  VATTN_RETURN_IF_ERROR(sequence->LoadCounted(**reader, path, kAllTokens));
  sequence->Enlist();
  return sequence;
}

absl::StatusOr<std::unique_ptr<Sequence>> Sequence::FromPrefix(std::shared_ptr<Runtime> runtime,
                                                               const SequenceOptions& options,
                                                               SnapshotReader& reader,
                                                               const std::string& path,
                                                               int64_t tokens) {
  std::unique_ptr<Sequence> sequence(new Sequence(std::move(runtime), options));
  sequence->reserve_tokens_ = options.reserve_tokens;
  VATTN_RETURN_IF_ERROR(sequence->LoadCounted(reader, path, tokens));
  sequence->ResetStates();  // the controller starts as that of any new sequence
  sequence->Enlist();
  return sequence;
}

absl::Status Sequence::Hibernate(const std::string& path) {
  if (hibernated()) return InvalidArgumentError("sequence hibernates already, must be awake");
  if (batch.load() != nullptr) {
    return InvalidArgumentError("sequence sits in slot ", slot,
                                " of a batch, must be taken out first");
  }
  absl::StatusOr<SaveTarget> target = FindSaveTarget(path, *runtime_->io().ops);
  VATTN_RETURN_IF_ERROR(Told(*runtime_, "save", target.status()));
  std::vector<int64_t> tokens = Lengths();
  const absl::StatusOr<SavedFile> saved = SaveAs(*target, nullptr, /*durable=*/true);
  VATTN_RETURN_IF_ERROR(saved.status());
  Sleep(std::move(target->path), saved->id, std::move(tokens));
  return absl::OkStatus();
}

absl::Status Sequence::Spill() {
  absl::StatusOr<SpillFile> file = runtime_->disk()->NewSpill(SavedBytes());
  if (!file.ok()) return file.status();
  SaveTarget target = {.path = file->path()};
  std::vector<int64_t> tokens = Lengths();
  const absl::StatusOr<SavedFile> saved = SaveAs(target, nullptr, /*durable=*/false);
  if (!saved.ok()) return saved.status();
  file->SetBytes(saved->bytes);
  Sleep(std::move(target.path), saved->id, std::move(tokens));
  spill_ = *std::move(file);
  ++runtime_->counters().spills;
  return absl::OkStatus();
}

bool Sequence::HoldsBlocks() const {
  for (const Layer& layer : layers_) {
    for (const KvHead& kv_head : layer.kv_heads) {
      if (!kv_head.blocks.empty()) return true;
    }
  }
  return false;
}

std::vector<int64_t> Sequence::Lengths() const {
  std::vector<int64_t> tokens;
  for (const Layer& layer : layers_) tokens.push_back(layer.tokens);
  return tokens;
}

void Sequence::Sleep(std::string path, const SnapshotFileId& file,
                     std::vector<int64_t> tokens) noexcept {
  hibernate_file_ = file;
  asleep_tokens_ = std::move(tokens);
  ReleaseBlocks();
  cuda_.reset();
  ForgetLoaded();
  hibernate_path_ = std::move(path);
  CountTables();
}

void Sequence::ForgetLoaded() {
  codes_to_load_.clear();
  for (Layer& layer : layers_) {
    layer.coded = layer.coded_on_device = 0;
    layer.segments.clear();
    UpdateSegments(layer);
    for (KvHead& kv_head : layer.kv_heads) {
      kv_head.moment.reset();
      kv_head.recent = RecentQueries();
      kv_head.hot = HotSet();
    }
  }
}

absl::Status Sequence::Wake() {
  if (!hibernated()) return absl::OkStatus();
  SavedHead head;
  absl::StatusOr<std::unique_ptr<SnapshotReader>> reader = OpenSaved(
      hibernate_path_, LayoutOf(runtime_->options(), runtime_->storage()), runtime_->io(), head);
  VATTN_RETURN_IF_ERROR(Told(*runtime_, "restore", reader.status()));
  if ((*reader)->file_id() != hibernate_file_) {
    return Told(*runtime_, "restore",
                DataLossError(hibernate_path_, ": is not the file any more that sequence ", id_,
                              " went into: another one was put in its place"));
  }
  absl::Cleanup undo = [this] {
    ReleaseBlocks();
    ForgetLoaded();
  };
  VATTN_RETURN_IF_ERROR(LoadCounted(**reader, hibernate_path_, kAllTokens));
  std::move(undo).Cancel();
  hibernate_path_.clear();
  spill_ = SpillFile();
  return absl::OkStatus();
}

}  // namespace vattn
