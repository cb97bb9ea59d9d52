#include "runtime/index/tensor_file.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <system_error>

namespace vattn {
namespace {

constexpr uint64_t kMaxHeaderBytes = uint64_t{16} << 20;  // real ones have some hundred bytes

}  // namespace

absl::Status TensorFile::Open(const std::string& format) {
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::status(path_, error);
  if (!std::filesystem::exists(status)) return NotFoundError(Named("no such file"));
  if (!std::filesystem::is_regular_file(status)) return IoError(Named("is no plain file"));
  bytes_ = std::filesystem::file_size(path_, error);
  if (error) return IoError(Named("cannot read its size: " + error.message()));
  stream_.open(path_, std::ios::binary);
  if (!stream_) return IoError(Named("cannot be opened for reading"));
  VATTN_RETURN_IF_ERROR(ReadHeader());
  const Json metadata = header_.value("__metadata__", Json::object());
  if (!metadata.is_object())
    return Invalid("__metadata__ is ", Shown(metadata), ", must be an object");
  if (Metadata("format") != format) {
    return Invalid("__metadata__.format is ", Shown(Metadata("format")), ", must be \"", format,
                   "\"");
  }
  return absl::OkStatus();
}

TensorFile::Json TensorFile::Metadata(const std::string& key) const {
  return header_.value("__metadata__", Json::object()).value(key, Json());
}

absl::Status TensorFile::Read(uint64_t offset, void* to, uint64_t size) {
  if (size > bytes_ || offset > bytes_ - size) {
    return Lost("has ", bytes_, " bytes, ", size, " at ", offset, " are read");
  }
  stream_.seekg(static_cast<std::streamoff>(offset));
  stream_.read(static_cast<char*>(to), static_cast<std::streamsize>(size));
  return stream_ ? absl::OkStatus()
                 : IoError(Named(absl::StrCat("cannot read ", size, " bytes at ", offset)));
}

absl::Status TensorFile::ReadHeader() {
  unsigned char raw[8];
  VATTN_RETURN_IF_ERROR(Read(0, raw, sizeof(raw)));
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | raw[i];
  const uint64_t most = std::min(bytes_ - sizeof(raw), kMaxHeaderBytes);
  if (length > most) return Lost("the header length is ", length, ", must be at most ", most);
  std::string text(length, '\0');
  VATTN_RETURN_IF_ERROR(Read(sizeof(raw), text.data(), length));
  if (NestsTooDeep(text)) return Lost("the header nests deeper than ", kMaxJsonDepth, " levels");
  header_ = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!header_.is_object()) return Lost("the header is no JSON object");
  data_begin_ = sizeof(raw) + length;
  return absl::OkStatus();
}

absl::Status TensorFile::ReadTensor(const std::string& name, const Json& shape,
                                    const std::string& extents, std::vector<float>* to) {
  const Json entry = header_.value(name, Json());
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
  const uint64_t available = bytes_ - data_begin_;
  if (begin > end || end - begin != count * sizeof(float) || end > available) {
    return Lost(name, ".data_offsets is ", Shown(offsets), ", must be ", count * sizeof(float),
                " bytes of the ", available, " that the file holds");
  }
  to->resize(count);
  VATTN_RETURN_IF_ERROR(Read(data_begin_ + begin, to->data(), end - begin));
  for (size_t i = 0; i < to->size(); ++i) {
    if (!std::isfinite((*to)[i]))
      return Lost(name, " element ", i, " is ", (*to)[i], ", must be finite");
  }
  return absl::OkStatus();
}

}  // namespace vattn
