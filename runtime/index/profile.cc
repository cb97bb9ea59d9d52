#include "runtime/index/profile.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <utility>

#include "runtime/index/tensor_file.h"

namespace vattn {
namespace {

absl::Status ReadScale(const TensorFile& file, float* softmax_scale) {
  const TensorFile::Json scale = file.Metadata("softmax_scale");
  const std::string text = scale.is_string() ? scale.get<std::string>() : "";
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *softmax_scale);
  const bool whole = error == std::errc() && end == text.data() + text.size();
  if (!whole || !std::isfinite(*softmax_scale) || *softmax_scale <= 0) {
    return file.Invalid("__metadata__.softmax_scale is ", TensorFile::Shown(scale),
                        ", must be a string with a finite number over 0");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Profile> Profile::Read(const std::string& path, const Options& options) {
  TensorFile file("profile", path);
  VATTN_RETURN_IF_ERROR(file.Open("vattn-profile-1"));
  float softmax_scale = 0;
  VATTN_RETURN_IF_ERROR(ReadScale(file, &softmax_scale));
  Profile profile;
  profile.dim_ = options.head_dim_k;
  profile.kv_heads_ =
      *std::max_element(options.layer_kv_heads.begin(), options.layer_kv_heads.end());
  VATTN_RETURN_IF_ERROR(file.ReadTensor(
      "c_q", {options.num_layers, profile.kv_heads_, profile.dim_, profile.dim_},
      "num_layers, most KV heads of a layer, head_dim_k, head_dim_k", &profile.c_q_));
  const double ratio = static_cast<double>(options.softmax_scale) / softmax_scale;
  for (float& x : profile.c_q_) x = static_cast<float>(x * ratio * ratio);
  return profile;
}

QueryMoment Profile::Moment(int layer, int kv_head) const {
  const size_t size = static_cast<size_t>(dim_) * static_cast<size_t>(dim_);
  const float* mean = c_q_.data() + (static_cast<size_t>(layer) * kv_heads_ + kv_head) * size;
  return QueryMoment::FromMean(dim_, {mean, mean + size});
}

}  // namespace vattn
