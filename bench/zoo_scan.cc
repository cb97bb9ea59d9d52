#include "bench/zoo_scan.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <span>

#include "bench/failure.h"
#include "bench/reused_scores.h"
#include "kernels/cpu/attend.h"
#include "kernels/cpu/scan.h"
#include "kernels/sampling.h"
#include "runtime/runtime.h"
#include "runtime/sequence.h"

namespace vattn::bench {
namespace {

constexpr double kTopShare = .01;
constexpr int kTimings = 5;  // of which the fastest counts: what else the machine did only adds

void Check(const absl::Status& status) {
  if (!status.ok()) throw Failure(std::string(status.message()));
}

Options ToOptions(const vattn_options& from) {
  Options to;
  to.num_layers = from.num_layers, to.num_q_heads = from.num_q_heads, to.num_kv_heads = from.num_kv_heads;
  to.head_dim_k = from.head_dim_k, to.head_dim_v = from.head_dim_v, to.dtype = from.dtype;
  to.backend = VATTN_BACKEND_CPU, to.num_threads = 1, to.host_bytes = from.host_bytes;
  to.sinks = from.sinks, to.window = from.window;
  to.index = from.index, to.index_bytes = from.index_bytes;
  to.policy = VATTN_POLICY_TOPK;  // has room for the scores of the middle
  if (from.sign_maps != nullptr) to.sign_maps = from.sign_maps;
  return to;
}

std::unique_ptr<Sequence> AppendPrompt(const std::shared_ptr<Runtime>& runtime, const Trace& trace,
                                       const std::vector<int32_t>& layers) {
  absl::StatusOr<std::unique_ptr<Sequence>> sequence = Sequence::Create(runtime, 1, 0);
  Check(sequence.status());
  for (size_t l = 0; l < layers.size(); ++l) {
    const int64_t dim_k = trace.head_dim_k, dim_v = trace.head_dim_v;
    AppendRequest request{.layer = static_cast<int>(l),
                          .num_tokens = trace.prompt_tokens,
                          .num_queries = static_cast<int>(trace.prompt_queries),
                          .k = trace.k.Row(layers[l], 0, 0),
                          .v = trace.v.Row(layers[l], 0, 0),
                          .k_token_stride = dim_k,
                          .k_head_stride = trace.tokens * dim_k,
                          .v_token_stride = dim_v,
                          .v_head_stride = trace.tokens * dim_v,
                          .q_token_stride = dim_k,
                          .q_head_stride = trace.prompt_queries * dim_k};
    if (trace.prompt_queries > 0) request.q = trace.q_prompt.Row(layers[l], 0, 0);
    Check((*sequence)->Append(request));
  }
  Check((*sequence)->BuildIndex());
  return *std::move(sequence);
}

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
  const int64_t count = std::max<int64_t>(1, std::llround(kTopShare * static_cast<double>(exact.size())));
  const std::vector<int32_t> best = Largest(exact, count), found = Largest(predicted, count);
  std::vector<int32_t> both;
  std::set_intersection(best.begin(), best.end(), found.begin(), found.end(), std::back_inserter(both));
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

struct Freed {
  void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{64}); }
};

}  // namespace

ScanFigures MeasureScan(const Trace& trace, const std::vector<int32_t>& layers, const vattn_options& options,
                        int64_t steps, int64_t every) {
  absl::StatusOr<std::shared_ptr<Runtime>> runtime = Runtime::Create(ToOptions(options), nullptr);
  Check(runtime.status());
  const std::unique_ptr<Sequence> sequence = AppendPrompt(*runtime, trace, layers);
  const Storage& s = (*runtime)->storage();
  const Promise& promise = (*runtime)->promise();
  const int heads = (*runtime)->group(0);
  const size_t bytes = ScratchBytes(s, promise, trace.prompt_tokens, heads);
  const std::unique_ptr<std::byte, Freed> memory(
      static_cast<std::byte*>(::operator new(bytes, std::align_val_t{64})));
  ReusedScores reused(trace, layers);
  ScanFigures sum;
  double least_ns = 0;
  int64_t compared = 0, scans = 0;
  for (int64_t step = 0; step < steps; step += every) {
    const float* external = promise.index == IndexKind::kExternal ? reused.At(step) : nullptr;
    for (size_t l = 0; l < layers.size(); ++l) {
      const Layer& layer = sequence->layer(static_cast<int>(l));
      for (int64_t h = 0; h < trace.kv_heads; ++h) {
        Group group;
        group.blocks = layer.groups[h].blocks.data();
        group.tokens = layer.tokens;
        group.middle_begin = (*runtime)->options().sinks;
        group.middle_end = sequence->MiddleEnd(layer.tokens);
        if (group.middle_end <= group.middle_begin) throw Failure(trace.path + ": is too short to have a middle");
        group.q_heads = heads;
        group.index = layer.groups[h].index->tables();
        group.scratch = CarveScratch(s, promise, layer.tokens, heads, memory.get());
        std::vector<std::byte> q;
        for (int g = 0; g < heads; ++g) {
          const std::byte* row = trace.q.Row(layers[l], h * heads + g, step);
          q.insert(q.end(), row, row + trace.head_dim_k * ElementBytes(s.row.dtype));
        }
        group.q = q.data();
        if (external != nullptr) {
          group.external = external + (static_cast<int64_t>(l) * trace.q_heads + h * heads) * reused.stride();
          group.external_stride = reused.stride();
        }
        cpu::ScaleQueries(s, group);
        const int64_t n = group.middle_end - group.middle_begin;
        const auto scores = [&](IndexKind kind) {
          cpu::ScanScores(s, kind, group, {});
          std::vector<float> all;
          for (int g = 0; g < heads; ++g) {
            const float* at = group.scratch.score + g * group.scratch.stride;
            all.insert(all.end(), at, at + n);
          }
          return all;
        };
        const std::vector<float> exact = scores(IndexKind::kExact);
        double fastest = std::numeric_limits<double>::infinity();
        for (int i = 0; i < kTimings; ++i) {
          const auto start = std::chrono::steady_clock::now();
          cpu::PrepareQueries(s, promise.index, group);
          cpu::ScanEstimates(s, promise.index, group, {});
          const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
          fastest = std::min(fastest, took.count());
        }
        least_ns += fastest / static_cast<double>(n);
        std::vector<float> predicted = scores(promise.index);
        for (size_t i = 0; i < predicted.size(); ++i) {
          if (predicted[i] == -kMarkedScore) predicted[i] = exact[i];  // such a token is always read
        }
        for (int g = 0; g < heads; ++g, ++compared) {
          Compare(std::span(exact).subspan(g * n, n), std::span(predicted).subspan(g * n, n), &sum);
        }
        sum.table_bytes += static_cast<double>(layer.groups[h].index->bytes());
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
