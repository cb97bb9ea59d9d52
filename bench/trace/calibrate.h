// Model profiles from recorded queries (`vattn-profile-1`, see vattn_options.profile).
#ifndef VATTN_BENCH_TRACE_CALIBRATE_H_
#define VATTN_BENCH_TRACE_CALIBRATE_H_

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "bench/trace/trace.h"

namespace vattn::bench {

// Mean of q q^T over the queries [layers, q_heads, n, head_dim] that read one KV head, times
// scale^2: [chosen layers, kv_heads, head_dim, head_dim].
std::vector<float> QueryMoments(const Tensor& queries, int64_t kv_heads,
                                std::span<const int32_t> layers, double scale);

// The file: metadata is the trace's model, layers and text beside what the format asks for.
// REQUIRES moments of QueryMoments for the same layers and scale.
std::string ProfileFile(const Trace& trace, std::span<const int32_t> layers, float scale,
                        const std::vector<float>& moments);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_TRACE_CALIBRATE_H_
