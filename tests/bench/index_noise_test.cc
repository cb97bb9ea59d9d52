// The noise that an index says its codes have, beside their errors on recorded keys and queries.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "bench/inside/index_view.h"
#include "bench/replay/replay.h"

namespace vattn::bench {
namespace {

// sigma(q)^2 of IndexTables::noise.
double NoiseVariance(const IndexTables& index, const float* q, int dim) {
  double variance = 0;
  for (int j = 0; j < dim; ++j) {
    double part = 0;
    for (int c = 0; c < dim; ++c) part += static_cast<double>(q[c]) * index.noise[j * dim + c];
    variance += part * part;
  }
  return variance;
}

TEST(IndexNoiseTest, PredictsScoreErrors) {
  const Trace trace = ReadTrace(VATTN_TEST_DATA "/smol_fixture.safetensors");
  ReplayPlan plan;
  for (int l = 0; l < trace.layers; ++l) plan.layers.push_back(l);
  plan.steps = trace.steps;
  for (const int bytes : {16, 32}) {
    vattn_options options;
    vattn_options_init(&options, sizeof(options));
    SetShape(trace, plan, &options);
    options.index_bytes = bytes;
    IndexView view(trace, plan.layers, options);
    const int dim = view.storage().row.dim_k;
    std::vector<double> ratios;  // measured over predicted standard deviation, by query
    double all_measured = 0, all_predicted = 0, marked = 0, count = 0;
    for (int64_t layer = 0; layer < trace.layers; ++layer) {
      for (int64_t h = 0; h < trace.kv_heads; ++h) {
        for (int64_t step = 0; step < trace.steps; step += 5) {
          Group group = view.Prepare(layer, h, step);
          const std::vector<float> exact = view.ExactScores(group);
          const std::vector<float> predicted = view.PredictedScores(group, exact);
          const int64_t middle = group.middle_end - group.middle_begin;
          for (int g = 0; g < group.q_heads; ++g) {
            double sum2 = 0, coded = 0;
            for (int64_t i = g * middle; i < (g + 1) * middle; ++i) {
              if (predicted[i] == exact[i]) continue;  // marked
              const double error = static_cast<double>(predicted[i]) - exact[i];
              sum2 += error * error;
              ++coded;
            }
            const double variance = NoiseVariance(group.index, group.scratch.query + g * dim, dim);
            ratios.push_back(std::sqrt(sum2 / coded / variance));
            all_measured += sum2 / coded;
            all_predicted += variance;
            marked += static_cast<double>(middle) - coded;
            count += static_cast<double>(middle);
          }
        }
      }
    }
    std::sort(ratios.begin(), ratios.end());
    const size_t n = ratios.size();
    EXPECT_NEAR(ratios[n / 2], 1, .1) << bytes;
    EXPECT_NEAR(std::sqrt(all_measured / all_predicted), 1, .1) << bytes;
    EXPECT_LE(marked / count, .006) << bytes;
  }
}

}  // namespace
}  // namespace vattn::bench
