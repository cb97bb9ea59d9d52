// Coding of tokens that leave the window. GB/s are of keys read.
#include "bench/ops/bench.h"
#include "kernels/cpu/encode.h"

namespace vattn::bench {
namespace {

void BM_Encode(benchmark::State& state) {
  Workload work(ShapeOf(state));
  for (auto _ : state) {
    work.Next();
    cpu::Encode(work.encode_params(), {});
    benchmark::ClobberMemory();
  }
  const double tokens = static_cast<double>(work.middle());
  SetRates(state,
           tokens * static_cast<double>(work.shape().dim) * ElementBytes(work.storage().row.dtype),
           tokens);
}
BENCHMARK(BM_Encode)->Apply(Axes);

}  // namespace
}  // namespace vattn::bench
