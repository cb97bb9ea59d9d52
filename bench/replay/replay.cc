#include "bench/replay/replay.h"

#include <algorithm>
#include <optional>

#include "bench/cli/handles.h"
#include "bench/replay/session.h"

namespace vattn::bench {
namespace {

constexpr uint64_t kFirstFork = 1000;
constexpr int64_t kStretch = 8;  // steps that one policy takes before the other has its turn

void Record(const StepResult& result, const Reference& reference, const vattn_options& options,
            int64_t seed, int64_t step, Observations* seen) {
  for (int64_t layer = 0; layer < seen->layers; ++layer) {
    for (int64_t head = 0; head < seen->q_heads; ++head) {
      const int64_t from = layer * seen->q_heads + head;
      const int64_t to = seen->QHeadIndex(seed, layer, head, step);
      const int64_t exact = reference.Index(layer, head, step);
      const double distance =
          DistanceToReference(reference, exact, &result.out[from * reference.head_dim_v]);
      const double ref = reference.Ref(exact, options.norm, options.norm_floor);
      seen->error[to] = distance == 0 ? 0 : distance / ref;
      seen->estimate[to] = result.error[from];
      seen->verdict[to] = result.verdict[from];
    }
    for (int64_t head = 0; head < seen->kv_heads; ++head) {
      const int64_t from = layer * seen->kv_heads + head;
      const int64_t to = seen->KvHeadIndex(seed, layer, head, step);
      seen->selected[to] = result.selected[from];
      seen->fetched[to] = result.fetched[from];
      seen->looks[to] = result.looks[from];
      seen->middle[to] = result.middle[from];
    }
  }
}

Observations Allocate(const Trace& trace, const ReplayPlan& plan) {
  Observations seen;
  seen.seeds = plan.seeds;
  seen.layers = static_cast<int64_t>(plan.layers.size());
  seen.q_heads = trace.q_heads;
  seen.kv_heads = trace.kv_heads;
  seen.steps = plan.steps;
  const int64_t q_count = seen.QHeadIndex(seen.seeds, 0, 0, 0);
  const int64_t kv_count = seen.KvHeadIndex(seen.seeds, 0, 0, 0);
  seen.error.resize(q_count);
  seen.estimate.resize(q_count);
  seen.verdict.resize(q_count);
  for (auto* list : {&seen.selected, &seen.fetched, &seen.looks}) list->resize(kv_count);
  seen.middle.resize(kv_count);
  return seen;
}

}  // namespace

void SetShape(const Trace& trace, const ReplayPlan& plan, vattn_options* options) {
  options->num_layers = static_cast<int32_t>(plan.layers.size());
  options->num_q_heads = static_cast<int32_t>(trace.q_heads);
  options->num_kv_heads = static_cast<int32_t>(trace.kv_heads);
  options->head_dim_k = static_cast<int32_t>(trace.head_dim_k);
  options->head_dim_v = static_cast<int32_t>(trace.head_dim_v);
  options->dtype = trace.dtype;
  options->host_bytes = HostBytes(*options, trace.tokens, plan.forks ? 3 : 1);
}

namespace {

Observations ReplayForks(const Trace& trace, const ReplayPlan& plan, const vattn_options& options,
                         const Reference& reference, Progress* progress) {
  Observations seen = Allocate(trace, plan);
  Session session(trace, plan.layers, options, plan.prompt_queries);
  for (int64_t run = 0; run < plan.seeds; ++run) {
    session.Restart(kFirstFork + static_cast<uint64_t>(run));
    for (int64_t step = 0; step < plan.steps; ++step) {
      session.Step(step);
      Record(session.result(), reference, options, run, step, &seen);
    }
    progress->Count(run + 1, plan.seeds);
  }
  seen.bytes_fetched = session.bytes_fetched();
  return seen;
}

}  // namespace

Observations Replay(const Trace& trace, const ReplayPlan& plan, const vattn_options& options,
                    const Reference& reference, Progress* progress) {
  if (plan.forks) return ReplayForks(trace, plan, options, reference, progress);
  Observations seen = Allocate(trace, plan);
  for (int64_t seed = 0; seed < plan.seeds; ++seed) {
    vattn_options seeded = options;
    seeded.seed += static_cast<uint64_t>(seed);
    Session session(trace, plan.layers, seeded, plan.prompt_queries);
    std::optional<Session> dense;
    if (plan.timed && seed == 0) {
      seeded.policy = VATTN_POLICY_DENSE;
      dense.emplace(trace, plan.layers, seeded, plan.prompt_queries);
    }
    for (int64_t begin = 0; begin < plan.steps; begin += kStretch) {
      const int64_t end = std::min(begin + kStretch, plan.steps);
      for (int64_t step = begin; step < end; ++step) {
        const double us = session.Step(step);
        if (dense) seen.policy_us.push_back(us);
        Record(session.result(), reference, options, seed, step, &seen);
      }
      for (int64_t step = begin; step < end && dense; ++step) {
        seen.dense_us.push_back(dense->Step(step));
      }
      progress->Count(seed * plan.steps + end, plan.seeds * plan.steps);
    }
    seen.bytes_fetched += session.bytes_fetched();
  }
  return seen;
}

}  // namespace vattn::bench
