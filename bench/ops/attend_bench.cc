// Attention: every row, and one step of the sampled policy as a whole. GB/s are of rows read.
#include "bench/ops/bench.h"
#include "kernels/cpu/attend.h"
#include "kernels/cpu/decode.h"
#include "kernels/cpu/estimate.h"

namespace vattn::bench {
namespace {

void BM_AttendDense(benchmark::State& state) {
  Workload work(ShapeOf(state));
  for (auto _ : state) {
    work.Next();
    cpu::DecodeAllDense(work.storage(), work.group(), Verdict::kDense, {});
    benchmark::ClobberMemory();
  }
  const double tokens = static_cast<double>(work.shape().tokens);
  SetRates(state, tokens * work.storage().row.row_bytes, tokens);
}
BENCHMARK(BM_AttendDense)->Apply(Axes);

// Rows, logits and |v|^2 of every 20th token: what a draw of 5 % costs to read.
void BM_ReadDraw(benchmark::State& state) {
  Workload work(ShapeOf(state));
  const cpu::Draw draw = {.count = work.ListTokens(20)};
  for (auto _ : state) {
    work.Next();
    cpu::ReadDraw(work.storage(), work.group(), draw, 0, {});
    benchmark::ClobberMemory();
  }
  const double tokens = static_cast<double>(draw.count);
  SetRates(state, tokens * work.storage().row.row_bytes, tokens);
}
BENCHMARK(BM_ReadDraw)->Apply(Axes);

// tokens/s are tokens of the context; GB/s of the rows that were drawn.
void BM_DecodeVerified(benchmark::State& state) {
  Workload work(ShapeOf(state));
  double rows = 0;
  for (auto _ : state) {
    work.Next();
    ++work.group().step;
    cpu::Decode({.storage = work.storage(),
                 .promise = work.promise(),
                 .groups = &work.group(),
                 .num_groups = 1},
                {});
    rows += static_cast<double>(work.group().selected);
  }
  const double per_step = rows / static_cast<double>(state.iterations());
  SetRates(state, per_step * work.storage().row.row_bytes,
           static_cast<double>(work.shape().tokens));
  state.counters["selected"] = per_step;
}
BENCHMARK(BM_DecodeVerified)->Apply(Axes);

}  // namespace
}  // namespace vattn::bench
