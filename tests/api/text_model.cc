#include "tests/api/text_model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

namespace vattn::test {
namespace {

constexpr size_t kTable = size_t{1} << 16;
constexpr double kNeedleLogit = 11;
constexpr int kKey = 0, kValue = 1, kQuery = 2, kKind = 3, kTarget = 4;

// The mixer of SplitMix64.
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

// In eight sums, which the compiler can keep in vectors; dim is a multiple of 16.
double Dot(const double* a, const double* b, int dim) {
  double sums[8] = {};
  for (int d = 0; d < dim; d += 8) {
    for (int i = 0; i < 8; ++i) sums[i] += a[d + i] * b[d + i];
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

void Add(double factor, const double* __restrict values, int dim, double* __restrict sums) {
  for (int d = 0; d < dim; ++d) sums[d] += factor * values[d];
}

uint64_t Mix(uint64_t hash, int32_t layer, int head, int use) {
  return Mix(hash + (static_cast<uint64_t>(layer) << 40) + (static_cast<uint64_t>(head) << 8) +
             static_cast<uint64_t>(use));
}

}  // namespace

void Text::Push(int32_t token) {
  const uint64_t before = hashes_.empty() ? 1 : hashes_.back();
  tokens_.push_back(token);
  hashes_.push_back(Mix(before ^ Mix(static_cast<uint64_t>(token))));
}

void Text::Truncate(int64_t tokens) {
  tokens_.resize(static_cast<size_t>(tokens));
  hashes_.resize(static_cast<size_t>(tokens));
}

TextModel::TextModel(const Shape& shape, const std::vector<int32_t>& layer_heads, uint64_t seed)
    : shape_(shape), layer_heads_(layer_heads) {
  std::mt19937_64 engine(seed);
  const std::vector<float> numbers = Gaussian(engine, shape.dtype, kTable, 1);
  bytes_ = ToBytes(shape.dtype, numbers);
  table_.assign(numbers.begin(), numbers.end());
  squares_.assign(1, 0);
  for (const double x : table_) squares_.push_back(squares_.back() + x * x);
}

size_t TextModel::Place(uint64_t hash, int32_t layer, int head, int use) const {
  return Mix(hash, layer, head, use) % (kTable - static_cast<size_t>(shape_.dim_k + shape_.dim_v));
}

int32_t TextModel::Next(const Text& text, int64_t position) const {
  return static_cast<int32_t>(Mix(text.hash(position), 0, 0, kTarget + 1) % kVocabulary);
}

void TextModel::WriteRows(const Text& text, int64_t position, int32_t layer, std::byte* k,
                          std::byte* v) const {
  const size_t k_bytes = shape_.dim_k * element(), v_bytes = shape_.dim_v * element();
  for (int head = 0; head < layer_heads_[layer]; ++head) {
    const uint64_t hash = text.hash(position);
    std::memcpy(k + head * k_bytes, &bytes_[Place(hash, layer, head, kKey) * element()], k_bytes);
    if (shape_.shared_kv) continue;
    std::memcpy(v + head * v_bytes, &bytes_[Place(hash, layer, head, kValue) * element()], v_bytes);
  }
}

bool TextModel::LooksForNeedle(const Text& text, int64_t position, int32_t layer,
                               int q_head) const {
  return Mix(text.hash(position), layer, q_head, kKind) % 2 == 0;
}

std::vector<float> TextModel::Query(const Text& text, int64_t position, int32_t layer,
                                    int q_head) const {
  const uint64_t hash = text.hash(position), kind = Mix(hash, layer, q_head, kKind) / 2;
  size_t direction = Place(hash, layer, q_head, kQuery);
  double factor = .3 + .4 * static_cast<double>(kind % 64) / 64;
  if (LooksForNeedle(text, position, layer, q_head)) {
    // One of the newest tokens, one near a border of blocks of 16, or any.
    const auto any = static_cast<int64_t>(Mix(hash, layer, q_head, kTarget) >> 1);
    int64_t target = any % (position + 1);
    if (kind % 4 == 0) target = position - any % std::min<int64_t>(position + 1, 8);
    if (kind % 4 == 1) target = target / 16 * 16;
    const int head = q_head / (shape_.q_heads / layer_heads_[layer]);
    direction = Place(text.hash(target), layer, head, kKey);
    const double square = squares_[direction + shape_.dim_k] - squares_[direction];
    factor = kNeedleLogit * std::sqrt(static_cast<double>(shape_.dim_k)) / square;
  }
  std::vector<float> query(static_cast<size_t>(shape_.dim_k));
  for (int d = 0; d < shape_.dim_k; ++d) {
    query[d] = Round(shape_.dtype, static_cast<float>(factor * table_[direction + d]));
  }
  return query;
}

void TextModel::WriteQueries(const Text& text, int64_t position, int32_t layer,
                             std::byte* q) const {
  for (int head = 0; head < shape_.q_heads; ++head) {
    const std::vector<std::byte> bytes = ToBytes(shape_.dtype, Query(text, position, layer, head));
    std::memcpy(q + head * bytes.size(), bytes.data(), bytes.size());
  }
}

Answer TextModel::Attend(const Text& text, int64_t position, int32_t layer, int q_head) const {
  const std::vector<float> query = Query(text, position, layer, q_head);
  const std::vector<double> q(query.begin(), query.end());
  const int head = q_head / (shape_.q_heads / layer_heads_[layer]);
  const double scale = 1 / std::sqrt(static_cast<double>(shape_.dim_k));
  std::vector<double> logits(static_cast<size_t>(position + 1));
  double most = -INFINITY;
  for (int64_t i = 0; i <= position; ++i) {
    const size_t key = Place(text.hash(i), layer, head, kKey);
    logits[i] = scale * Dot(q.data(), &table_[key], shape_.dim_k);
    most = std::max(most, logits[i]);
  }
  Answer answer;
  answer.out.assign(static_cast<size_t>(shape_.dim_v), 0);
  double sum = 0, square = 0;
  for (int64_t i = 0; i <= position; ++i) {
    const double weight = std::exp(logits[i] - most);
    const size_t value = Place(text.hash(i), layer, head, shape_.shared_kv ? kKey : kValue);
    Add(weight, &table_[value], shape_.dim_v, answer.out.data());
    sum += weight;
    square += weight * (squares_[value + shape_.dim_v] - squares_[value]);
  }
  for (double& x : answer.out) {
    x /= sum;
    answer.norm += x * x;
  }
  answer.norm = std::sqrt(answer.norm);
  answer.rms_value = std::sqrt(square / sum);
  answer.lse = most + std::log(sum);
  return answer;
}

void TextModel::SaveTables(const Runtime& runtime, const std::string& path,
                           const std::string& name) const {
  constexpr int64_t kTokens = 3000;
  Text text;
  std::mt19937_64 engine(99);
  for (int64_t i = 0; i < kTokens; ++i) text.Push(static_cast<int32_t>(engine() % kVocabulary));
  Sequence sequence(runtime);
  for (int32_t layer = 0; layer < num_layers(); ++layer) {
    const size_t heads = layer_heads_[layer];
    if (heads == 0) continue;
    const size_t k_bytes = heads * shape_.dim_k * element();
    const size_t v_bytes = heads * shape_.dim_v * element();
    const size_t q_bytes = shape_.q_heads * shape_.dim_k * element();
    std::vector<std::byte> k(kTokens * k_bytes), v(kTokens * v_bytes), q(kTokens * q_bytes);
    for (int64_t i = 0; i < kTokens; ++i) {
      WriteRows(text, i, layer, &k[i * k_bytes], &v[i * v_bytes]);
      WriteQueries(text, i, layer, &q[i * q_bytes]);
    }
    vattn_append_params params = Init<vattn_append_params>();
    params.layer = layer;
    params.num_tokens = params.num_queries = kTokens;
    params.k = k.data();
    params.v = shape_.shared_kv ? nullptr : v.data();
    params.q = q.data();
    sequence.Append(params);
  }
  sequence.SaveTables(path, name);
}

}  // namespace vattn::test
