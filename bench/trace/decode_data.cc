#include "bench/trace/decode_data.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <random>
#include <string>

#include "bench/cli/dtype.h"
#include "bench/cli/failure.h"

namespace vattn::bench {
namespace {

// Streams of the generator: what a number is for.
enum Stream : uint64_t { kKeyNoise = 1, kValueNoise, kQueryNoise, kQueryBase, kValueMean };

uint64_t Mix(uint64_t x) {  // SplitMix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

uint64_t Key(uint64_t seed, Stream stream, const HeadPlace& place, int64_t item) {
  uint64_t key = Mix(seed ^ stream << 56);
  for (const int64_t part : {place.sequence, place.layer, place.head, item}) {
    key = Mix(key ^ static_cast<uint64_t>(part));
  }
  return key;
}

// Standard normal rows that cost two loads an element: the sum of two stretches of one table, at
// places that the key picks.
class Noise {
 public:
  Noise(uint64_t seed, int64_t row) : table_(kSize + row) {
    std::mt19937_64 engine(Mix(seed));
    std::normal_distribution<float> normal(0, std::sqrt(.5f));
    for (float& value : table_) value = normal(engine);
  }

  // REQUIRES count <= row.
  void Fill(uint64_t key, int64_t count, float* out) const {
    const float* a = &table_[key % kSize];
    const float* b = &table_[(key >> 32) % kSize];
    for (int64_t i = 0; i < count; ++i) out[i] = a[i] + b[i];
  }

 private:
  static constexpr uint64_t kSize = 1 << 18;
  std::vector<float> table_;
};

class Stretched : public DecodeData {
 public:
  Stretched(const Trace& trace, const DecodeShape& shape, uint64_t seed)
      : trace_(trace), shape_(shape), seed_(seed), noise_(seed, shape.head_dim) {
    const int64_t dim = shape.head_dim;
    if (trace.head_dim_k != dim || trace.head_dim_v != dim) {
      throw UsageError("--head-dim: " + std::to_string(dim) + ", the trace has " +
                       std::to_string(trace.head_dim_k) + " (k) and " +
                       std::to_string(trace.head_dim_v) + " (v)");
    }
    if (trace.prompt_tokens <= kSinks + kWindow) {
      throw UsageError("--trace: " + std::to_string(trace.prompt_tokens) +
                       " prompt tokens, stretching needs more than " +
                       std::to_string(kSinks + kWindow));
    }
    for (int64_t layer = 0; layer < trace.layers; ++layer) {
      for (int64_t head = 0; head < trace.kv_heads; ++head) {
        AddDeviations(trace.k, layer, head, &key_deviation_);
        AddDeviations(trace.v, layer, head, &value_deviation_);
      }
    }
  }

  void Rows(const HeadPlace& place, int64_t first, int64_t count, float* k,
            float* v) const override {
    const int64_t dim = shape_.head_dim, layer = Layer(place);
    const int64_t head = place.head % trace_.kv_heads;
    const int64_t recorded = (layer * trace_.kv_heads + head) * dim;
    std::vector<float> noise(dim);
    for (int64_t token = first; token < first + count; ++token, k += dim, v += dim) {
      const int64_t source = Source(token);
      ToFloat(trace_.dtype, trace_.k.Row(layer, head, source), dim, k);
      ToFloat(trace_.dtype, trace_.v.Row(layer, head, source), dim, v);
      if (source < kSinks || source >= trace_.prompt_tokens - kWindow) continue;
      noise_.Fill(Key(seed_, kKeyNoise, place, token), dim, noise.data());
      for (int64_t d = 0; d < dim; ++d) k[d] += noise[d] * key_deviation_[recorded + d];
      noise_.Fill(Key(seed_, kValueNoise, place, token), dim, noise.data());
      for (int64_t d = 0; d < dim; ++d) v[d] += noise[d] * value_deviation_[recorded + d];
    }
  }

  void Query(const HeadPlace& place, int64_t step, float* q) const override {
    ToFloat(trace_.dtype,
            trace_.q.Row(Layer(place), QHead(place), (step + place.sequence) % trace_.steps),
            shape_.head_dim, q);
  }

  int64_t prompt_queries() const override { return trace_.prompt_queries; }

  void PromptQuery(const HeadPlace& place, int64_t index, float* q) const override {
    ToFloat(trace_.dtype, trace_.q_prompt.Row(Layer(place), QHead(place), index), shape_.head_dim,
            q);
  }

 private:
  static constexpr int64_t kSinks = 16, kWindow = 128;
  static constexpr double kNoiseShare = .05;

  // Appends the noise's scale for each dimension, from the prompt's tokens.
  void AddDeviations(const Tensor& tensor, int64_t layer, int64_t head,
                     std::vector<float>* deviations) const {
    const int64_t dim = shape_.head_dim, count = trace_.prompt_tokens;
    std::vector<double> sum(dim), sum2(dim);
    std::vector<float> row(dim);
    for (int64_t token = 0; token < count; ++token) {
      ToFloat(tensor.dtype, tensor.Row(layer, head, token), dim, row.data());
      for (int64_t d = 0; d < dim; ++d) {
        sum[d] += row[d];
        sum2[d] += static_cast<double>(row[d]) * row[d];
      }
    }
    for (int64_t d = 0; d < dim; ++d) {
      const double mean = sum[d] / static_cast<double>(count);
      const double variance = sum2[d] / static_cast<double>(count) - mean * mean;
      deviations->push_back(static_cast<float>(kNoiseShare * std::sqrt(std::max(variance, 0.0))));
    }
  }

  // The recorded token that stands at `token`.
  int64_t Source(int64_t token) const {
    const int64_t middle = trace_.prompt_tokens - kSinks - kWindow;
    if (token >= shape_.tokens) {
      return trace_.prompt_tokens + (token - shape_.tokens) % trace_.steps;
    }
    if (token >= shape_.tokens - kWindow) return trace_.prompt_tokens + token - shape_.tokens;
    return token < kSinks ? token : kSinks + (token - kSinks) % middle;
  }

  int64_t Layer(const HeadPlace& place) const {
    return (place.layer + place.sequence) % trace_.layers;
  }

  // A recorded query head that reads the KV head which stands for this one's.
  int64_t QHead(const HeadPlace& place) const {
    const int64_t group = shape_.q_heads / shape_.kv_heads;
    const int64_t recorded_group = trace_.q_heads / trace_.kv_heads;
    const int64_t kv_head = place.head / group % trace_.kv_heads;
    return kv_head * recorded_group + place.head % group % recorded_group;
  }

  const Trace& trace_;
  const DecodeShape shape_;
  const uint64_t seed_;
  const Noise noise_;
  std::vector<float> key_deviation_, value_deviation_;  // [layers, kv_heads, head_dim] recorded
};

class Synthetic : public DecodeData {
 public:
  Synthetic(const DecodeShape& shape, uint64_t seed)
      : shape_(shape), seed_(seed), noise_(seed, shape.head_dim), spectrum_(shape.head_dim) {
    // Scores q.k / sqrt(head_dim) have the standard deviation kScoreDeviation.
    double sum = 0;
    for (int64_t d = 0; d < shape.head_dim; ++d) {
      spectrum_[d] = std::pow(static_cast<float>(d + 1), -.5f);
      sum += std::pow(spectrum_[d], 4);
    }
    const double scale = kScoreDeviation * std::sqrt(shape.head_dim) / std::sqrt(sum);
    for (float& value : spectrum_) value *= static_cast<float>(std::sqrt(scale));
  }

  void Rows(const HeadPlace& place, int64_t first, int64_t count, float* k,
            float* v) const override {
    const int64_t dim = shape_.head_dim;
    std::vector<float> mean(dim);
    noise_.Fill(Key(seed_, kValueMean, place, 0), dim, mean.data());
    for (int64_t token = first; token < first + count; ++token, k += dim, v += dim) {
      noise_.Fill(Key(seed_, kKeyNoise, place, token), dim, k);
      noise_.Fill(Key(seed_, kValueNoise, place, token), dim, v);
      for (int64_t d = 0; d < dim; ++d) k[d] *= spectrum_[d];
      for (int64_t d = 0; d < dim; ++d) v[d] += .5f * mean[d];
    }
  }

  void Query(const HeadPlace& place, int64_t step, float* q) const override {
    constexpr int64_t kTopicSteps = 16;  // steps whose queries have a direction in common
    const int64_t dim = shape_.head_dim;
    std::vector<float> own(dim);
    noise_.Fill(Key(seed_, kQueryBase, place, step / kTopicSteps), dim, q);
    noise_.Fill(Key(seed_, kQueryNoise, place, step), dim, own.data());
    for (int64_t d = 0; d < dim; ++d) {
      q[d] = spectrum_[d] * (std::sqrt(.8f) * q[d] + std::sqrt(.2f) * own[d]);
    }
  }

  int64_t prompt_queries() const override { return std::min<int64_t>(512, shape_.tokens); }

  void PromptQuery(const HeadPlace& place, int64_t index, float* q) const override {
    Query(place, index - prompt_queries(), q);
  }

 private:
  static constexpr double kScoreDeviation = 2.5;

  const DecodeShape shape_;
  const uint64_t seed_;
  const Noise noise_;
  std::vector<float> spectrum_;  // [head_dim] standard deviations of keys and of queries
};

}  // namespace

std::unique_ptr<DecodeData> StretchTrace(const Trace& trace, const DecodeShape& shape,
                                         uint64_t seed) {
  return std::make_unique<Stretched>(trace, shape, seed);
}

std::unique_ptr<DecodeData> MakeSynthetic(const DecodeShape& shape, uint64_t seed) {
  return std::make_unique<Synthetic>(shape, seed);
}

}  // namespace vattn::bench
