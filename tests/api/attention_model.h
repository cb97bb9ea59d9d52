// What the C API must answer: plain copies of rows, and attention over them in float64. Shares no
// code with the library.
#ifndef VATTN_TESTS_API_ATTENTION_MODEL_H_
#define VATTN_TESTS_API_ATTENTION_MODEL_H_

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "api/vattn.hpp"

namespace vattn::test {

// Nearest value of a vattn_dtype, ties to even; f16 subnormals become 0.
float Round(int32_t dtype, float value);
// Rounded as by Round.
std::vector<std::byte> ToBytes(int32_t dtype, const std::vector<float>& values);
std::vector<float> ToFloats(int32_t dtype, const std::vector<std::byte>& bytes);

struct Shape {
  int q_heads = 4, kv_heads = 2, dim_k = 64, dim_v = 64;
  bool shared_kv = false;
  int32_t dtype = VATTN_F32;
};
// Defaults with this shape, one layer, one thread, on the backend under test (tests/api/backend.h).
vattn_options OptionsFor(const Shape& shape);
// `count` values of a Gaussian, rounded to dtype.
std::vector<float> Gaussian(std::mt19937_64& engine, int32_t dtype, int64_t count, float sigma);

// Rows of one layer of one sequence, as values of the dtype. v is empty with shared_kv.
struct Rows {
  int64_t tokens = 0;
  std::vector<float> k;  // [tokens, kv_heads, dim_k]
  std::vector<float> v;  // [tokens, kv_heads, dim_v]

  void Add(const Shape& shape, const std::vector<float>& more_k, const std::vector<float>& more_v);
  void AddGaussian(const Shape& shape, std::mt19937_64& engine, int64_t count, float key_sigma = 1);
  void Truncate(const Shape& shape, int64_t count);
};

// Appends tokens [from, rows.tokens) in chunks of at most `chunk`.
void AppendRows(Sequence& sequence, const Shape& shape, int32_t layer, const Rows& rows,
                int64_t from = 0, int64_t chunk = INT64_MAX);

// Exact attention of one query head.
struct Answer {
  std::vector<double> out;  // [dim_v]
  double lse = 0;
  double norm = 0;       // |out|
  double rms_value = 0;  // sqrt(sum p |v|^2)
};
// q [dim_k] unscaled. Over all tokens, or the first `count`, or over `tokens` with log_weights (may
// be null) added.
Answer Attend(const Shape& shape, const Rows& rows, int kv_head, const float* q);
Answer Attend(const Shape& shape, const Rows& rows, int64_t count, int kv_head, const float* q);
Answer Attend(const Shape& shape, const Rows& rows, int kv_head, const float* q,
              const int32_t* tokens, int64_t count, const float* log_weights);
double Distance(const Answer& answer, const float* out);
// What Distance is allowed to be for an exact result in out_dtype.
double Tolerance(const Answer& answer, int32_t out_dtype);

// Arrays of vattn_attend_params for a batch of `slots` with `tokens` query tokens each. k_new and
// v_new empty: not given.
struct Call {
  Call(const Shape& shape, int slots, int32_t layer, int32_t out_dtype = VATTN_F32, int tokens = 1);

  // Points into this object and into its byte arrays, which it fills from q, k_new and v_new.
  vattn_attend_params Params();
  // The place of a head in lse, verdict and error.
  size_t At(int slot, int head, int token = 0) const {
    return (static_cast<size_t>(slot) * tokens + token) * shape.q_heads + head;
  }
  const float* Query(int slot, int head, int token = 0) const {
    return q.data() + At(slot, head, token) * shape.dim_k;
  }
  // Fills q, and k_new and v_new unless new_tokens is 0.
  void Fill(std::mt19937_64& engine, int new_tokens, float query_sigma = 1);
  // Decodes out; after the call.
  std::vector<float> Out(int slot, int head, int token = 0) const;
  // The new tokens of a slot.
  void AddTo(Rows& rows, int slot) const;

  Shape shape;
  int slots, tokens;
  int32_t layer, out_dtype;
  std::vector<float> q, k_new, v_new;
  std::vector<std::byte> q_bytes, k_bytes, v_bytes, out;
  std::vector<float> lse, error;
  std::vector<int32_t> verdict, selected, fetched, looks;
  std::vector<int64_t> middle;
};

// Expects the answers of one slot to be exact attention over rows, of which each query token sees
// those up to its own.
void ExpectExact(const Call& call, int slot, const Rows& rows);

}  // namespace vattn::test

#endif  // VATTN_TESTS_API_ATTENTION_MODEL_H_
