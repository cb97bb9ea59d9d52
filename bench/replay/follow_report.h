// What `vattn follow` saw, as JSON and as tables.
#ifndef VATTN_BENCH_REPLAY_FOLLOW_REPORT_H_
#define VATTN_BENCH_REPLAY_FOLLOW_REPORT_H_

#include <string>

#include "bench/cli/json.h"
#include "bench/replay/follow.h"

namespace vattn::bench {

Json FollowJson(const Followed& followed, const Trace& trace, const FollowPlan& plan, double delta);
// A table by position for answers with kept and one for those with fresh random numbers, then one
// by layer.
std::string FollowTables(const Followed& followed, const Trace& trace, const FollowPlan& plan,
                         double delta);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_REPLAY_FOLLOW_REPORT_H_
