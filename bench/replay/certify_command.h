// `vattn replay --certify`: coverage of the promise over a grid of epsilon and delta.
#ifndef VATTN_BENCH_REPLAY_CERTIFY_COMMAND_H_
#define VATTN_BENCH_REPLAY_CERTIFY_COMMAND_H_

#include <string>
#include <vector>

#include "bench/cli/environment.h"
#include "bench/replay/certify.h"

namespace vattn::bench {

struct CertifyJob {
  std::vector<Trace> traces;
  std::vector<std::string> names;  // of the traces, for the table
  ReplayPlan plan;                 // layers empty: all of each
  vattn_options options;
  std::vector<Cell> cells;
};

// Prints the table, and writes everything to `json` unless empty.
void RunCertify(const CertifyJob& job, const std::string& json, const CommandLine& command);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_REPLAY_CERTIFY_COMMAND_H_
