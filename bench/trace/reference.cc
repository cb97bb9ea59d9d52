#include "bench/trace/reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "bench/cli/dtype.h"
#include "bench/cli/parallel.h"

namespace vattn::bench {
namespace {

constexpr int64_t kTile = 64;      // tokens whose rows are widened to double at a time
constexpr int64_t kQueries = 128;  // query rows that use a widened tile
constexpr int64_t kLanes = 16;     // columns that one pass of MultiplyRow keeps in registers

typedef double Pair __attribute__((vector_size(16)));

int64_t RoundUp(int64_t value) { return (value + kLanes - 1) / kLanes * kLanes; }

template <size_t... kPairs>
void MultiplyLanes(const double* x, const double* a, int64_t rows, int64_t columns, double* y,
                   std::index_sequence<kPairs...>) {
  Pair sum[sizeof...(kPairs)] = {};
  for (int64_t i = 0; i < rows; ++i) {
    const Pair factor = {x[i], x[i]};
    Pair entry[sizeof...(kPairs)];
    std::memcpy(entry, a + i * columns, sizeof(entry));
    ((sum[kPairs] += factor * entry[kPairs]), ...);
  }
  std::memcpy(y, sum, sizeof(sum));
}

// y [columns] = x [rows] times a [rows, columns]; columns is a multiple of kLanes.
void MultiplyRow(const double* x, const double* a, int64_t rows, int64_t columns, double* y) {
  for (int64_t c = 0; c < columns; c += kLanes) {
    MultiplyLanes(x, a + c, rows, columns, y + c, std::make_index_sequence<kLanes / 2>());
  }
}

// Up to kQueries rows of one KV head's query heads, walked over all tokens with an online softmax.
class Chunk {
 public:
  Chunk(const Trace& trace, int64_t layer, int64_t kv_head, std::span<const int64_t> positions,
        int64_t first, int64_t count)
      : trace_(trace),
        layer_(layer),
        kv_head_(kv_head),
        positions_(positions),
        first_(first),
        count_(count),
        columns_(RoundUp(trace.head_dim_v + 2)),
        queries_(count * trace.head_dim_k),
        sums_(count * columns_),
        maxima_(count, -INFINITY),
        keys_(trace.head_dim_k * kTile),
        values_(kTile * columns_),
        row_(std::max(trace.head_dim_k, trace.head_dim_v)) {
    const double scale = 1.0 / std::sqrt(static_cast<double>(trace.head_dim_k));
    for (int64_t i = 0; i < count; ++i) {
      ToFloat(trace.q.dtype, QueryRow(trace, layer, QHead(i), positions[Step(i)]), trace.head_dim_k,
              row_.data());
      for (int64_t d = 0; d < trace.head_dim_k; ++d) {
        queries_[i * trace.head_dim_k + d] = row_[d] * scale;
      }
    }
  }

  void Attend() {
    int64_t tokens = 0;
    for (int64_t i = 0; i < count_; ++i) tokens = std::max(tokens, Visible(i));
    for (int64_t begin = 0; begin < tokens; begin += kTile) {
      LoadTile(begin, std::min(kTile, tokens - begin));
      for (int64_t i = 0; i < count_; ++i) AddTile(i, begin);
    }
  }

  // layer: the place of this layer in the reference.
  void Store(int64_t layer, Reference* reference) const {
    for (int64_t i = 0; i < count_; ++i) {
      const double* sums = &sums_[i * columns_];
      const int64_t index = reference->Index(layer, QHead(i), Step(i));
      const int64_t dim = trace_.head_dim_v;
      const double mass = sums[dim + 1];
      double norm2 = 0;
      for (int64_t d = 0; d < dim; ++d) {
        const double o = sums[d] / mass;
        norm2 += o * o;
        reference->out[index * dim + d] = static_cast<float>(o);
      }
      reference->out_norm[index] = std::sqrt(norm2);
      reference->rms_value[index] = std::sqrt(sums[dim] / mass);
    }
  }

 private:
  int64_t QHead(int64_t i) const {
    return kv_head_ * (trace_.q_heads / trace_.kv_heads) + (first_ + i) / steps();
  }
  int64_t steps() const { return static_cast<int64_t>(positions_.size()); }
  int64_t Step(int64_t i) const { return (first_ + i) % steps(); }
  int64_t Visible(int64_t i) const { return positions_[Step(i)] + 1; }

  void Widen(const Tensor& tensor, int64_t head, int64_t token, int64_t dim) {
    ToFloat(tensor.dtype, tensor.Row(layer_, head, token), dim, row_.data());
  }

