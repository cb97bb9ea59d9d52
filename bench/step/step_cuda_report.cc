#include "bench/step/step_cuda_report.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "bench/cli/handles.h"
#include "bench/cli/settings.h"
#include "bench/cli/statistics.h"
#include "bench/cli/text.h"

namespace vattn::bench {
namespace {

constexpr const char* kStages[VATTN_TIMELINE_MARKS - 1] = {"prepare", "scan",  "plan", "draw",
                                                           "attend",  "judge", "rest"};

constexpr char kTimeNotes[] =
    "us a layer: device time of the replayed graph over the layers; by calls: the same enqueued "
    "without a\ngraph; begin: host time of vattn_batch_begin_step. floor: the longer of rows "
    "fetched "
    "over the memcpy rate\nand codes and estimates (written, read) over the device copy rate. "
    "HiSparse-style: the best 2048 rows of a\nhot set of 4096 by exact LRU, 80 % the same from "
    "step "
    "to step. For comparison, torch's flash and cuDNN\nattention take 1420 to 1460 us on an H100 "
    "with 1M tokens, 8 KV heads x 4, all KV in device memory.\n";

constexpr char kWorkNotes[] =
    "Rows are means of a KV head and layer, PCIe and scan those of a layer. over epsilon: VERIFIED "
    "answers\nof some heads and steps that are off by more than epsilon from attention in float64 "
    "over the same rows;\nexact, worst: of the EXACT and DENSE ones. Device bytes: the whole "
    "runtime's, per token that is held and\nlayer, and over the bytes of its K and V.\n";

constexpr char kStageNotes[] =
    "Time line of the first KV head, us: new row and sinks and window, codes, multipliers, first "
    "draw, its\nrows fetched and attended, its certificate, further looks and output. With top-k "
    "policies: plan and\ndraw rank and list the best rows, judge reads the base sample, rest the "
    "sample.\n";

constexpr char kSharedNote[] =
    "shared: host memory would not hold the batch apart; its sequences are forks of one, with "
    "queries of their\nown, and share rows, codes and hot rows.\n";

constexpr char kResidentNote[] =
    "resident: every step asks the same, and random numbers stay (refresh 4096): what a step needs "
    "is in the\nhot set.\n";

double Promised(const DeviceStepFigures& f) {
  const double all =
      static_cast<double>(std::accumulate(f.verdicts.begin(), f.verdicts.end(), int64_t{0}));
  return static_cast<double>(f.verdicts[VATTN_VERDICT_EXACT] + f.verdicts[VATTN_VERDICT_VERIFIED]) /
         all;
}

double HotHits(const DeviceStepFigures& f) { return 1 - f.fetched / f.selected; }

double BytesPerToken(const DeviceStepLine& line) {
  return line.figures.device_bytes / static_cast<double>(line.figures.distinct_tokens) /
         line.shape.layers;
}

double DenseBytesPerToken(const DeviceStepLine& line) {
  return static_cast<double>(line.shape.kv_heads) * static_cast<double>(RowBytes(line.options));
}

std::string Pair(double a, double b) { return Fixed(a, 1) + " / " + Fixed(b, 1); }

// A baseline's time, and how many times longer it is.
std::string Beside(double baseline_us, double us) {
  if (std::isnan(baseline_us)) return "-";
  const double times = baseline_us / us;
  return Fixed(baseline_us, 0) + " (" + Fixed(times, times < 10 ? 2 : 0) + "x)";
}

std::string TimeTable(const std::vector<DeviceStepLine>& lines, const DeviceRates& rates) {
  std::vector<std::vector<std::string>> rows = {
      {"tokens x batch", "us a layer, p50 / p90", "by calls, p50 / p90", "begin, p50 / p90",
       "floor", "of floor", "dense on device", "dense streamed", "HiSparse-style"}};
  for (const DeviceStepLine& line : lines) {
    const DeviceStepFigures& f = line.figures;
    const StepBaselines& b = line.baselines;
    const double floor = FloorMicroseconds(f, rates);
    rows.push_back({LineName(line), Pair(f.us_p50, f.us_p90), Pair(f.eager_p50, f.eager_p90),
                    Pair(f.begin_p50, f.begin_p90), Fixed(floor, 1), Fixed(f.us_p50 / floor, 2),
                    Beside(b.dense_us, f.us_p50), Beside(b.streamed_us, f.us_p50),
                    Beside(b.hot_set_us, f.us_p50)});
  }
  return MarkdownTable(rows);
}

std::string WorkTable(const std::vector<DeviceStepLine>& lines) {
  std::vector<std::vector<std::string>> rows = {
      {"tokens x batch", "looks", "rows selected", "of middle", "rows fetched", "hot hits", "PCIe",
       "scan", "verified or exact", "over epsilon", "sharpness", "exact, worst",
       "device bytes a token", "of KV"}};
  for (const DeviceStepLine& line : lines) {
    const DeviceStepFigures& f = line.figures;
    const AnswerErrors& e = f.errors;
    rows.push_back({LineName(line), Fixed(f.looks, 2), Fixed(f.selected, 0),
                    Percent(f.selected / f.middle), Fixed(f.fetched, 1), Percent(HotHits(f)),
                    Bytes(f.pcie_bytes), Bytes(f.scan_bytes), Percent(Promised(f)),
                    std::to_string(e.VerifiedOver(line.options.epsilon)) + " of " +
                        std::to_string(e.verified.size()),
                    Fixed(Sharpness(e.verified, line.options.epsilon, line.options.delta), 2),
                    e.exact.empty() ? "-" : Number(e.WorstExact(), 2),
                    Number(BytesPerToken(line), 4),
                    Percent(BytesPerToken(line) / DenseBytesPerToken(line))});
  }
  return MarkdownTable(rows);
}

std::string StageTable(const std::vector<DeviceStepLine>& lines) {
  std::vector<std::vector<std::string>> rows = {{"tokens x batch"}};
  for (const char* stage : kStages) rows[0].push_back(stage);
  rows[0].push_back("sum");
  for (const DeviceStepLine& line : lines) {
    rows.push_back({LineName(line)});
    double sum = 0;
    for (const double us : line.figures.stage_us) {
      rows.back().push_back(Fixed(us, 1));
      sum += us;
    }
    rows.back().push_back(Fixed(sum, 1));
  }
  return MarkdownTable(rows);
}

}  // namespace

double FloorMicroseconds(const DeviceStepFigures& figures, const DeviceRates& rates) {
  return std::max(figures.pcie_bytes / rates.memcpy_gbps, figures.scan_bytes / rates.copy_gbps) /
         1e3;
}

std::string LineName(const DeviceStepLine& line) {
  return std::to_string(line.shape.tokens) + " x " + std::to_string(line.shape.batch) +
         (line.plan.shared ? " shared" : "") + (line.plan.resident ? " resident" : "");
}

std::string DeviceStepTables(const std::vector<DeviceStepLine>& lines, const DeviceRates& rates) {
  std::string text = TimeTable(lines, rates) + kTimeNotes + "\n" + WorkTable(lines) + kWorkNotes +
                     "\n" + StageTable(lines) + kStageNotes;
  const auto any = [&](bool DeviceStepPlan::*field) {
    return std::any_of(lines.begin(), lines.end(),
                       [field](const DeviceStepLine& line) { return line.plan.*field; });
  };
  if (any(&DeviceStepPlan::shared)) text += kSharedNote;
  if (any(&DeviceStepPlan::resident)) text += kResidentNote;
  for (const DeviceStepLine& line : lines) {
    if (line.plan.resident) continue;  // the same baselines as the line above
    for (const std::string& note : line.baselines.notes) text += "not measured: " + note + "\n";
  }
  return text;
}

Json DeviceStepJson(const DeviceStepLine& line, const DeviceRates& rates) {
  const DeviceStepFigures& f = line.figures;
  const StepBaselines& b = line.baselines;
  const AnswerErrors& e = f.errors;
  Json stages;
  for (size_t i = 0; i < f.stage_us.size(); ++i) stages[kStages[i]] = f.stage_us[i];
  return {{"tokens", line.shape.tokens},
          {"batch", line.shape.batch},
          {"shared", line.plan.shared},
          {"resident", line.plan.resident},
          {"us", {{"p50", f.us_p50}, {"p90", f.us_p90}}},
          {"eager_us", {{"p50", f.eager_p50}, {"p90", f.eager_p90}}},
          {"begin_step_us", {{"p50", f.begin_p50}, {"p90", f.begin_p90}}},
          {"floor_us", FloorMicroseconds(f, rates)},
          {"of_floor", f.us_p50 / FloorMicroseconds(f, rates)},
          {"stage_us", stages},
          {"looks", {{"mean", f.looks}}},
          {"selected_rows", {{"mean", f.selected}}},
          {"fetched_rows", {{"mean", f.fetched}}},
          {"middle", {{"mean", f.middle}}},
          {"hot_hit_rate", HotHits(f)},
          {"pcie_bytes", f.pcie_bytes},
          {"scan_bytes", f.scan_bytes},
          {"verdicts",
           {{"exact", f.verdicts[VATTN_VERDICT_EXACT]},
            {"verified", f.verdicts[VATTN_VERDICT_VERIFIED]},
            {"dense", f.verdicts[VATTN_VERDICT_DENSE]},
            {"best_effort", f.verdicts[VATTN_VERDICT_BEST_EFFORT]}}},
          {"verified_or_exact_share", Promised(f)},
          {"error",
           {{"verified", e.verified.size()},
            {"over_epsilon", e.VerifiedOver(line.options.epsilon)},
            {"p95", Quantile(e.verified, .95)},
            {"sharpness", Sharpness(e.verified, line.options.epsilon, line.options.delta)},
            {"exact", e.exact.size()},
            {"exact_worst", e.WorstExact()}}},
          {"device_bytes", f.device_bytes},
          {"device_bytes_per_token", BytesPerToken(line)},
          {"device_bytes_of_kv", BytesPerToken(line) / DenseBytesPerToken(line)},
          {"host_pool_bytes", line.options.host_bytes},
          {"prompt_seconds", f.prompt_seconds},
          {"dense_on_device", {{"us", b.dense_us}, {"speedup", b.dense_us / f.us_p50}}},
          {"dense_streamed", {{"us", b.streamed_us}, {"speedup", b.streamed_us / f.us_p50}}},
          {"hisparse_style",
           {{"us", b.hot_set_us},
            {"speedup", b.hot_set_us / f.us_p50},
            {"missed_share", b.hot_set_missed}}},
          {"not_measured", b.notes}};
}

}  // namespace vattn::bench
