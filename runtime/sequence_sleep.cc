// Sequences into files and back: save, restore, hibernate, spill, wake, and stored prefixes.
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "memory/status.h"
#include "runtime/files/disk.h"
#include "runtime/files/restore.h"
#include "runtime/files/save.h"
#include "runtime/files/sequence_file.h"
#include "runtime/sequence.h"

namespace vattn {
namespace {

// Counts and logs a file operation that failed.
absl::Status CountAndLog(Runtime& runtime, const char* what, absl::Status status) {
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
  VATTN_RETURN_IF_ERROR(CountAndLog(*runtime_, "save", target.status()));
  return SaveAs(*target, nullptr, /*durable=*/true).status();
}

absl::StatusOr<SavedFile> Sequence::SaveAs(const SaveTarget& target, const StoredPrefix* prefix,
                                           bool durable) {
  VATTN_RETURN_IF_ERROR(CheckWhole());
  // A lost device does not keep the host's copy from being saved, with the state that was read
  // back last.
  const absl::Status read = ReadBackState();
  if (!read.ok() && CodeOf(read) != Code::kDeviceLost) return CountAndLog(*runtime_, "save", read);
  TakeRecentQueries();
  absl::StatusOr<SavedFile> saved =
      WriteSequence(*runtime_, {id_, step_}, layers_, target, prefix, durable);
  VATTN_RETURN_IF_ERROR(CountAndLog(*runtime_, "save", saved.status()));
  ++runtime_->counters().saves;
  runtime_->counters().bytes_saved += saved->bytes;
  return saved;
}

absl::Status Sequence::Load(SnapshotReader& reader, const std::string& path, int64_t most) {
  VATTN_RETURN_IF_ERROR(CountAndLog(*runtime_, "restore",
                                    ReadSequence(*runtime_, reader, path, most, layers_, blocks_)));
  ++runtime_->counters().restores;
  for (int l = 0; l < static_cast<int>(layers_.size()); ++l) {
    CountTokens(l, layers_[l].tokens);
    for (const KvHead& kv_head : layers_[l].kv_heads) {
      runtime_->counters().bytes_restored +=
          kv_head.blocks.size() * runtime_->store().block_bytes();
    }
  }
  CountTables();
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Sequence>> Sequence::Restore(std::shared_ptr<Runtime> runtime,
                                                            const std::string& path,
                                                            const SequenceOptions& options) {
  Runtime& r = *runtime;
  SavedHead head;
  absl::StatusOr<std::unique_ptr<SnapshotReader>> reader =
      OpenSaved(path, LayoutOf(r.options(), r.storage()), r.io(), head);
  VATTN_RETURN_IF_ERROR(CountAndLog(r, "restore", reader.status()));
  SequenceOptions chosen = options;
  if (chosen.id == 0) chosen.id = head.id;
  std::unique_ptr<Sequence> sequence(new Sequence(std::move(runtime), chosen));
  sequence->step_ = head.step;
  sequence->blocks_.set_reserve_tokens(options.reserve_tokens);
  VATTN_RETURN_IF_ERROR(sequence->Load(**reader, path, kAllTokens));
  sequence->Enlist();
  return sequence;
}

absl::StatusOr<std::unique_ptr<Sequence>> Sequence::FromPrefix(std::shared_ptr<Runtime> runtime,
                                                               const SequenceOptions& options,
                                                               SnapshotReader& reader,
                                                               const std::string& path,
                                                               int64_t tokens) {
  std::unique_ptr<Sequence> sequence(new Sequence(std::move(runtime), options));
  sequence->blocks_.set_reserve_tokens(options.reserve_tokens);
  VATTN_RETURN_IF_ERROR(sequence->Load(reader, path, tokens));
  sequence->ResetStates();  // the controller starts as that of any new sequence
  sequence->Enlist();
  return sequence;
}

absl::Status Sequence::Hibernate(const std::string& path) {
  if (hibernated()) return InvalidArgumentError("sequence hibernates already, must be awake");
  if (seat.load() != nullptr) {
    return InvalidArgumentError("sequence sits in slot ", slot,
                                " of a batch, must be taken out first");
  }
  absl::StatusOr<SaveTarget> target = FindSaveTarget(path, *runtime_->io().ops);
  VATTN_RETURN_IF_ERROR(CountAndLog(*runtime_, "save", target.status()));
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
  half_->Clear();
  ForgetLoaded();
  hibernate_path_ = std::move(path);
  CountTables();
}

void Sequence::ForgetLoaded() {
  blocks_.codes_to_load().clear();
  for (Layer& layer : layers_) {
    layer.coded = layer.codes_made = 0;
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
  VATTN_RETURN_IF_ERROR(CountAndLog(*runtime_, "restore", reader.status()));
  if ((*reader)->file_id() != hibernate_file_) {
    return CountAndLog(*runtime_, "restore",
                       DataLossError(hibernate_path_, ": is not the file any more that sequence ",
                                     id_, " went into: another one was put in its place"));
  }
  absl::Cleanup undo = [this] {
    ReleaseBlocks();
    ForgetLoaded();
  };
  VATTN_RETURN_IF_ERROR(Load(**reader, hibernate_path_, kAllTokens));
  std::move(undo).Cancel();
  hibernate_path_.clear();
  spill_ = SpillFile();
  return absl::OkStatus();
}

}  // namespace vattn
