#include "bench/trace/calibrate.h"

#include <charconv>
#include <nlohmann/json.hpp>

#include "bench/cli/dtype.h"

namespace vattn::bench {
namespace {

// Adds q q^T to the lower triangle of sum [dim, dim].
void AddOuter(const std::vector<float>& q, std::vector<double>* sum) {
  const size_t dim = q.size();
  for (size_t i = 0; i < dim; ++i) {
    double* row = sum->data() + i * dim;
    const double x = q[i];
    for (size_t j = 0; j <= i; ++j) row[j] += x * static_cast<double>(q[j]);
  }
}

std::string Shortest(float value) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof(text), value).ptr};
}

}  // namespace

std::vector<float> QueryMoments(const Tensor& queries, int64_t kv_heads,
                                std::span<const int32_t> layers, double scale) {
  const int64_t group = queries.shape[1] / kv_heads, count = queries.shape[2];
  const size_t dim = static_cast<size_t>(queries.shape[3]);
  const double factor = scale * scale / static_cast<double>(group * count);
  std::vector<float> moments, q(dim);
  for (const int32_t layer : layers) {
    for (int64_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
      std::vector<double> sum(dim * dim);
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (int64_t i = 0; i < count; ++i) {
          ToFloat(queries.dtype, queries.Row(layer, head, i), dim, q.data());
          AddOuter(q, &sum);
        }
      }
      for (size_t i = 0; i < dim; ++i) {
        for (size_t j = 0; j < dim; ++j) {
          const double lower = j <= i ? sum[i * dim + j] : sum[j * dim + i];
          moments.push_back(static_cast<float>(factor * lower));
        }
      }
    }
  }
  return moments;
}

std::string ProfileFile(const Trace& trace, std::span<const int32_t> layers, float scale,
                        const std::vector<float>& moments) {
  nlohmann::json metadata = {{"format", "vattn-profile-1"}, {"softmax_scale", Shortest(scale)}};
  for (const char* key : {"model", "text"}) {
    if (const auto it = trace.metadata.find(key); it != trace.metadata.end()) {
      metadata[key] = it->second;
    }
  }
  std::string names;
  for (const int32_t layer : layers) {
    names += (names.empty() ? "" : ",") + trace.layer_names[layer];
  }
  metadata["layers"] = names;
  const size_t bytes = moments.size() * sizeof(float);
  const nlohmann::json header = {
      {"__metadata__", metadata},
      {"c_q",
       {{"dtype", "F32"},
        {"shape", {layers.size(), trace.kv_heads, trace.head_dim_k, trace.head_dim_k}},
        {"data_offsets", {0, bytes}}}}};
  // A layer's name may be cut within a character: never throw over it.
  std::string text = header.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  text.resize((text.size() + 7) / 8 * 8, ' ');  // data at a multiple of 8
  std::string file;
  for (int i = 0; i < 8; ++i) file += static_cast<char>(uint64_t{text.size()} >> 8 * i);
  file += text;
  file.append(reinterpret_cast<const char*>(moments.data()), bytes);
  return file;
}

}  // namespace vattn::bench
