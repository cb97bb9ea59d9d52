// Plan and draw over scanned estimates. GB/s are of estimates read, once a pass over them.
#include "bench/ops/bench.h"
#include "kernels/cpu/decode.h"
#include "kernels/cpu/plan.h"
#include "kernels/cpu/scan.h"

namespace vattn::bench {
namespace {

// A workload that has been scanned and planned once, so that the controller has settled.
cpu::Plan Prepare(Workload& work) {
  float* states = work.group().scratch.work;
  cpu::PrepareQueries(work.storage(), IndexKind::kBalanced, work.group());
  cpu::ScanEstimates(work.storage(), IndexKind::kBalanced, work.group(), {});
  cpu::AttendFixed(work.storage(), work.group(), states, {});
  cpu::SumEstimates(work.storage(), work.group(), states);
  return cpu::MakePlan(work.storage(), work.promise(), work.group(), {});
}

double EstimateBytes(const Workload& work) {
  return static_cast<double>(work.middle() * work.shape().heads) * sizeof(uint16_t);
}

void BM_MakePlan(benchmark::State& state) {
  Workload work(ShapeOf(state));
  Prepare(work);
  for (auto _ : state) {
    const cpu::Plan plan = cpu::MakePlan(work.storage(), work.promise(), work.group(), {});
    benchmark::DoNotOptimize(plan.expected);
  }
  SetRates(state, EstimateBytes(work), static_cast<double>(work.middle()));
}
BENCHMARK(BM_MakePlan)->Apply(Axes);

void BM_DrawTokens(benchmark::State& state) {
  Workload work(ShapeOf(state));
  const cpu::Plan plan = Prepare(work);
  int64_t count = 0;
  for (auto _ : state) {
    count = cpu::DrawTokens(work.group(), plan.inclusion, 0, {.refresh = work.promise().refresh}, 0,
                            {});
    benchmark::DoNotOptimize(count);
  }
  SetRates(state, EstimateBytes(work), static_cast<double>(work.middle()));
  state.counters["drawn"] = static_cast<double>(count);
}
BENCHMARK(BM_DrawTokens)->Apply(Axes);

}  // namespace
}  // namespace vattn::bench
