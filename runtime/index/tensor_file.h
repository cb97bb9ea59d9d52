// Reader of the library's own small safetensors files: profiles and learned maps.
#ifndef VATTN_RUNTIME_INDEX_TENSOR_FILE_H_
#define VATTN_RUNTIME_INDEX_TENSOR_FILE_H_

#include <cstdint>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "memory/status.h"
#include "runtime/json_text.h"

namespace vattn {

// Trusts nothing in the file. Every error names it. NOT_FOUND, IO_ERROR, DATA_LOSS: cut short,
// damaged, or no safetensors file. INVALID_ARGUMENT: another format or shape.
class TensorFile {
 public:
  using Json = nlohmann::json;

  // what: "profile", for texts.
  TensorFile(std::string what, const std::string& path) : what_(std::move(what)), path_(path) {}

  // Reads the header; its metadata must say that the file has this format.
  absl::Status Open(const std::string& format);
  // Of the metadata; null if missing.
  Json Metadata(const std::string& key) const;
  // The F32 tensor `name`, whose shape must be the given one, called `extents` in texts; finite
  // numbers.
  absl::Status ReadTensor(const std::string& name, const Json& shape, const std::string& extents,
                          std::vector<float>* to);

  template <class... Args>
  absl::Status Invalid(const Args&... what) const {
    return InvalidArgumentError(Named(absl::StrCat(what...)));
  }
  // Values of a foreign file, short enough for a message.
  static std::string Shown(const Json& value) { return ShownJson(value); }

 private:
  std::string Named(const std::string& what) const { return what_ + " " + path_ + ": " + what; }
  template <class... Args>
  absl::Status Lost(const Args&... what) const {
    return DataLossError(Named(absl::StrCat(what...)));
  }
  absl::Status Read(uint64_t offset, void* to, uint64_t size);
  absl::Status ReadHeader();

  const std::string what_, path_;
  uint64_t bytes_ = 0;
  std::ifstream stream_;
  Json header_;
  uint64_t data_begin_ = 0;  // data offsets in the header count from here
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_INDEX_TENSOR_FILE_H_
