// Counters of a runtime and what is measured on demand: two lists, from which the C struct and the
// Prometheus text are filled.
#ifndef VATTN_RUNTIME_STATS_H_
#define VATTN_RUNTIME_STATS_H_

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace vattn {

// X(name, Prometheus type, help): what is measured when somebody asks ...
// clang-format off
#define VATTN_MEASURES(X)                                                                    \
  X(host_bytes_limit, "gauge", "Bytes of the host pool")                                     \
  X(host_bytes_used, "gauge", "Bytes in blocks in use or reserved")                          \
  X(host_bytes_reserved, "gauge", "Bytes of them that are reserved and not yet in use")      \
  X(table_bytes, "gauge", "Bytes of block tables, index tables and state")                   \
  X(disk_bytes_used, "gauge", "Bytes of files in the disk directory, written or promised")   \
  X(device_bytes_reserved, "gauge", "Device addresses set aside for what grows with the tokens") \
  X(device_bytes_mapped, "gauge", "Device memory mapped at them")                            \
  X(device_growths, "counter", "Times that more was mapped")                                 \
  X(device_growth_ns, "counter", "Nanoseconds that this took")                               \
  X(memory_prefixes, "gauge", "Prefixes in the host pool")

// ... and what is counted as it happens.
#define VATTN_COUNTERS(X)                                                                    \
  X(sequences, "gauge", "Sequences alive")                                                   \
  X(tokens, "gauge", "Tokens held, over sequences and layers")                               \
  X(steps, "counter", "Attention calls, over layers and filled slots")                       \
  X(heads_exact, "counter", "Query heads answered exactly")                                  \
  X(heads_verified, "counter", "Query heads answered within the promise")                    \
  X(heads_dense, "counter", "Query heads that were not verified and were read whole")        \
  X(heads_best_effort, "counter", "Query heads answered without a promise")                  \
  X(rows_middle, "counter", "Middle rows that dense attention would have read")              \
  X(rows_selected, "counter", "Middle rows read")                                            \
  X(rows_fetched, "counter", "Middle rows read that were not in the hot set")                \
  X(bytes_fetched, "counter", "Bytes of those rows")                                         \
  X(looks, "counter", "Draws made, over KV heads")                                           \
  X(segments_learnt, "counter", "Segments of indices learnt from their tokens, over layers")  \
  X(index_floods, "counter", "Segments learnt early because new tokens were unlike the old")  \
  X(segments_recoded, "counter", "Segments whose tokens were coded again by new tables")     \
  X(segments_refused, "counter", "Segments that were due where an index had too many, over layers") \
  X(outliers, "counter", "Tokens coded as outliers, each time that they are coded")          \
  X(heads_noisy, "counter", "Query heads not verified because codes are too coarse for them") \
  X(full_refusals, "counter", "Calls refused because the host pool or a quota was full")     \
  X(quota_refusals, "counter", "Calls refused because a tenant was at its quota")            \
  X(blocks_copied, "counter", "Shared blocks copied before a write")                         \
  X(saves, "counter", "Sequence files written, of any kind")                                 \
  X(bytes_saved, "counter", "Bytes of those files")                                          \
  X(restores, "counter", "Sequences read from files, of any kind")                           \
  X(bytes_restored, "counter", "Bytes of their blocks")                                      \
  X(spills, "counter", "Sequences moved to the disk because the host pool was full")         \
  X(spill_failures, "counter", "Sequences that could not be moved to the disk")              \
  X(files_refused, "counter", "Sequence files that failed their check")                      \
  X(io_errors, "counter", "File operations that the system refused")                         \
  X(disk_prefixes_saved, "counter", "Prefixes saved to the disk")                              \
  X(disk_prefixes_evicted, "counter", "Prefixes removed to make room on the disk")                \
  X(memory_prefixes_saved, "counter", "Prefixes saved to the host pool")                              \
  X(memory_prefixes_evicted, "counter", "Prefixes let go to make room in the host pool")              \
  X(memory_prefix_hits, "counter", "Sequences begun from a prefix in the host pool")                  \
  X(prefix_hits, "counter", "Sequences begun from a stored prefix")                          \
  X(prefix_tokens, "counter", "Tokens that they began with")                                 \
  X(prefix_misses, "counter", "Sequences that no stored prefix could begin")                 \
  X(disk_prefixes_damaged, "counter", "Prefixes on the disk removed because they failed their check")    \
  X(disk_prefixes_unread, "counter", "Prefixes on the disk that the system could not read when wanted")  \
  X(prefix_mismatches, "counter", "Stored prefixes found by a digest that held other tokens") \
  X(requests_refused, "counter", "Requests of steps over an engine's pool that were out of range")
// clang-format on

struct Counters {
#define VATTN_DECLARE(name, type, help) std::atomic<uint64_t> name{0};
  VATTN_COUNTERS(VATTN_DECLARE)
#undef VATTN_DECLARE
};

// Plain copies of the counters plus what is computed on demand.
struct StatsSnapshot {
#define VATTN_DECLARE(name, type, help) uint64_t name = 0;
  VATTN_MEASURES(VATTN_DECLARE)
  VATTN_COUNTERS(VATTN_DECLARE)
#undef VATTN_DECLARE
};

// What vattn_tenant_stats has.
struct TenantSnapshot {
  uint64_t tenant = 0, host_bytes_limit = 0, host_bytes_used = 0, host_bytes_reserved = 0,
           sequences = 0;
  uint64_t full_refusals = 0, quota_refusals = 0;
};

StatsSnapshot Snapshot(const Counters& counters);
// Prometheus text exposition format 0.0.4, names prefixed with vattn_; tenants as labels of theirs.
std::string PrometheusText(const StatsSnapshot& stats, const std::vector<TenantSnapshot>& tenants);

}  // namespace vattn

#endif  // VATTN_RUNTIME_STATS_H_
