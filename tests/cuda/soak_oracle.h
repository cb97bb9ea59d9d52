// What an endurance run holds answers to: float64 attention, head by head.
#ifndef VATTN_TESTS_CUDA_SOAK_ORACLE_H_
#define VATTN_TESTS_CUDA_SOAK_ORACLE_H_

#include <cstdint>
#include <string>

#include "tests/api/attention_model.h"

namespace vattn::test {

// Throws with this text if it does not hold.
void Expect(bool holds, const std::string& what);

struct OracleCounts {
  int64_t exact = 0, verified = 0, dense = 0, failures = 0;
  double worst_exact = 0, worst_verified = 0;  // of the error that is allowed
};

class SoakOracle {
 public:
  explicit SoakOracle(const vattn_options& options) : options_(options) {}

  // One query head of a slot. Exact heads must agree to rounding; those that are verified are
  // counted, and so are their errors over epsilon.
  void Check(const Call& call, int slot, int head, const Rows& rows, int64_t step);
  // The promise over all that were checked.
  void Finish() const;
  const OracleCounts& counts() const { return counts_; }

 private:
  const vattn_options options_;
  OracleCounts counts_;
};

}  // namespace vattn::test

#endif  // VATTN_TESTS_CUDA_SOAK_ORACLE_H_
