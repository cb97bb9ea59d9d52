// Files of index tables that were learnt from a text, for keys of other texts of the same model.
#ifndef VATTN_RUNTIME_FILES_TABLES_FILE_H_
#define VATTN_RUNTIME_FILES_TABLES_FILE_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/index/index.h"
#include "runtime/runtime.h"

namespace vattn {

// [layers][KV heads of the layer]
using ModelTables = std::vector<std::vector<std::shared_ptr<const Index>>>;

// Longest name of a model in a file.
inline constexpr size_t kMostModelBytes = 4096;

// A snapshot (memory/snapshot.h) of three records: the model's name, the numbers of its heads, and the
// floats of the tables of every KV head. The file appears whole or not at all. IO_ERROR, and INVALID_ARGUMENT for a path or a
// name that cannot be.
absl::Status WriteTables(Runtime& runtime, const std::string& path, const std::string& model,
                         const ModelTables& tables);

// The tables of a runtime's KV heads, which may be some of the file's (first_kv_head). Trusts nothing in
// the file. NOT_FOUND, IO_ERROR, DATA_LOSS: damaged, or for a runtime of another shape of rows,
// softmax_scale or index. INVALID_ARGUMENT if it lacks heads of the runtime or has groups of another
// size, or was saved for another model than `model`, unless that is empty.
absl::StatusOr<ModelTables> ReadTables(Runtime& runtime, const std::string& path,
                                       const std::string& model);

}  // namespace vattn

#endif  // VATTN_RUNTIME_FILES_TABLES_FILE_H_
