// How the command line reports what went wrong. The tools throw (CLI11 and nlohmann-json do as
// well) and main turns the exception into a text and an exit code.
#ifndef VATTN_BENCH_CLI_FAILURE_H_
#define VATTN_BENCH_CLI_FAILURE_H_

#include <stdexcept>
#include <string>

namespace vattn::bench {

class Failure : public std::runtime_error {  // exit code 1
 public:
  using std::runtime_error::runtime_error;
};

class UsageError : public std::runtime_error {  // exit code 2: the command line has to change
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace vattn::bench

#endif  // VATTN_BENCH_CLI_FAILURE_H_
