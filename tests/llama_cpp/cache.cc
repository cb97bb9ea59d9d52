#include "tests/llama_cpp/cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "ggml-cpu.h"

namespace vattn::llama_cpp {
namespace {

using Context = std::unique_ptr<ggml_context, decltype(&ggml_free)>;

Context MakeContext() {
  return Context(ggml_init({.mem_size = ggml_tensor_overhead() * 32 + ggml_graph_overhead(),
                            .mem_buffer = nullptr,
                            .no_alloc = true}),
                 ggml_free);
}

// Size of the i-th direction of keys and queries.
float Spread(int64_t i) { return 2.5f / std::sqrt(1.0f + static_cast<float>(i)); }

// All fp16 numbers: ggml converts by a call.
const std::vector<double> kHalves = [] {
  std::vector<double> all(65536);
  for (size_t i = 0; i < all.size(); ++i)
    all[i] = static_cast<double>(ggml_fp16_to_fp32(static_cast<uint16_t>(i)));
  return all;
}();

double Float(uint16_t half) { return kHalves[half]; }

}  // namespace

Cache::Cache(const Sizes& sizes, uint64_t seed)
    : sizes_(sizes),
      random_(seed),
      context_(MakeContext()),
      buffer_(nullptr, ggml_backend_buffer_free) {
  const int64_t width = sizes.kv_heads * sizes.dim;
  k_ = ggml_new_tensor_3d(context_.get(), GGML_TYPE_F16, width, sizes.cells, sizes.streams);
  v_ = ggml_new_tensor_3d(context_.get(), GGML_TYPE_F16, width, sizes.cells, sizes.streams);
  buffer_.reset(
      ggml_backend_alloc_ctx_tensors_from_buft(context_.get(), ggml_backend_cpu_buffer_type()));
  ggml_backend_buffer_clear(buffer_.get(), 0);
}

uint16_t* Cache::Row(ggml_tensor* of, int64_t cell, int64_t stream) const {
  return static_cast<uint16_t*>(of->data) +
         (stream * sizes_.cells + cell) * sizes_.kv_heads * sizes_.dim;
}

void Cache::Fill(int64_t cell, int64_t stream) {
  std::normal_distribution<float> normal;
  uint16_t* const k = Row(k_, cell, stream);
  uint16_t* const v = Row(v_, cell, stream);
  for (int64_t i = 0; i < sizes_.kv_heads * sizes_.dim; ++i) {
    k[i] = ggml_fp32_to_fp16(normal(random_) * Spread(i % sizes_.dim));
    v[i] = ggml_fp32_to_fp16(normal(random_) + (i % sizes_.dim == 0 ? 1.0f : 0.0f));
  }
}

void Cache::Fill(int64_t begin, int64_t end, int64_t stream) {
  for (int64_t cell = begin; cell < end; ++cell) Fill(cell, stream);
}

void Cache::Shift(int64_t begin, int64_t end, double angle) {
  for (int64_t cell = begin; cell < end; ++cell) {
    for (int64_t h = 0; h < sizes_.kv_heads; ++h) {
      uint16_t* const key = Row(k_, cell, 0) + h * sizes_.dim;
      const double a = Float(key[0]), b = Float(key[1]);
      key[0] = ggml_fp32_to_fp16(static_cast<float>(a * std::cos(angle) - b * std::sin(angle)));
      key[1] = ggml_fp32_to_fp16(static_cast<float>(a * std::sin(angle) + b * std::cos(angle)));
    }
  }
}

void Cache::Spoil(int64_t cell) {
  std::fill_n(Row(k_, cell, 0), sizes_.kv_heads * sizes_.dim, uint16_t{0x7E00});
  std::fill_n(Row(v_, cell, 0), sizes_.kv_heads * sizes_.dim, uint16_t{0x7E00});
}

std::vector<float> Cache::Queries(int64_t tokens) {
  std::normal_distribution<float> normal;
  std::vector<float> q(static_cast<size_t>(tokens * sizes_.q_heads * sizes_.dim));
  for (size_t i = 0; i < q.size(); ++i)
    q[i] = normal(random_) * Spread(static_cast<int64_t>(i) % sizes_.dim) * 1.5f;
  return q;
}

Mask RunMask(int64_t begin, int64_t end, int64_t tokens, int64_t cells) {
  Mask mask(static_cast<size_t>(tokens), std::vector<bool>(static_cast<size_t>(cells)));
  for (int64_t i = 0; i < tokens; ++i) {
    for (int64_t c = begin; c < end - tokens + 1 + i; ++c) mask[i][c] = true;
  }
  return mask;
}

double Answer::worst() const {
  double most = 0;
  for (const double error : errors) most = std::isfinite(error) ? std::max(most, error) : INFINITY;
  return most;
}

double Answer::Mean() const {
  return std::accumulate(errors.begin(), errors.end(), 0.0) / static_cast<double>(errors.size());
}

double Answer::Misses(double epsilon) const {
  const auto over = std::count_if(errors.begin(), errors.end(),
                                  [&](double error) { return !(error <= epsilon); });
  return static_cast<double>(over) / static_cast<double>(errors.size());
}

namespace {

// The error of one head's answer, relative to max(|o|, |v| / 2), |v| weighted by attention.
double ErrorOf(const Cache& cache, const std::vector<bool>& seen, const float* q, const float* out,
               int64_t head, int64_t stream, double scale) {
  const Sizes& s = cache.sizes();
  const int64_t kv = head / (s.q_heads / s.kv_heads);
  const auto row = [&](const ggml_tensor* of, int64_t cell) {
    return static_cast<const uint16_t*>(of->data) +
           ((stream * s.cells + cell) * s.kv_heads + kv) * s.dim;
  };
  const double* const halves = kHalves.data();
  std::vector<double> exact(static_cast<size_t>(s.dim));
  double most = -INFINITY, sum = 0, norm2 = 0;
  for (size_t c = 0; c < seen.size(); ++c) {
    if (!seen[c]) continue;
    const uint16_t* const k = row(cache.k(), static_cast<int64_t>(c));
    double dots[4] = {};
    for (int64_t i = 0; i < s.dim; ++i) dots[i % 4] += static_cast<double>(q[i]) * halves[k[i]];
    const double score = (dots[0] + dots[1] + dots[2] + dots[3]) * scale;
    if (score > most) {
      const double by = std::exp(most - score);
      for (double& x : exact) x *= by;
      sum *= by, norm2 *= by;
      most = score;
    }
    const double weight = std::exp(score - most);
    // What is under a millionth of a millionth of the sum does not count.
    sum += weight;
    if (weight < sum * 1e-12) continue;
    const uint16_t* const v = row(cache.v(), static_cast<int64_t>(c));
    double square = 0;
    for (int64_t i = 0; i < s.dim; ++i) {
      const double x = halves[v[i]];
      exact[i] += weight * x;
      square += x * x;
    }
    norm2 += weight * square;
  }
  double error2 = 0, length2 = 0;
  for (int64_t i = 0; i < s.dim; ++i) {
    const double o = exact[i] / sum, by = static_cast<double>(out[i]) - o;
    error2 += by * by, length2 += o * o;
  }
  return std::sqrt(error2) / std::max(std::sqrt(length2), 0.5 * std::sqrt(norm2 / sum));
}

}  // namespace

Answer Attend(ggml_backend_t backend, Cache& cache, const std::vector<Mask>& masks, float scale_by,
              const std::vector<float>* queries) {
  const Sizes& s = cache.sizes();
  const int64_t streams = static_cast<int64_t>(masks.size()),
                tokens = static_cast<int64_t>(masks[0].size()),
                cells = static_cast<int64_t>(masks[0][0].size());
  const float scale = scale_by / std::sqrt(static_cast<float>(s.dim));
  Context context = MakeContext();
  ggml_context* const g = context.get();
  // As llama.cpp builds them: views of the cache, and queries, whose heads are the third dimension.
  const auto view = [&](ggml_tensor* t) {
    return ggml_permute(
        g, ggml_view_4d(g, t, s.dim, s.kv_heads, cells, streams, s.dim * 2, t->nb[1], t->nb[2], 0),
        0, 2, 1, 3);
  };
  ggml_tensor* const q_rows =
      ggml_new_tensor_4d(g, GGML_TYPE_F32, s.dim, s.q_heads, tokens, streams);
  ggml_tensor* const mask = ggml_new_tensor_4d(g, GGML_TYPE_F16, cells, tokens, 1, streams);
  ggml_tensor* const out = ggml_flash_attn_ext(g, ggml_permute(g, q_rows, 0, 2, 1, 3),
                                               view(cache.k()), view(cache.v()), mask, scale, 0, 0);
  if (!ggml_backend_supports_op(backend, out)) throw std::runtime_error("not supported");
  ggml_cgraph* const graph = ggml_new_graph(g);
  ggml_build_forward_expand(graph, out);
  const std::unique_ptr<ggml_backend_buffer, decltype(&ggml_backend_buffer_free)> buffer(
      ggml_backend_alloc_ctx_tensors_from_buft(g, ggml_backend_cpu_buffer_type()),
      ggml_backend_buffer_free);
  const std::vector<float> q = queries != nullptr ? *queries : cache.Queries(tokens * streams);
  std::memcpy(q_rows->data, q.data(), q.size() * sizeof(float));
  const uint16_t visible = ggml_fp32_to_fp16(0), hidden = ggml_fp32_to_fp16(-INFINITY);
  for (int64_t i = 0; i < streams * tokens; ++i) {
    const std::vector<bool>& seen = masks[i / tokens][i % tokens];
    for (int64_t c = 0; c < cells; ++c)
      static_cast<uint16_t*>(mask->data)[i * cells + c] = seen[c] ? visible : hidden;
  }
  if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS)
    throw std::runtime_error("not computed");
  Answer answer;
  answer.out.resize(q.size());
  std::memcpy(answer.out.data(), out->data, q.size() * sizeof(float));
  // Of a long chunk, a few tokens.
  const int64_t every = std::max<int64_t>(1, tokens / 16);
  for (int64_t i = every - 1; i < streams * tokens; i += every) {
    for (int64_t h = 0; h < s.q_heads; ++h) {
      const int64_t at = (i * s.q_heads + h) * s.dim;
      answer.errors.push_back(ErrorOf(cache, masks[i / tokens][i % tokens], q.data() + at,
                                      answer.out.data() + at, h, i / tokens, scale));
    }
  }
  return answer;
}

uint64_t Counter(ggml_backend_t backend, const std::string& name) {
  const auto counters =
      reinterpret_cast<const char* (*)(ggml_backend_t)>(ggml_backend_reg_get_proc_address(
          ggml_backend_dev_backend_reg(ggml_backend_get_device(backend)),
          "ggml_backend_vattn_counters"));
  const std::string json = counters(backend);
  const size_t at = json.find("\"" + name + "\": ");
  if (at == std::string::npos) throw std::runtime_error(name + " is no counter");
  return std::stoull(json.substr(at + name.size() + 4));
}

}  // namespace vattn::llama_cpp
