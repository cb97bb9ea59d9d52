#include "bench/trace/trace.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <system_error>

#include "bench/cli/dtype.h"
#include "bench/cli/failure.h"
#include "runtime/json_text.h"

namespace vattn::bench {
namespace {

constexpr uint64_t kMaxHeaderBytes = uint64_t{16} << 20;  // real ones have some hundred bytes

// Reads one file; every complaint starts with its name.
class Reader {
 public:
  explicit Reader(const std::string& path) : path_(path) {
    std::error_code error;
    if (!std::filesystem::is_regular_file(path, error)) Fail("no such file, or not a plain one");
    bytes_ = std::filesystem::file_size(path, error);
    if (error) Fail("cannot read its size: " + error.message());
    file_.open(path, std::ios::binary);
    if (!file_) Fail("cannot be opened for reading");
  }

  [[noreturn]] void Fail(const std::string& what) const {
    throw Failure("trace " + path_ + ": " + what);
  }

  uint64_t bytes() const { return bytes_; }

  // REQUIRES offset + size <= bytes().
  void Read(uint64_t offset, void* to, uint64_t size) {
    file_.clear();
    file_.seekg(static_cast<std::streamoff>(offset));
    file_.read(static_cast<char*>(to), static_cast<std::streamsize>(size));
    if (static_cast<uint64_t>(file_.gcount()) != size) {
      Fail("cut short while reading " + std::to_string(size) + " bytes at " +
           std::to_string(offset));
    }
  }

 private:
  std::string path_;
  uint64_t bytes_ = 0;
  std::ifstream file_;
};

nlohmann::json ReadHeader(Reader& reader, uint64_t* data_begin) {
  if (reader.bytes() < 8) {
    reader.Fail("header length: the file has " + std::to_string(reader.bytes()) +
                " bytes, a safetensors file at least 8");
  }
  unsigned char raw[8];
  reader.Read(0, raw, 8);
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | raw[i];
  const uint64_t limit = std::min(reader.bytes() - 8, kMaxHeaderBytes);
  if (length > limit) {
    reader.Fail("header length: " + std::to_string(length) + " bytes, at most " +
                std::to_string(limit) + " are possible");
  }
  std::string text(length, '\0');
  reader.Read(8, text.data(), length);
  if (NestsTooDeep(text))
    reader.Fail("header: nests deeper than " + std::to_string(kMaxJsonDepth) + " levels");
  nlohmann::json header = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!header.is_object()) reader.Fail("header: not a JSON object");
  *data_begin = 8 + length;
  return header;
}

int32_t ParseDType(const Reader& reader, const std::string& field, const nlohmann::json& entry) {
  const auto it = entry.find("dtype");
  if (it == entry.end() || !it->is_string()) reader.Fail(field + ".dtype: missing or no string");
  const auto& name = it->get_ref<const std::string&>();
  if (name == "F32") return VATTN_F32;
  if (name == "F16") return VATTN_F16;
  if (name == "BF16") return VATTN_BF16;
  reader.Fail(field + ".dtype: " + name.substr(0, 32) + ", supported are F32, F16 and BF16");
}

// Extents of four dimensions and the bytes that they need; refuses a product past 64 bits.
std::vector<int64_t> ParseShape(const Reader& reader, const std::string& field,
                                const nlohmann::json& entry, uint64_t element, uint64_t* need) {
  const auto it = entry.find("shape");
  if (it == entry.end() || !it->is_array() || it->size() != 4) {
    reader.Fail(field + ".shape: not a list of 4 extents");
  }
  std::vector<int64_t> shape;
  *need = element;
  for (const nlohmann::json& extent : *it) {
    if (!extent.is_number_unsigned() || extent.get<uint64_t>() == 0) {
      reader.Fail(field + ".shape: an extent is not a whole number of 1 or more");
    }
    if (__builtin_mul_overflow(*need, extent.get<uint64_t>(), need) || *need > INT64_MAX) {
      reader.Fail(field + ".shape: more bytes than 63 bits can count");
    }
    shape.push_back(extent.get<int64_t>());
  }
  return shape;
}

Tensor ReadTensor(Reader& reader, const nlohmann::json& header, uint64_t data_begin,
                  const std::string& field, bool required) {
  Tensor tensor;
  const auto it = header.find(field);
  if (it == header.end()) {
    if (required) reader.Fail("tensor " + field + ": missing");
    return tensor;
  }
  if (!it->is_object()) reader.Fail("tensor " + field + ": not a JSON object");
  tensor.dtype = ParseDType(reader, field, *it);
  uint64_t need = 0;
  tensor.shape = ParseShape(reader, field, *it, ElementBytes(tensor.dtype), &need);
  const auto offsets = it->find("data_offsets");
  if (offsets == it->end() || !offsets->is_array() || offsets->size() != 2 ||
      !(*offsets)[0].is_number_unsigned() || !(*offsets)[1].is_number_unsigned()) {
    reader.Fail(field + ".data_offsets: not a list of 2 whole numbers");
  }
  const uint64_t begin = (*offsets)[0].get<uint64_t>(), end = (*offsets)[1].get<uint64_t>();
  const uint64_t available = reader.bytes() - data_begin;
  if (begin > end || end > available) {
    reader.Fail(field + ".data_offsets: [" + std::to_string(begin) + ", " + std::to_string(end) +
                "), the file holds " + std::to_string(available) + " bytes of data");
  }
  if (end - begin != need) {
    reader.Fail(field + ".data_offsets: " + std::to_string(end - begin) +
                " bytes, its shape needs " + std::to_string(need));
  }
  tensor.bytes.resize(need);
  reader.Read(data_begin + begin, tensor.bytes.data(), need);
  return tensor;
}

void CheckFinite(const Reader& reader, const std::string& field, const Tensor& tensor) {
  constexpr size_t kChunk = 4096;
  float chunk[kChunk];
  const size_t element = ElementBytes(tensor.dtype), count = tensor.bytes.size() / element;
  for (size_t begin = 0; begin < count; begin += kChunk) {
    const size_t n = std::min(kChunk, count - begin);
    ToFloat(tensor.dtype, tensor.bytes.data() + begin * element, n, chunk);
    for (size_t i = 0; i < n; ++i) {
      if (!std::isfinite(chunk[i])) {
        reader.Fail("tensor " + field + ": element " + std::to_string(begin + i) +
                    " is not a finite number");
      }
    }
  }
}

std::map<std::string, std::string> ReadMetadata(const Reader& reader,
                                                const nlohmann::json& header) {
  std::map<std::string, std::string> metadata;
  const auto it = header.find("__metadata__");
  if (it == header.end() || !it->is_object()) {
    reader.Fail("__metadata__: missing or not a JSON object (prompt_tokens is read from it)");
  }
  for (const auto& [key, value] : it->items()) {
    if (!value.is_string()) reader.Fail("__metadata__." + key + ": not a string");
    metadata[key] = value.get<std::string>();
  }
  return metadata;
}

int64_t ParsePromptTokens(const Reader& reader, const Trace& trace) {
  const auto it = trace.metadata.find("prompt_tokens");
  if (it == trace.metadata.end()) reader.Fail("__metadata__.prompt_tokens: missing");
  const std::string& text = it->second;
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 1) {
    reader.Fail("__metadata__.prompt_tokens: \"" + text.substr(0, 32) +
                "\" is not a whole number of 1 or more");
  }
  return value;
}

