#include "bench/inside/zoo_scan.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>

#include "bench/inside/index_view.h"
#include "bench/trace/reused_scores.h"
#include "kernels/cpu/scan.h"

namespace vattn::bench {
namespace {

constexpr double kTopShare = .01;
constexpr int kTimings = 5;  // of which the fastest counts: what else the machine did only adds

// Numbers of the `count` largest, equal ones in an order that has nothing to do with their place.
std::vector<int32_t> Largest(std::span<const float> scores, int64_t count) {
  std::vector<int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  const auto mixed = [](int32_t i) { return static_cast<uint32_t>(i) * 0x9E3779B1u; };
  std::nth_element(order.begin(), order.begin() + count, order.end(), [&](int32_t a, int32_t b) {
    return scores[a] != scores[b] ? scores[a] > scores[b] : mixed(a) < mixed(b);
  });
  order.resize(count);
  std::sort(order.begin(), order.end());
  return order;
}

// What the head's predictions add to the sums of all.
void Compare(std::span<const float> exact, std::span<const float> predicted, ScanFigures* sum) {
  const int64_t count =
      std::max<int64_t>(1, std::llround(kTopShare * static_cast<double>(exact.size())));
  const std::vector<int32_t> best = Largest(exact, count), found = Largest(predicted, count);
  std::vector<int32_t> both;
  std::set_intersection(best.begin(), best.end(), found.begin(), found.end(),
                        std::back_inserter(both));
  const float most = *std::max_element(exact.begin(), exact.end());
  const auto mass = [&](const std::vector<int32_t>& tokens) {
    double all = 0;
    for (const int32_t t : tokens) all += std::exp(static_cast<double>(exact[t]) - most);
    return all;
  };
  double error = 0, error2 = 0, score = 0, score2 = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double e = static_cast<double>(predicted[i]) - exact[i];
    error += e, error2 += e * e;
    score += exact[i], score2 += static_cast<double>(exact[i]) * exact[i];
  }
  const double n = static_cast<double>(exact.size());
  sum->recall += static_cast<double>(both.size()) / static_cast<double>(count);
  sum->mass += mass(found) / mass(best);
  sum->noise += std::sqrt(std::max(0., error2 / n - error / n * error / n));
  sum->spread += std::sqrt(std::max(0., score2 / n - score / n * score / n));
}

}  // namespace

ScanFigures MeasureScan(const Trace& trace, const std::vector<int32_t>& layers,
                        const vattn_options& options, int64_t steps, int64_t every) {
  IndexView view(trace, layers, options);
  const Storage& s = view.storage();
  const IndexKind kind = view.promise().index;
  ReusedScores reused(trace, layers);
  ScanFigures sum;
  double least_ns = 0;
  int64_t compared = 0, scans = 0;
  for (int64_t step = 0; step < steps; step += every) {
    const float* external = kind == IndexKind::kExternal ? reused.At(step) : nullptr;
    for (size_t l = 0; l < layers.size(); ++l) {
      for (int64_t h = 0; h < trace.kv_heads; ++h) {
        Group group = view.Prepare(static_cast<int64_t>(l), h, step);
        const int heads = group.group_heads;
        std::vector<const void*> rows;  // of scores, by head
        for (int g = 0; g < heads && external != nullptr; ++g) {
          rows.push_back(external + (static_cast<int64_t>(l) * trace.q_heads + h * heads + g) *
                                        reused.stride());
        }
        group.external = rows.data();
        const int64_t n = group.middle_end - group.middle_begin;
        const std::vector<float> exact = view.ExactScores(group);
        double fastest = std::numeric_limits<double>::infinity();
        for (int i = 0; i < kTimings; ++i) {
          const auto start = std::chrono::steady_clock::now();
          cpu::PrepareQueries(s, kind, group);
          cpu::ScanEstimates(s, kind, group, {});
          const std::chrono::duration<double, std::nano> took =
              std::chrono::steady_clock::now() - start;
          fastest = std::min(fastest, took.count());
        }
        least_ns += fastest / static_cast<double>(n);
        const std::vector<float> predicted = view.PredictedScores(group, exact);
        for (int g = 0; g < heads; ++g, ++compared) {
          Compare(std::span(exact).subspan(g * n, n), std::span(predicted).subspan(g * n, n), &sum);
        }
        sum.table_bytes += static_cast<double>(view.table_bytes(static_cast<int64_t>(l), h));
        ++scans;
      }
    }
  }
  const double results = static_cast<double>(compared);
  return {.bytes = static_cast<double>(s.code.bytes()),
          .table_bytes = sum.table_bytes / static_cast<double>(scans),
          .recall = sum.recall / results,
          .mass = sum.mass / results,
          .noise = sum.noise / results,
          .spread = sum.spread / results,
          .ns = least_ns / static_cast<double>(scans)};
}

}  // namespace vattn::bench
