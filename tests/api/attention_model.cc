#include "tests/api/attention_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "tests/api/backend.h"

namespace vattn::test {
namespace {

uint32_t Bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

size_t ElementSize(int32_t dtype) { return dtype == VATTN_F32 ? 4 : 2; }

// Bits of a value that Round has made representable.
uint16_t HalfBits(int32_t dtype, float value) {
  const uint32_t bits = Bits(value);
  if (dtype == VATTN_BF16) return static_cast<uint16_t>(bits >> 16);
  const uint32_t sign = bits >> 16 & 0x8000;
  if ((bits & 0x7fffffff) == 0) return static_cast<uint16_t>(sign);
  return static_cast<uint16_t>(sign | ((bits & 0x7fffffff) - (112u << 23)) >> 13);
}

float FromHalfBits(int32_t dtype, uint16_t half) {
  if (dtype == VATTN_BF16) return FromBits(uint32_t{half} << 16);
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                   : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return half & 0x8000 ? -size : size;
}

}  // namespace

float Round(int32_t dtype, float value) {
  if (dtype == VATTN_F32) return value;
  if (dtype == VATTN_F16 && std::abs(value) < std::ldexp(1.f, -14)) return 0;
  const int drop = dtype == VATTN_BF16 ? 16 : 13;
  const uint32_t bits = Bits(value), odd = bits >> drop & 1;
  return FromBits((bits + (1u << (drop - 1)) - 1 + odd) >> drop << drop);
}

std::vector<std::byte> ToBytes(int32_t dtype, const std::vector<float>& values) {
  std::vector<std::byte> bytes(values.size() * ElementSize(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t half = dtype == VATTN_F32 ? 0 : HalfBits(dtype, Round(dtype, values[i]));
    if (dtype == VATTN_F32) std::memcpy(&bytes[4 * i], &values[i], 4);
    if (dtype != VATTN_F32) std::memcpy(&bytes[2 * i], &half, 2);
  }
  return bytes;
}

std::vector<float> ToFloats(int32_t dtype, const std::vector<std::byte>& bytes) {
  std::vector<float> values(bytes.size() / ElementSize(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    uint16_t half;
    if (dtype == VATTN_F32) {
      std::memcpy(&values[i], &bytes[4 * i], 4);
    } else {
      std::memcpy(&half, &bytes[2 * i], 2);
      values[i] = FromHalfBits(dtype, half);
    }
  }
  return values;
}

vattn_options OptionsFor(const Shape& shape) {
  vattn_options options = Init<vattn_options>();
  options.num_q_heads = shape.q_heads;
  options.num_kv_heads = shape.kv_heads;
  options.head_dim_k = shape.dim_k;
  options.head_dim_v = shape.dim_v;
  options.shared_kv = shape.shared_kv ? 1 : 0;
  options.dtype = shape.dtype;
  options.backend = OnCuda() ? VATTN_BACKEND_CUDA : VATTN_BACKEND_CPU;
  options.num_threads = 1;
  options.host_bytes = uint64_t{256} << 20;
  return options;
}

std::vector<float> Gaussian(std::mt19937_64& engine, int32_t dtype, int64_t count, float sigma) {
  std::normal_distribution<float> normal(0, sigma);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = Round(dtype, normal(engine));
  return values;
}

void Rows::Add(const Shape& shape, const std::vector<float>& more_k,
               const std::vector<float>& more_v) {
  k.insert(k.end(), more_k.begin(), more_k.end());
  v.insert(v.end(), more_v.begin(), more_v.end());
  tokens = static_cast<int64_t>(k.size()) / shape.kv_heads / shape.dim_k;
}

void Rows::AddGaussian(const Shape& shape, std::mt19937_64& engine, int64_t count,
                       float key_sigma) {
  const std::vector<float> more_k =
      Gaussian(engine, shape.dtype, count * shape.kv_heads * shape.dim_k, key_sigma);
  const int64_t v_count = shape.shared_kv ? 0 : count * shape.kv_heads * shape.dim_v;
  Add(shape, more_k, Gaussian(engine, shape.dtype, v_count, 1));
}

void Rows::Truncate(const Shape& shape, int64_t count) {
  if (tokens <= count) return;
  tokens = count;
  k.resize(static_cast<size_t>(count * shape.kv_heads * shape.dim_k));
  if (!shape.shared_kv) v.resize(static_cast<size_t>(count * shape.kv_heads * shape.dim_v));
}

void AppendRows(Sequence& sequence, const Shape& shape, int32_t layer, const Rows& rows,
                int64_t from, int64_t chunk) {
  const std::vector<std::byte> k = ToBytes(shape.dtype, rows.k), v = ToBytes(shape.dtype, rows.v);
  const int64_t k_bytes =
      shape.kv_heads * shape.dim_k * static_cast<int64_t>(ElementSize(shape.dtype));
  const int64_t v_bytes = k_bytes / shape.dim_k * shape.dim_v;
  for (int64_t at = from; at < rows.tokens; at += chunk) {
    vattn_append_params params = Init<vattn_append_params>();
    params.layer = layer;
    params.num_tokens = std::min(chunk, rows.tokens - at);
    params.k = k.data() + at * k_bytes;
    params.v = shape.shared_kv ? nullptr : v.data() + at * v_bytes;
    sequence.Append(params);
    if (chunk >= rows.tokens - at) break;
  }
}

Answer Attend(const Shape& shape, const Rows& rows, int kv_head, const float* q) {
  return Attend(shape, rows, rows.tokens, kv_head, q);
}

Answer Attend(const Shape& shape, const Rows& rows, int64_t count, int kv_head, const float* q) {
  std::vector<int32_t> first(static_cast<size_t>(count));
  std::iota(first.begin(), first.end(), 0);
  return Attend(shape, rows, kv_head, q, first.data(), count, nullptr);
}

Answer Attend(const Shape& shape, const Rows& rows, int kv_head, const float* q,
              const int32_t* tokens, int64_t count, const float* log_weights) {
  std::vector<double> score(static_cast<size_t>(count));
  double most = -INFINITY;
  for (int64_t i = 0; i < count; ++i) {
    const float* k = rows.k.data() + (int64_t{tokens[i]} * shape.kv_heads + kv_head) * shape.dim_k;
    double dot = 0;
    for (int d = 0; d < shape.dim_k; ++d) dot += double{q[d]} * double{k[d]};
    score[i] = dot / std::sqrt(shape.dim_k) + (log_weights == nullptr ? 0 : double{log_weights[i]});
    most = std::max(most, score[i]);
  }
  Answer answer;
  answer.out.assign(shape.dim_v, 0);
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = int64_t{tokens[i]} * shape.kv_heads + kv_head;
    const float* v =
        shape.shared_kv ? rows.k.data() + row * shape.dim_k : rows.v.data() + row * shape.dim_v;
    const double p = std::exp(score[i] - most);
    sum += p;
    for (int d = 0; d < shape.dim_v; ++d) {
      answer.out[d] += p * double{v[d]};
      answer.rms_value += p * double{v[d]} * double{v[d]};
    }
  }
  for (double& x : answer.out) {
    x /= sum;
    answer.norm += x * x;
  }
  answer.norm = std::sqrt(answer.norm);
  answer.rms_value = std::sqrt(answer.rms_value / sum);
  answer.lse = most + std::log(sum);
  return answer;
}

double Distance(const Answer& answer, const float* out) {
  double sum = 0;
  for (size_t d = 0; d < answer.out.size(); ++d) sum += std::pow(answer.out[d] - double{out[d]}, 2);
  return std::sqrt(sum);
}

double Tolerance(const Answer& answer, int32_t out_dtype) {
  return answer.rms_value * 2e-5 + answer.norm * (out_dtype == VATTN_F32   ? 0
                                                  : out_dtype == VATTN_F16 ? 1e-3
                                                                           : 4e-3);
}

Call::Call(const Shape& call_shape, int num_slots, int32_t call_layer, int32_t dtype,
           int num_tokens)
    : shape(call_shape), slots(num_slots), tokens(num_tokens), layer(call_layer), out_dtype(dtype) {
  const size_t heads = static_cast<size_t>(slots) * tokens * shape.q_heads,
               groups = static_cast<size_t>(slots) * shape.kv_heads;
  out.assign(heads * shape.dim_v * ElementSize(out_dtype), std::byte{0x7b});
  lse.assign(heads, -7);
  error.assign(heads, -7);
  verdict.assign(heads, -7);
  selected.assign(groups, -7);
  fetched = looks = selected;
  middle.assign(groups, -7);
}

vattn_attend_params Call::Params() {
  q_bytes = ToBytes(shape.dtype, q);
  k_bytes = ToBytes(shape.dtype, k_new);
  v_bytes = ToBytes(shape.dtype, v_new);
  vattn_attend_params params = Init<vattn_attend_params>();
  params.layer = layer;
  params.num_tokens = tokens;
  params.out_dtype = out_dtype;
  params.q = q_bytes.data();
  params.k_new = k_bytes.empty() ? nullptr : k_bytes.data();
  params.v_new = v_bytes.empty() ? nullptr : v_bytes.data();
  params.out = out.data();
  params.lse = lse.data();
  params.verdict = verdict.data();
  params.error = error.data();
  params.selected = selected.data();
  params.fetched = fetched.data();
  params.looks = looks.data();
  params.middle = middle.data();
  return params;
}

void Call::Fill(std::mt19937_64& engine, int new_tokens, float query_sigma) {
  q = Gaussian(engine, shape.dtype, int64_t{slots} * tokens * shape.q_heads * shape.dim_k,
               query_sigma);
  k_new =
      Gaussian(engine, shape.dtype, int64_t{new_tokens} * slots * shape.kv_heads * shape.dim_k, 1);
  const int v_heads = shape.shared_kv ? 0 : shape.kv_heads;
  v_new = Gaussian(engine, shape.dtype, int64_t{new_tokens} * slots * v_heads * shape.dim_v, 1);
}

std::vector<float> Call::Out(int slot, int head, int token) const {
  const size_t bytes = shape.dim_v * ElementSize(out_dtype);
  const std::byte* begin = out.data() + At(slot, head, token) * bytes;
  return ToFloats(out_dtype, {begin, begin + bytes});
}

void Call::AddTo(Rows& rows, int slot) const {
  const auto part = [&](const std::vector<float>& all, int64_t size) {
    return all.empty()
               ? all
               : std::vector<float>(all.begin() + slot * size, all.begin() + (slot + 1) * size);
  };
  rows.Add(shape, part(k_new, int64_t{tokens} * shape.kv_heads * shape.dim_k),
           part(v_new, int64_t{tokens} * shape.kv_heads * shape.dim_v));
}

void ExpectExact(const Call& call, int slot, const Rows& rows) {
  const int group = call.shape.q_heads / call.shape.kv_heads;
  for (int t = 0; t < call.tokens; ++t) {
    const int64_t seen = rows.tokens - call.tokens + 1 + t;
    for (int h = 0; h < call.shape.q_heads; ++h) {
      const Answer answer = Attend(call.shape, rows, seen, h / group, call.Query(slot, h, t));
      EXPECT_LE(Distance(answer, call.Out(slot, h, t).data()), Tolerance(answer, call.out_dtype))
          << "slot " << slot << " head " << h << " of " << seen << " tokens";
      EXPECT_NEAR(call.lse[call.At(slot, h, t)], answer.lse, 2e-5 * (1 + std::abs(answer.lse)));
    }
  }
}

}  // namespace vattn::test
