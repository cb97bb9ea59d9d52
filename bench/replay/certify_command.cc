#include "bench/replay/certify_command.h"

#include <cstdio>
#include <numeric>

#include "bench/cli/text.h"

namespace vattn::bench {

void RunCertify(const CertifyJob& job, const std::string& path, const CommandLine& command) {
  Progress progress;
  std::vector<std::vector<std::string>> rows;
  Json list = Json::array();
  for (size_t i = 0; i < job.traces.size(); ++i) {
    const Trace& trace = job.traces[i];
    ReplayPlan plan = job.plan;
    plan.forks = true;
    if (plan.layers.empty()) {
      plan.layers.resize(trace.layers);
      std::iota(plan.layers.begin(), plan.layers.end(), 0);
    }
    vattn_options options = job.options;
    SetShape(trace, plan, &options);
    progress.Begin(job.names[i] + ": exact attention in float64");
    const Reference reference =
        ComputeReference(trace, plan.layers, plan.steps, ResolveThreads(options.num_threads));
    std::vector<Coverage> cells;
    for (const Cell& cell : job.cells) {
      progress.Begin(job.names[i] + ", cell " + std::to_string(cells.size() + 1) + " of " +
                     std::to_string(job.cells.size()));
      cells.push_back(MeasureCoverage(trace, plan, options, reference, cell, &progress));
    }
    const auto more = CoverageRows(job.names[i], cells);
    rows.insert(rows.end(), more.begin() + (rows.empty() ? 0 : 1), more.end());
    Json entry = {{"recording", job.names[i]}, {"layers", plan.layers.size()},
                  {"q_heads", trace.q_heads},  {"steps", plan.steps},
                  {"runs", plan.seeds},        {"cells", Json::array()}};
    for (const Coverage& cell : cells) entry["cells"].push_back(CoverageJson(cell));
    list.push_back(std::move(entry));
  }
  progress.Clear();
  const std::string reproduce = command.Reproduce(job.options.seed);
  std::printf("%s\n%d runs of %lld steps, seed %llu\n\n%s\nreproduce: %s\n",
              EnvironmentLine().c_str(), static_cast<int>(job.plan.seeds),
              static_cast<long long>(job.plan.steps),
              static_cast<unsigned long long>(job.options.seed), MarkdownTable(rows).c_str(),
              reproduce.c_str());
  std::fflush(stdout);
  if (path.empty()) return;
  Json json = ResultHeader(command);
  json["reproduce"] = reproduce;
  json["coverage"] = std::move(list);
  WriteJson(path, json);
}

}  // namespace vattn::bench
