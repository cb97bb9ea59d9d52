#include "runtime/attend_request.h"

#include "runtime/runtime.h"

namespace vattn {

absl::Status CheckLayer(const Runtime& runtime, int32_t layer) {
  const int32_t layers = runtime.options().num_layers;
  if (layer < 0 || layer >= layers) return OutOfRangeError("layer", layer, 0, layers - 1);
  if (runtime.kv_heads(layer) > 0) return absl::OkStatus();
  return InvalidArgumentError("layer is ", layer,
                              ", which layer_kv_heads leaves out, must be one that it keeps");
}

absl::Status CheckScores(const Runtime& runtime, const AttendRequest& r) {
  const Promise& promise = runtime.promise();
  const bool external = promise.index == IndexKind::kExternal;
  const bool wanted = external && !r.dense && promise.policy != Policy::kDense;
  if (r.scores == nullptr ? wanted : !external) {
    return InvalidArgumentError("scores is ", r.scores == nullptr ? "NULL" : "given", ", must be ",
                                external ? "given" : "NULL",
                                " with index = ", static_cast<int32_t>(promise.index));
  }
  const int32_t q_heads = runtime.options().num_q_heads, kv_heads = runtime.kv_heads(r.layer);
  if (r.scores != nullptr && r.score_heads != 0 && r.score_heads != kv_heads &&
      r.score_heads != q_heads) {
    return InvalidArgumentError("score_heads is ", r.score_heads, ", must be 0, the ", kv_heads,
                                " KV heads of the layer or the ", q_heads, " query heads");
  }
  return absl::OkStatus();
}

}  // namespace vattn
