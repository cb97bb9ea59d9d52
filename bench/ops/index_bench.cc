// Making an index from a sample of keys and values, its long loops alone, and the queries it is
// made for. One KV head, one thread.
#include <cmath>
#include <random>
#include <vector>

#include "bench/ops/bench.h"
#include "kernels/cpu/products.h"
#include "runtime/index/index.h"
#include "runtime/options.h"

namespace vattn::bench {
namespace {

// [count][dim] Gaussian rows of spreads that fall over the dimensions.
std::vector<float> SampleRows(int64_t count, int dim) {
  std::minstd_rand random(1);
  std::normal_distribution<float> normal;
  std::vector<float> rows(static_cast<size_t>(count) * dim);
  for (size_t i = 0; i < rows.size(); ++i) {
    const float at = static_cast<float>(i % static_cast<size_t>(dim)) / static_cast<float>(dim);
    rows[i] = 1 + normal(random) * std::exp(-4 * at);
  }
  return rows;
}

Storage StorageOf(int dim) {
  Options options;
  options.num_q_heads = options.num_kv_heads = 1;
  options.head_dim_k = options.head_dim_v = dim;
  (void)ResolveOptions(options);
  return MakeStorage(options);
}

void SampleAxes(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"sample", "dim"})->Unit(benchmark::kMillisecond);
  for (const int64_t sample : {1024, 2048, 4096, 8192}) benchmark->Args({sample, kDim});
  for (const int64_t dim : {64, 256, 576}) benchmark->Args({2048, dim});
}

// GFLOP/s of products with sample x dim x dim multiplications.
void SetFlops(benchmark::State& state) {
  const double flops = 2e-9 * static_cast<double>(state.range(0) * state.range(1) * state.range(1));
  state.counters["GFLOP/s"] = benchmark::Counter(flops * static_cast<double>(state.iterations()),
                                                 benchmark::Counter::kIsRate);
}

void BM_MakeIndex(benchmark::State& state) {
  const int64_t count = state.range(0);
  const int dim = static_cast<int>(state.range(1));
  const Storage storage = StorageOf(dim);
  const std::vector<float> rows = SampleRows(count, dim);
  QueryMoment moment(dim);
  moment.Add(rows.data(), 512, 512);
  for (auto _ : state)
    benchmark::DoNotOptimize(Index::Make(storage, rows.data(), rows.data(), count, moment));
}
BENCHMARK(BM_MakeIndex)->Apply(SampleAxes);

void BM_OuterProducts(benchmark::State& state) {
  const int dim = static_cast<int>(state.range(1));
  const std::vector<float> rows = SampleRows(state.range(0), dim);
  std::vector<float> sum(static_cast<size_t>(dim) * dim);
  for (auto _ : state) {
    cpu::AddOuterProducts(rows.data(), state.range(0), dim, sum.data());
    benchmark::ClobberMemory();
  }
  SetFlops(state);
}
BENCHMARK(BM_OuterProducts)->Apply(SampleAxes);

void BM_MapRows(benchmark::State& state) {
  const int dim = static_cast<int>(state.range(1));
  const std::vector<float> rows = SampleRows(state.range(0), dim), map = SampleRows(dim, dim);
  std::vector<float> out(rows.size());
  for (auto _ : state) {
    cpu::MapRows(rows.data(), state.range(0), dim, map.data(), dim, out.data());
    benchmark::ClobberMemory();
  }
  SetFlops(state);
}
BENCHMARK(BM_MapRows)->Apply(SampleAxes);

void BM_AddQueries(benchmark::State& state) {
  const int dim = static_cast<int>(state.range(0));
  const std::vector<float> rows = SampleRows(512, dim);
  QueryMoment moment(dim);
  for (auto _ : state) moment.Add(rows.data(), 512, 4096);
}
BENCHMARK(BM_AddQueries)
    ->ArgName("dim")
    ->Arg(64)
    ->Arg(kDim)
    ->Arg(256)
    ->Arg(576)
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace vattn::bench
