// A layer's KV cache as llama.cpp has it, and calls of attention over it that are checked against float64.
#ifndef VATTN_TESTS_LLAMA_CPP_CACHE_H_
#define VATTN_TESTS_LLAMA_CPP_CACHE_H_

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "ggml.h"

namespace vattn::llama_cpp {

struct Sizes {
  int64_t q_heads = 4, kv_heads = 2, dim = 64, cells = 8192, streams = 1;
};

class Cache {
 public:
  Cache(const Sizes& sizes, uint64_t seed);

  // Writes another row to a cell.
  void Fill(int64_t cell, int64_t stream = 0);
  // The same for cells [begin, end).
  void Fill(int64_t begin, int64_t end, int64_t stream);
  // Turns the leading elements of the keys of cells [begin, end), as a context shift does.
  void Shift(int64_t begin, int64_t end, double angle);
  // Puts not-a-number into the rows of a cell.
  void Spoil(int64_t cell);

  const Sizes& sizes() const { return sizes_; }
  void set_q_heads(int64_t heads) { sizes_.q_heads = heads; }
  ggml_tensor* k() const { return k_; }
  ggml_tensor* v() const { return v_; }
  std::mt19937_64& random() { return random_; }
  // Queries that attend to something: [tokens, q_heads, dim].
  std::vector<float> Queries(int64_t tokens);

 private:
  uint16_t* Row(ggml_tensor* of, int64_t cell, int64_t stream) const;

  Sizes sizes_;
  std::mt19937_64 random_;
  std::unique_ptr<ggml_context, decltype(&ggml_free)> context_;
  std::unique_ptr<ggml_backend_buffer, decltype(&ggml_backend_buffer_free)> buffer_;
  ggml_tensor *k_, *v_;
};

// Which cells each query token sees: [tokens, cells of the call].
using Mask = std::vector<std::vector<bool>>;
// Token i of `tokens` sees [begin, end - tokens + 1 + i) of `cells`.
Mask RunMask(int64_t begin, int64_t end, int64_t tokens, int64_t cells);

struct Answer {
  std::vector<float> out;      // [streams, tokens, q_heads, dim]
  std::vector<double> errors;  // [streams, tokens, q_heads] relative, as the promise measures it
  double worst() const;
  double Mean() const;
  double Misses(double epsilon) const;  // share of errors over epsilon
};

// One call over the first cells of the cache, for as many streams as there are masks. n_kv is what the
// masks are wide.
Answer Attend(ggml_backend_t backend, Cache& cache, const std::vector<Mask>& masks,
              float scale_by = 1, const std::vector<float>* queries = nullptr);

// A counter of the backend.
uint64_t Counter(ggml_backend_t backend, const std::string& name);

}  // namespace vattn::llama_cpp

#endif  // VATTN_TESTS_LLAMA_CPP_CACHE_H_
