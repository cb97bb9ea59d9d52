#include "bench/ops/bench.h"

#include <algorithm>
#include <cstring>
#include <random>

#include "kernels/cpu/attend.h"
#include "kernels/cpu/encode.h"
#include "runtime/index/index.h"
#include "runtime/options.h"
#include "runtime/quantiles.h"

namespace vattn::bench {
namespace {

constexpr int64_t kPoolBytes = int64_t{128} << 20;
constexpr int64_t kCalibration = 4096;  // keys and queries that the index is made from

// bf16 of random numbers, near enough to Gaussian: a sum of four uniform ones.
uint16_t RandomElement(std::minstd_rand& random) {
  float sum = -2;
  for (int i = 0; i < 4; ++i) sum += static_cast<float>(random()) / 2147483648.f;
  const float value = 1.7f * sum;
  uint32_t bits;
  static_assert(sizeof(bits) == sizeof(value));
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

std::vector<float> RandomFloats(std::minstd_rand& random, int64_t count) {
  std::vector<float> x(count);
  for (float& value : x) {
    const uint32_t bits = uint32_t{RandomElement(random)} << 16;
    std::memcpy(&value, &bits, sizeof(value));
  }
  return x;
}

}  // namespace

struct Workload::Data {
  std::vector<std::byte> pool, scratch;
  std::vector<int32_t> blocks;
  std::vector<uint16_t> query;
  std::vector<float> out, lse, error;
  std::vector<Verdict> verdict;
  std::vector<HeadState> states;
  std::shared_ptr<const Index> index;
  float quantile[kMaxLooks][kQuantileBins + 1];
};

void Axes(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"tokens", "heads", "code_bytes", "dim"});
  for (const int64_t tokens : kTokenAxis) benchmark->Args({tokens, kHeads, kCodeBytes, kDim});
  for (const int64_t heads : kHeadAxis) {
    if (heads != kHeads) benchmark->Args({kTokens, heads, kCodeBytes, kDim});
  }
  for (const int64_t bytes : kCodeByteAxis) {
    if (bytes != kCodeBytes) benchmark->Args({kTokens, kHeads, bytes, kDim});
  }
  for (const int64_t dim : kDimAxis) {
    if (dim != kDim) benchmark->Args({kTokens, kHeads, kCodeBytes, dim});
  }
  benchmark->Unit(benchmark::kMicrosecond);
}

Shape ShapeOf(const benchmark::State& state) {
  return {.tokens = state.range(0),
          .heads = state.range(1),
          .code_bytes = state.range(2),
          .dim = state.range(3)};
}

Workload::Workload(const Shape& shape) : shape_(shape), data_(std::make_unique<Data>()) {
  Options options;
  options.num_q_heads = static_cast<int32_t>(shape.heads);
  options.num_kv_heads = 1;
  options.head_dim_k = options.head_dim_v = static_cast<int32_t>(shape.dim);
  options.index_bytes = static_cast<int32_t>(shape.code_bytes);
  (void)ResolveOptions(options);
  storage_ = MakeStorage(options);
  promise_ = MakePromise(options);
  FillQuantiles(promise_.bound, promise_.delta, promise_.max_looks, promise_.pilot,
                data_->quantile);
  promise_.quantile = data_->quantile;

  std::minstd_rand random(1);
  const int64_t blocks = (shape.tokens + kBlockTokens - 1) / kBlockTokens;
  const int64_t bytes = blocks * storage_.block.bytes;
  copies_ = (kPoolBytes + bytes - 1) / bytes;
  data_->pool.resize(copies_ * bytes);
  storage_.base = data_->pool.data();
  for (int64_t b = 0; b < blocks; ++b) data_->blocks.push_back(static_cast<int32_t>(b));
  // A few thousand random elements, repeated at odd offsets, fill the rows.
  std::vector<uint16_t> elements(10007);
  for (uint16_t& element : elements) element = RandomElement(random);
  const int64_t row_elements = 2 * shape.dim;
  for (int64_t t = 0; t < shape.tokens; ++t) {
    auto* row =
        reinterpret_cast<uint16_t*>(storage_.base + t / kBlockTokens * storage_.block.bytes +
                                    t % kBlockTokens * storage_.row.row_bytes);
    for (int64_t j = 0; j < row_elements; ++j) row[j] = elements[(t * 4099 + j) % elements.size()];
  }
  for (int64_t i = 0; i < shape.heads * shape.dim; ++i)
    data_->query.push_back(RandomElement(random));
  const std::vector<float> keys = RandomFloats(random, kCalibration * shape.dim);
  const std::vector<float> values = RandomFloats(random, kCalibration * shape.dim);
  data_->index = Index::Make(storage_, keys.data(), values.data(), kCalibration,
                             QueryMoment(static_cast<int>(shape.dim)));
  data_->out.resize(shape.heads * shape.dim);
  data_->lse.resize(shape.heads);
  data_->error.resize(shape.heads);
  data_->verdict.resize(shape.heads);
  data_->states.resize(shape.heads);
  const int q_heads = static_cast<int>(shape.heads);
  data_->scratch.resize(ScratchBytes(storage_, promise_, shape.tokens, q_heads) + 64);
  auto* scratch = data_->scratch.data();
  scratch += (64 - reinterpret_cast<uintptr_t>(scratch) % 64) % 64;

  group_.blocks = data_->blocks.data();
  group_.tokens = shape.tokens;
  group_.middle_begin = options.sinks;
  group_.middle_end = (shape.tokens - options.window) / kCodeTokens * kCodeTokens;
  group_.group_heads = q_heads;
  group_.out_dtype = static_cast<int32_t>(DType::kF32);
  group_.index = data_->index->tables();
  group_.state = data_->states.data();
  group_.key = MakeRandomKey(1, 1, 0, 0);
  group_.q = data_->query.data();
  group_.out = data_->out.data();
  group_.lse = data_->lse.data();
  group_.verdict = data_->verdict.data();
  group_.error = data_->error.data();
  group_.scratch = CarveScratch(storage_, promise_, shape.tokens, q_heads, scratch);
  cpu::ScaleQueries(storage_, group_);
  cpu::Encode(encode_params(), {});
  for (int64_t copy = 1; copy < copies_; ++copy)
    std::copy_n(storage_.base, bytes, storage_.base + copy * bytes);
}

void Workload::Next() {
  copy_ = (copy_ + 1) % copies_;
  storage_.base = data_->pool.data() + copy_ * static_cast<int64_t>(data_->pool.size()) / copies_;
}

Workload::~Workload() = default;

EncodeParams Workload::encode_params() const {
  return {.storage = storage_,
          .index = group_.index,
          .blocks = group_.blocks,
          .begin = group_.middle_begin,
          .end = group_.middle_end};
}

int64_t Workload::ListTokens(int64_t stride) {
  int64_t count = 0;
  for (int64_t t = group_.middle_begin; t < group_.middle_end; t += stride, ++count) {
    group_.scratch.token[count] = static_cast<uint32_t>(t);
    group_.scratch.weight[count] = 1.f / static_cast<float>(stride);
  }
  return count;
}

void SetRates(benchmark::State& state, double bytes, double tokens) {
  const double iterations = static_cast<double>(state.iterations());
  state.counters["GB/s"] =
      benchmark::Counter(1e-9 * bytes * iterations, benchmark::Counter::kIsRate);
  state.counters["tokens/s"] = benchmark::Counter(tokens * iterations, benchmark::Counter::kIsRate);
}

}  // namespace vattn::bench
