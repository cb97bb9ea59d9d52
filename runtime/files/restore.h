// Reads a sequence from a file (runtime/files/sequence_file.h says what it holds).
#ifndef VATTN_RUNTIME_FILES_RESTORE_H_
#define VATTN_RUNTIME_FILES_RESTORE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "memory/snapshot.h"
#include "runtime/block_tables.h"
#include "runtime/files/sequence_file.h"
#include "runtime/layer.h"

namespace vattn {

// The first `most` tokens of a file into `layers`, which hold none, and their blocks from the pool.
// DATA_LOSS if the file contradicts itself or the layout, IO_ERROR, FULL, OUT_OF_MEMORY: the layers
// may then hold blocks, and are not to be used.
absl::Status ReadSequence(Runtime& runtime, SnapshotReader& reader, const std::string& path,
                          int64_t most, std::vector<Layer>& layers, BlockTables& blocks);

}  // namespace vattn

#endif  // VATTN_RUNTIME_FILES_RESTORE_H_
