// Learned maps of VATTN_INDEX_SIGN, the same for all sequences of a runtime (HashAttention;
// METHOD.md, "Other kinds of index").
#ifndef VATTN_RUNTIME_INDEX_SIGN_MAPS_H_
#define VATTN_RUNTIME_INDEX_SIGN_MAPS_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/index/index.h"
#include "runtime/options.h"

namespace vattn {

// `vattn-sign-1`, a safetensors file with two F32 tensors
//   key, query  [num_layers, most KV heads of a layer, 8 * index_bytes, head_dim_k]
// and metadata `format` = "vattn-sign-1": bit j of a key k is [key_j . (k - mean key of the sequence) >= 0],
// of a query q [query_j . q >= 0]. A layer with fewer KV heads than another one leaves its last maps unused.
class SignMaps {
 public:
  // options are resolved; the file has their shape. Errors as TensorFile.
  static absl::StatusOr<SignMaps> Read(const std::string& path, const Options& options);

  SignMap Map(int layer, int kv_head) const;

 private:
  size_t kv_heads_ = 0, floats_ = 0;  // of a map
  std::vector<float> key_, query_;
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_INDEX_SIGN_MAPS_H_