  // Keys are transposed to [head_dim_k, kTile]. Values become [kTile, columns_] with |v|^2 and 1
  // behind the elements, so that one product gives all three sums. What lies past count stays from
  // the tile before: finite, and AddTile gives it weight 0.
  void LoadTile(int64_t begin, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      Widen(trace_.k, kv_head_, begin + j, trace_.head_dim_k);
      for (int64_t d = 0; d < trace_.head_dim_k; ++d) keys_[d * kTile + j] = row_[d];
      Widen(trace_.v, kv_head_, begin + j, trace_.head_dim_v);
      double* value = &values_[j * columns_];
      double norm2 = 0;
      for (int64_t d = 0; d < trace_.head_dim_v; ++d) {
        value[d] = row_[d];
        norm2 += value[d] * value[d];
      }
      value[trace_.head_dim_v] = norm2;
      value[trace_.head_dim_v + 1] = 1;
    }
  }

  void AddTile(int64_t i, int64_t begin) {
    const int64_t visible = std::min(kTile, Visible(i) - begin);
    if (visible <= 0) return;
    double weight[kTile];
    MultiplyRow(&queries_[i * trace_.head_dim_k], keys_.data(), trace_.head_dim_k, kTile, weight);
    const double maximum = std::max(maxima_[i], *std::max_element(weight, weight + visible));
    for (int64_t j = 0; j < visible; ++j) weight[j] = std::exp(weight[j] - maximum);
    std::fill(weight + visible, weight + kTile, 0.0);
    const double keep = std::exp(maxima_[i] - maximum);
    maxima_[i] = maximum;
    added_.resize(columns_);
    MultiplyRow(weight, values_.data(), kTile, columns_, added_.data());
    double* sums = &sums_[i * columns_];
    for (int64_t c = 0; c < columns_; ++c) sums[c] = sums[c] * keep + added_[c];
  }

  const Trace& trace_;
  const int64_t layer_, kv_head_;
  const std::span<const int64_t> positions_;
  const int64_t first_, count_, columns_;
  std::vector<double> queries_;  // [count, head_dim_k] scaled
  std::vector<double> sums_;     // [count, columns]
  std::vector<double> maxima_;   // [count]
  std::vector<double> keys_, values_;
  std::vector<float> row_;
  std::vector<double> added_;
};

}  // namespace

double Reference::Ref(int64_t index, int32_t norm, double floor) const {
  if (norm == VATTN_NORM_OUTPUT) return out_norm[index];
  return std::max(out_norm[index], floor * rms_value[index]);
}

Reference ComputeReference(const Trace& trace, std::span<const int32_t> layers, int64_t steps,
                           int num_threads) {
  std::vector<int64_t> positions(steps);
  std::iota(positions.begin(), positions.end(), trace.prompt_tokens);
  return ComputeReferenceAt(trace, layers, positions, num_threads);
}

Reference ComputeReferenceAt(const Trace& trace, std::span<const int32_t> layers,
                             std::span<const int64_t> positions, int num_threads) {
  const auto steps = static_cast<int64_t>(positions.size());
  Reference reference;
  reference.q_heads = trace.q_heads;
  reference.steps = steps;
  reference.head_dim_v = trace.head_dim_v;
  const int64_t heads = static_cast<int64_t>(layers.size()) * trace.q_heads * steps;
  reference.out.resize(heads * trace.head_dim_v);
  reference.out_norm.resize(heads);
  reference.rms_value.resize(heads);

  const int64_t rows = trace.q_heads / trace.kv_heads * steps;  // of one KV head
  const int64_t chunks = (rows + kQueries - 1) / kQueries;
  const int64_t tasks = static_cast<int64_t>(layers.size()) * trace.kv_heads * chunks;
  ParallelFor(num_threads, tasks, [&](int64_t task) {
    const int64_t layer = task / chunks / trace.kv_heads;
    const int64_t first = task % chunks * kQueries;
    Chunk chunk(trace, layers[layer], task / chunks % trace.kv_heads, positions, first,
                std::min(kQueries, rows - first));
    chunk.Attend();
    chunk.Store(layer, &reference);
  });
  return reference;
}

double DistanceToReference(const Reference& reference, int64_t index, const float* a) {
  const float* o = &reference.out[index * reference.head_dim_v];
  double sum = 0;
  for (int64_t d = 0; d < reference.head_dim_v; ++d) {
    const double difference = static_cast<double>(a[d]) - o[d];
    sum += difference * difference;
  }
  return std::sqrt(sum);
}

}  // namespace vattn::bench
