#include "bench/replay/plot.h"

#include "bench/cli/settings.h"
#include "bench/cli/text.h"
#include "bench/replay/chart.h"

namespace vattn::bench {
namespace {

constexpr char kBlue[] = "#0072b2", kGreen[] = "#009e73", kOrange[] = "#d55e00";

CostPoint Measure(const Trace& trace, const ReplayPlan& plan, const vattn_options& options,
                  const Reference& reference, Progress* progress) {
  progress->Begin("plot: " + ChoiceName(PolicyChoices(), options.policy) + ", " +
                  DescribePolicy(options));
  const Observations seen = Replay(trace, plan, options, reference, progress);
  const Figures figures =
      Summarize(seen, {0, seen.layers, 0, seen.q_heads}, options.epsilon, options.delta);
  return {figures.selected_mean, figures.error_p95};
}

// Heads side by side, layer after layer. Ticks name the heads of a single layer, else the layers,
// thinned out where they would run into each other.
Axis HeadAxis(const Run& run, size_t heads, const char* head_label) {
  constexpr size_t kMaxTicks = 12;
  const size_t layers = run.layers.size();
  Axis axis;
  axis.low = -.5;
  axis.high = static_cast<double>(layers * heads) - .5;
  if (layers == 1) {
    axis.label = std::string(head_label) + " of layer " + run.layers[0].name;
    for (size_t h = 0; h < heads; h += heads / kMaxTicks + 1) {
      axis.ticks.push_back({static_cast<double>(h), std::to_string(h)});
    }
    return axis;
  }
  axis.label = std::string("layer (") + head_label + "s side by side)";
  for (size_t l = 0; l < layers; l += (layers - 1) / kMaxTicks + 1) {
    axis.ticks.push_back({static_cast<double>(l * heads), run.layers[l].name});
  }
  return axis;
}

void DrawErrors(const Run& run, Svg* svg) {
  const size_t heads = run.layers[0].heads.size();
  Series series = {"error", kBlue, Marker::kCircle, {}};
  std::vector<double> values = {run.options.epsilon};
  for (size_t l = 0; l < run.layers.size(); ++l) {
    for (size_t h = 0; h < heads; ++h) {
      values.push_back(run.layers[l].heads[h].error_p95);
      series.points.push_back({static_cast<double>(l * heads + h), values.back()});
    }
  }
  Chart chart(svg, {74, 92}, 340, 180, "Error of verified, by query head",
              HeadAxis(run, heads, "query head"),
              LinearAxis("relative error, p95", values, Unit::kPlain));
  chart.AddBars(series, .7);
  chart.AddLevel(run.options.epsilon, kOrange, "epsilon");
}

void DrawShares(const Run& run, Svg* svg) {
  const size_t q_heads = run.layers[0].heads.size(), heads = static_cast<size_t>(run.num_kv_heads);
  Series series = {"selected", kGreen, Marker::kCircle, {}};
  std::vector<double> values;
  for (size_t l = 0; l < run.layers.size(); ++l) {
    for (size_t h = 0; h < heads; ++h) {
      values.push_back(run.layers[l].heads[h * (q_heads / heads)].selected_mean);
      series.points.push_back({static_cast<double>(l * heads + h), values.back()});
    }
  }
  Chart chart(svg, {74, 362}, 340, 180, "Rows selected by verified, by KV head",
              HeadAxis(run, heads, "KV head"),
              LinearAxis("share of the middle, mean", values, Unit::kPercent));
  chart.AddBars(series, .7);
}

void DrawCosts(const std::vector<CostCurve>& costs, Svg* svg) {
  const char* const colors[] = {kBlue, kOrange, kGreen};
  const Marker markers[] = {Marker::kCircle, Marker::kSquare, Marker::kTriangle};
  std::vector<Series> all;
  std::vector<double> shares, errors;
  for (size_t i = 0; i < costs.size(); ++i) {
    Series series = {costs[i].policy, colors[i % 3], markers[i % 3], {}};
    for (const CostPoint& point : costs[i].points) {
      shares.push_back(point.selected_share);
      errors.push_back(point.error_p95);
      series.points.push_back({shares.back(), errors.back()});
    }
    all.push_back(std::move(series));
  }
  Chart chart(svg, {510, 92}, 360, 450, "What an error costs",
              LogAxis("selected share of the middle, mean", shares, Unit::kPercent),
              LogAxis("relative error, p95", errors, Unit::kPlain));
  for (const Series& series : all) chart.AddLine(series);
  chart.AddLegend(all);
}

}  // namespace

std::vector<CostCurve> MeasureCosts(const Trace& trace, const ReplayPlan& plan,
                                    const vattn_options& options, const Reference& reference,
                                    Progress* progress) {
  ReplayPlan one = plan;
  one.seeds = 1;
  one.timed = false;
  std::vector<CostCurve> curves = {{"verified", {}}, {"topk", {}}, {"topk-uniform", {}}};
  vattn_options tried = options;
  for (const float epsilon : {.05f, .1f, .2f, .4f}) {
    tried.policy = VATTN_POLICY_VERIFIED;
    tried.epsilon = epsilon;
    curves[0].points.push_back(Measure(trace, one, tried, reference, progress));
  }
  for (const float share : {.005f, .01f, .02f, .05f, .1f, .2f}) {
    tried.policy = VATTN_POLICY_TOPK;
    tried.topk_share = share;
    curves[1].points.push_back(Measure(trace, one, tried, reference, progress));
  }
  tried.topk_share = .02f;
  tried.base_share = .01f;
  for (const float epsilon : {.05f, .1f, .2f, .4f}) {
    tried.policy = VATTN_POLICY_TOPK_UNIFORM;
    tried.epsilon = epsilon;
    curves[2].points.push_back(Measure(trace, one, tried, reference, progress));
  }
  return curves;
}

std::string PlotReplay(const std::string& title, const std::string& subtitle, const Run& verified,
                       const std::vector<CostCurve>& costs) {
  Svg svg(900, 600);
  svg.Text({22, 28}, title, 16);
  svg.Text({22, 48}, subtitle + ", " + DescribePolicy(verified.options), 12);
  DrawErrors(verified, &svg);
  DrawShares(verified, &svg);
  DrawCosts(costs, &svg);
  return svg.Finish();
}

}  // namespace vattn::bench