void CheckExtent(const Reader& reader, const std::string& field, int64_t value, int64_t expected,
                 const std::string& of) {
  if (value == expected) return;
  reader.Fail(field + ".shape: " + std::to_string(value) + ", but " + of + " has " +
              std::to_string(expected));
}

void CheckShapes(const Reader& reader, const Trace& trace) {
  constexpr int64_t kMaxExtent =
      4096;  // tokens and steps apart; the library's own limits are lower
  for (const auto& [what, extent] :
       {std::pair<const char*, int64_t>{"k.shape: layers", trace.layers},
        {"k.shape: heads", trace.kv_heads},
        {"q.shape: heads", trace.q_heads},
        {"k.shape: head_dim", trace.head_dim_k},
        {"v.shape: head_dim", trace.head_dim_v}}) {
    if (extent <= kMaxExtent) continue;
    reader.Fail(std::string(what) + " " + std::to_string(extent) + ", at most " +
                std::to_string(kMaxExtent));
  }
  const auto check = [&](const char* field, const Tensor& tensor, size_t axis, int64_t expected,
                         const char* of) {
    CheckExtent(reader, std::string(field) + " axis " + std::to_string(axis), tensor.shape[axis],
                expected, of);
  };
  for (size_t axis = 0; axis < 3; ++axis) check("v", trace.v, axis, trace.k.shape[axis], "k");
  check("q", trace.q, 0, trace.layers, "k");
  check("q", trace.q, 3, trace.head_dim_k, "k");
  if (trace.q_heads % trace.kv_heads != 0) {
    reader.Fail("q.shape: " + std::to_string(trace.q_heads) + " heads are no multiple of the " +
                std::to_string(trace.kv_heads) + " heads of k");
  }
  // prompt_tokens is a number of the file's own: compare without adding to it.
  if (trace.steps > trace.tokens || trace.prompt_tokens > trace.tokens - trace.steps) {
    reader.Fail("k.shape: " + std::to_string(trace.tokens) + " tokens, prompt_tokens " +
                std::to_string(trace.prompt_tokens) + " and " + std::to_string(trace.steps) +
                " steps of q need their sum");
  }
  if (trace.prompt_queries == 0) return;
  check("q_prompt", trace.q_prompt, 0, trace.layers, "k");
  check("q_prompt", trace.q_prompt, 1, trace.q_heads, "q");
  check("q_prompt", trace.q_prompt, 3, trace.head_dim_k, "k");
  if (trace.prompt_queries > trace.prompt_tokens) {
    reader.Fail("q_prompt.shape: " + std::to_string(trace.prompt_queries) +
                " queries, the prompt has " + std::to_string(trace.prompt_tokens) + " tokens");
  }
}

