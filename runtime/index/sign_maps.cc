#include "runtime/index/sign_maps.h"

#include <algorithm>

#include "runtime/index/tensor_file.h"

namespace vattn {

absl::StatusOr<SignMaps> SignMaps::Read(const std::string& path, const Options& options) {
  TensorFile file("sign_maps", path);
  VATTN_RETURN_IF_ERROR(file.Open("vattn-sign-1"));
  const int32_t heads =
      *std::max_element(options.layer_kv_heads.begin(), options.layer_kv_heads.end());
  const int32_t bits = 8 * options.index_bytes;
  const TensorFile::Json shape = {options.num_layers, heads, bits, options.head_dim_k};
  const char* const extents = "num_layers, most KV heads of a layer, 8 * index_bytes, head_dim_k";
  SignMaps maps;
  VATTN_RETURN_IF_ERROR(file.ReadTensor("key", shape, extents, &maps.key_));
  VATTN_RETURN_IF_ERROR(file.ReadTensor("query", shape, extents, &maps.query_));
  maps.kv_heads_ = static_cast<size_t>(heads);
  maps.floats_ = static_cast<size_t>(bits) * static_cast<size_t>(options.head_dim_k);
  return maps;
}

SignMap SignMaps::Map(int layer, int kv_head) const {
  const size_t at =
      (static_cast<size_t>(layer) * kv_heads_ + static_cast<size_t>(kv_head)) * floats_;
  return {.key = key_.data() + at, .query = query_.data() + at};
}

}  // namespace vattn
