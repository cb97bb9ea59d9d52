// Scan of the index: predicted scores of the whole middle. GB/s are of codes read.
#include "bench/ops/bench.h"
#include "kernels/cpu/scan.h"

namespace vattn::bench {
namespace {

void BM_PackQueries(benchmark::State& state) {
  Workload work(ShapeOf(state));
  for (auto _ : state) {
    cpu::PrepareQueries(work.storage(), IndexKind::kBalanced, work.group());
    benchmark::ClobberMemory();
  }
}
BENCHMARK(BM_PackQueries)->Apply(Axes);

void BM_ScanEstimates(benchmark::State& state) {
  Workload work(ShapeOf(state));
  cpu::PrepareQueries(work.storage(), IndexKind::kBalanced, work.group());
  for (auto _ : state) {
    work.Next();
    cpu::ScanEstimates(work.storage(), IndexKind::kBalanced, work.group(), {});
    benchmark::ClobberMemory();
  }
  const double tokens = static_cast<double>(work.middle());
  SetRates(state, tokens * work.storage().code.bytes(), tokens);
}
BENCHMARK(BM_ScanEstimates)->Apply(Axes);

}  // namespace
}  // namespace vattn::bench
