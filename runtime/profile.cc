#include "runtime/profile.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <system_error>
#include <utility>

#include "memory/status.h"

namespace vattn {
namespace {

using Json = nlohmann::json;

constexpr char kFormat[] = "vattn-profile-1";
constexpr uint64_t kMaxHeaderBytes = uint64_t{16} << 20;  // real ones have some hundred bytes

// Values of a foreign file, short enough for a message.
std::string Shown(const Json& value) { return value.dump().substr(0, 80); }

// One safetensors file. Every error names it.
class File {
 public:
  explicit File(const std::string& path) : path_(path) {}

  absl::Status Open() {
    std::error_code error;
    const std::filesystem::file_status status = std::filesystem::status(path_, error);
    if (!std::filesystem::exists(status)) return NotFoundError(Named("no such file"));
    if (!std::filesystem::is_regular_file(status)) return IoError(Named("is no plain file"));
    bytes_ = std::filesystem::file_size(path_, error);
    if (error) return IoError(Named("cannot read its size: " + error.message()));
    stream_.open(path_, std::ios::binary);
    return stream_ ? absl::OkStatus() : IoError(Named("cannot be opened for reading"));
  }

  std::string Named(const std::string& what) const { return "profile " + path_ + ": " + what; }
  template <class... Args>
  absl::Status Lost(const Args&... what) const {
    return DataLossError(Named(absl::StrCat(what...)));
  }
  template <class... Args>
  absl::Status Invalid(const Args&... what) const {
    return InvalidArgumentError(Named(absl::StrCat(what...)));
  }

  absl::Status Read(uint64_t offset, void* to, uint64_t size) {
    if (size > bytes_ || offset > bytes_ - size) {
      return Lost("has ", bytes_, " bytes, ", size, " at ", offset, " are read");
    }
    stream_.seekg(static_cast<std::streamoff>(offset));
    stream_.read(static_cast<char*>(to), static_cast<std::streamsize>(size));
    return stream_ ? absl::OkStatus()
                   : IoError(Named(absl::StrCat("cannot read ", size, " bytes at ", offset)));
  }

  // Data offsets in the header count from *data_begin.
  absl::Status ReadHeader(Json* header, uint64_t* data_begin) {
    unsigned char raw[8];
    VATTN_RETURN_IF_ERROR(Read(0, raw, sizeof(raw)));
    uint64_t length = 0;
    for (int i = 7; i >= 0; --i) length = length << 8 | raw[i];
    const uint64_t most = std::min(bytes_ - sizeof(raw), kMaxHeaderBytes);
    if (length > most) return Lost("the header length is ", length, ", must be at most ", most);
    std::string text(length, '\0');
    VATTN_RETURN_IF_ERROR(Read(sizeof(raw), text.data(), length));
    *header = Json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (!header->is_object()) return Lost("the header is no JSON object");
    *data_begin = sizeof(raw) + length;
    return absl::OkStatus();
  }

  // The F32 tensor `name`, whose shape must be the given one.
  absl::Status ReadTensor(const Json& header, uint64_t data_begin, const std::string& name,
                          const Json& shape, const std::string& extents, std::vector<float>* to) {
    const Json entry = header.value(name, Json());
    if (!entry.is_object()) return Invalid("tensor ", name, " is missing");
    const Json dtype = entry.value("dtype", Json()), given = entry.value("shape", Json());
    if (dtype != "F32") return Invalid(name, ".dtype is ", Shown(dtype), ", must be \"F32\"");
    if (given != shape) {
      return Invalid(name, ".shape is ", Shown(given), ", must be ", shape.dump(), " (", extents,
                     ")");
    }
    uint64_t count = 1;  // below 2^40: every extent is one of the options
    for (const Json& extent : shape) count *= extent.get<uint64_t>();
    const Json offsets = entry.value("data_offsets", Json());
    if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
        !offsets[1].is_number_unsigned()) {
      return Lost(name, ".data_offsets is ", Shown(offsets), ", must be two whole numbers");
    }
    const uint64_t begin = offsets[0].get<uint64_t>(), end = offsets[1].get<uint64_t>();
    const uint64_t available = bytes_ - data_begin;
    if (begin > end || end - begin != count * sizeof(float) || end > available) {
      return Lost(name, ".data_offsets is ", Shown(offsets), ", must be ", count * sizeof(float),
                  " bytes of the ", available, " that the file holds");
    }
    to->resize(count);
    VATTN_RETURN_IF_ERROR(Read(data_begin + begin, to->data(), end - begin));
    for (size_t i = 0; i < to->size(); ++i) {
      if (!std::isfinite((*to)[i]))
        return Lost(name, " element ", i, " is ", (*to)[i], ", must be finite");
    }
    return absl::OkStatus();
  }

 private:
  const std::string path_;
  uint64_t bytes_ = 0;
  std::ifstream stream_;
};

absl::Status ReadMetadata(const File& file, const Json& header, float* softmax_scale) {
  const Json metadata = header.value("__metadata__", Json::object());
  if (!metadata.is_object())
    return file.Invalid("__metadata__ is ", Shown(metadata), ", must be an object");
  const Json format = metadata.value("format", Json());
  if (format != kFormat) {
    return file.Invalid("__metadata__.format is ", Shown(format), ", must be \"", kFormat, "\"");
  }
  const Json scale = metadata.value("softmax_scale", Json());
  const std::string text = scale.is_string() ? scale.get<std::string>() : "";
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *softmax_scale);
  const bool whole = error == std::errc() && end == text.data() + text.size();
  if (!whole || !std::isfinite(*softmax_scale) || *softmax_scale <= 0) {
    return file.Invalid("__metadata__.softmax_scale is ", Shown(scale),
                        ", must be a string with a finite number over 0");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Profile> Profile::Read(const std::string& path, const Options& options) {
  File file(path);
  VATTN_RETURN_IF_ERROR(file.Open());
  Json header;
  uint64_t data_begin = 0;
  VATTN_RETURN_IF_ERROR(file.ReadHeader(&header, &data_begin));
  float softmax_scale = 0;
  VATTN_RETURN_IF_ERROR(ReadMetadata(file, header, &softmax_scale));
  Profile profile;
  profile.dim_ = options.head_dim_k;
  profile.kv_heads_ =
      *std::max_element(options.layer_kv_heads.begin(), options.layer_kv_heads.end());
  const Json shape = {options.num_layers, profile.kv_heads_, profile.dim_, profile.dim_};
  VATTN_RETURN_IF_ERROR(file.ReadTensor(
      header, data_begin, "c_q", shape,
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
