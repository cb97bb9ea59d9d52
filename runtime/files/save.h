// Writes a sequence into a file (runtime/files/sequence_file.h says what it holds).
#ifndef VATTN_RUNTIME_FILES_SAVE_H_
#define VATTN_RUNTIME_FILES_SAVE_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "memory/save_target.h"
#include "memory/snapshot_format.h"
#include "runtime/files/sequence_file.h"
#include "runtime/layer.h"

namespace vattn {

// What became of a file that was written.
struct SavedFile {
  uint64_t bytes;
  SnapshotFileId id;  // of no other file
};

// About the bytes that WriteSequence writes for these layers, and hardly ever fewer.
uint64_t SavedBytes(const Runtime& runtime, const std::vector<Layer>& layers);

// Writes the layers; with `prefix` as many tokens of them as it has. durable: the file outlives a
// loss of power as soon as the call returns.
absl::StatusOr<SavedFile> WriteSequence(Runtime& runtime, const SavedHead& head,
                                        const std::vector<Layer>& layers, const SaveTarget& target,
                                        const StoredPrefix* prefix, bool durable);

}  // namespace vattn

#endif  // VATTN_RUNTIME_FILES_SAVE_H_
