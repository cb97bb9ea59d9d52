// What the other policies need for the error that the verified policy has: the settings with which
// their 95th percentile of the error comes down to a target while the fewest rows are read.
#ifndef VATTN_BENCH_REPLAY_MATCH_H_
#define VATTN_BENCH_REPLAY_MATCH_H_

#include "bench/cli/progress.h"
#include "bench/replay/replay.h"

namespace vattn::bench {

// Searches go over all layers and steps of the plan with its first seed.
// epsilon for VATTN_POLICY_VERIFIED, to 3 %.
vattn_options MatchVerified(const Trace& trace, const ReplayPlan& plan,
                            const vattn_options& options, const Reference& reference,
                            double target_p95, Progress* progress);
// topk_share for VATTN_POLICY_TOPK, to 2 %.
vattn_options MatchTopK(const Trace& trace, const ReplayPlan& plan, const vattn_options& options,
                        const Reference& reference, double target_p95, Progress* progress);
// topk_share and base_share from a small grid, epsilon to 3 %, for VATTN_POLICY_TOPK_UNIFORM.
vattn_options MatchTopKUniform(const Trace& trace, const ReplayPlan& plan,
                               const vattn_options& options, const Reference& reference,
                               double target_p95, Progress* progress);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_REPLAY_MATCH_H_