void Widen(Tensor* tensor) {
  if (tensor->dtype == VATTN_F32 || tensor->bytes.empty()) return;
  const size_t count = tensor->bytes.size() / ElementBytes(tensor->dtype);
  std::vector<std::byte> wide(count * sizeof(float));
  ToFloat(tensor->dtype, tensor->bytes.data(), count, reinterpret_cast<float*>(wide.data()));
  tensor->bytes = std::move(wide);
  tensor->dtype = VATTN_F32;
}

std::vector<std::string> LayerNames(const Trace& trace) {
  std::vector<std::string> names;
  if (const auto it = trace.metadata.find("layers"); it != trace.metadata.end()) {
    std::istringstream list(it->second);
    for (std::string name; std::getline(list, name, ',');) names.push_back(name.substr(0, 16));
  }
  if (names.size() == static_cast<size_t>(trace.layers)) return names;
  names.clear();
  for (int64_t layer = 0; layer < trace.layers; ++layer) names.push_back(std::to_string(layer));
  return names;
}

}  // namespace

const std::byte* Tensor::Row(int64_t layer, int64_t head, int64_t token) const {
  const int64_t row = (layer * shape[1] + head) * shape[2] + token;
  return bytes.data() + row * shape[3] * static_cast<int64_t>(ElementBytes(dtype));
}

int64_t FirstQuery(const Trace& trace) { return trace.prompt_tokens - trace.prompt_queries; }

const std::byte* QueryRow(const Trace& trace, int64_t layer, int64_t q_head, int64_t position) {
  return position < trace.prompt_tokens
             ? trace.q_prompt.Row(layer, q_head, position - FirstQuery(trace))
             : trace.q.Row(layer, q_head, position - trace.prompt_tokens);
}

Trace ReadTrace(const std::string& path) {
  Reader reader(path);
  uint64_t data_begin = 0;
  const nlohmann::json header = ReadHeader(reader, &data_begin);
  Trace trace;
  trace.path = path;
  trace.metadata = ReadMetadata(reader, header);
  if (const auto it = trace.metadata.find("format");
      it != trace.metadata.end() && it->second != "vattn-trace-1") {
    reader.Fail("__metadata__.format: \"" + it->second.substr(0, 32) +
                "\", supported is vattn-trace-1");
  }
  trace.k = ReadTensor(reader, header, data_begin, "k", true);
  trace.v = ReadTensor(reader, header, data_begin, "v", true);
  trace.q = ReadTensor(reader, header, data_begin, "q", true);
  trace.q_prompt = ReadTensor(reader, header, data_begin, "q_prompt", false);
  trace.layers = trace.k.shape[0];
  trace.kv_heads = trace.k.shape[1];
  trace.tokens = trace.k.shape[2];
  trace.head_dim_k = trace.k.shape[3];
  trace.head_dim_v = trace.v.shape[3];
  trace.q_heads = trace.q.shape[1];
  trace.steps = trace.q.shape[2];
  trace.prompt_queries = trace.q_prompt.shape.empty() ? 0 : trace.q_prompt.shape[2];
  trace.prompt_tokens = ParsePromptTokens(reader, trace);
  CheckShapes(reader, trace);
  trace.dtype = trace.k.dtype;
  for (const auto& [field, tensor] : {std::pair<const char*, Tensor*>{"k", &trace.k},
                                      {"v", &trace.v},
                                      {"q", &trace.q},
                                      {"q_prompt", &trace.q_prompt}}) {
    CheckFinite(reader, field, *tensor);
    if (!tensor->shape.empty() && tensor->dtype != trace.dtype) trace.dtype = VATTN_F32;
  }
  if (trace.dtype == VATTN_F32) {
    for (Tensor* tensor : {&trace.k, &trace.v, &trace.q, &trace.q_prompt}) Widen(tensor);
  }
  trace.layer_names = LayerNames(trace);
  return trace;
}

}  // namespace vattn::bench
