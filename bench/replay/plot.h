// The picture of a replay: how error and selected share lie over layers and heads, and what each
// policy's error costs.
#ifndef VATTN_BENCH_REPLAY_PLOT_H_
#define VATTN_BENCH_REPLAY_PLOT_H_

#include <string>
#include <vector>

#include "bench/cli/progress.h"
#include "bench/replay/replay.h"
#include "bench/replay/report.h"

namespace vattn::bench {

struct CostPoint {
  double selected_share;  // mean, of the middle
  double error_p95;
};
struct CostCurve {
  std::string policy;
  std::vector<CostPoint> points;
};

// Runs verified over epsilons, topk over shares and topk-uniform (top-k 2 %, base 1 %) over
// epsilons, one seed each.
std::vector<CostCurve> MeasureCosts(const Trace& trace, const ReplayPlan& plan,
                                    const vattn_options& options, const Reference& reference,
                                    Progress* progress);

// An SVG file of 900 x 600 pixels.
std::string PlotReplay(const std::string& title, const std::string& subtitle, const Run& verified,
                       const std::vector<CostCurve>& costs);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_REPLAY_PLOT_H_
