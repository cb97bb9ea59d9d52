// Model profiles: what an index is calibrated on when a sequence brings no queries (METHOD.md,
// "Index").
#ifndef VATTN_RUNTIME_INDEX_PROFILE_H_
#define VATTN_RUNTIME_INDEX_PROFILE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/index/index.h"
#include "runtime/options.h"

namespace vattn {

// `vattn-profile-1`, a safetensors file with one F32 tensor
//   c_q  [layers, kv_heads, head_dim_k, head_dim_k]   mean of q q^T over the scaled queries that
//   read
//                                                     one KV head
// and metadata `format` = "vattn-profile-1" and `softmax_scale`, the factor in those queries. A
// layer with fewer KV heads than another one leaves its last matrices unused.
class Profile {
 public:
  // options are resolved; the file has their shape. Trusts nothing in the file. NOT_FOUND,
  // IO_ERROR, DATA_LOSS: cut short, damaged, or no safetensors file. INVALID_ARGUMENT: another
  // format or shape.
  static absl::StatusOr<Profile> Read(const std::string& path, const Options& options);

  // Of queries with the options' softmax_scale.
  QueryMoment Moment(int layer, int kv_head) const;

 private:
  int kv_heads_ = 0, dim_ = 0;
  std::vector<float> c_q_;
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_INDEX_PROFILE_H_
