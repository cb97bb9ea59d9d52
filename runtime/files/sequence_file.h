// Saved sequences: what their files hold, and what can be asked of one without a sequence.
#ifndef VATTN_RUNTIME_FILES_SEQUENCE_FILE_H_
#define VATTN_RUNTIME_FILES_SEQUENCE_FILE_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "memory/snapshot.h"
#include "runtime/prefix/prefix.h"
#include "runtime/runtime.h"

namespace vattn {

// Records of a snapshot, in this order:
//   kHead    SavedHead
//   kPrefix  SavedPrefix, salt, token ids; in the files of stored prefixes only
//   kKvHead  for each layer, for each of its KV heads: SavedKvHead, HeadState [G], SavedSegment [segments], then the
//            floats of each segment's tables and the doubles of the query moment
//   kBlock   in the order of the KV heads, for each of its blocks: the block; bytes that belong to no
//            token are zero
enum SavedRecord : uint32_t { kHead = 1, kPrefix = 2, kKvHead = 3, kBlock = 4 };

struct SavedHead {
  uint64_t id, step;
};

struct SavedPrefix {
  uint64_t stored;  // a number that grows from one stored prefix to the next
  uint64_t salt_bytes;
};

struct SavedKvHead {
  int64_t tokens, coded;
  int64_t segments;        // 0: no index yet
  int64_t moment_doubles;  // 0: no queries seen
};

// A Segment of the layer; the same in all of its KV heads.
struct SavedSegment {
  int64_t first_block, made_from, provisional;
};

// Everything that rows, codes and tables depend on.
uint64_t LayoutOf(const Options& options, const Storage& storage);

absl::StatusOr<std::unique_ptr<SnapshotReader>> OpenSaved(const std::string& path, uint64_t layout,
                                                          const IoOptions& io, SavedHead& head);

struct StoredPrefix {
  Prefix prefix;
  uint64_t stored = 0;
};
// DATA_LOSS if the file has none.
absl::StatusOr<StoredPrefix> ReadPrefix(SnapshotReader& reader, const std::string& path);

}  // namespace vattn

#endif  // VATTN_RUNTIME_FILES_SEQUENCE_FILE_H_
