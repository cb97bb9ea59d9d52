#include "tests/cuda/soak_oracle.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "bench/cli/statistics.h"

namespace vattn::test {
namespace {

constexpr double kAlarm = 1e-6;     // of calling a promise refuted that holds
constexpr double kRounding = 1e-4;  // of rms|v|, that an exact answer may be off by
constexpr double kMostOff = 4;      // times epsilon, that no verified head may ever be off by

}  // namespace

void Expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

void SoakOracle::Check(const Call& call, int slot, int head, const Rows& rows, int64_t step) {
  const Shape& shape = call.shape;
  const int at = slot * shape.q_heads + head;
  const int32_t verdict = call.verdict[at];
  const Answer answer =
      Attend(shape, rows, head / (shape.q_heads / shape.kv_heads), call.Query(slot, head));
  const double distance = Distance(answer, call.Out(slot, head).data());
  const std::string where = "step " + std::to_string(step) + ", layer " +
                            std::to_string(call.layer) + ", slot " + std::to_string(slot) +
                            ", head " + std::to_string(head) + ", " + std::to_string(rows.tokens) +
                            " tokens: ";
  if (verdict == VATTN_VERDICT_VERIFIED) {
    const double ref =
        std::max(answer.norm, static_cast<double>(options_.norm_floor) * answer.rms_value);
    const double used = distance / (static_cast<double>(options_.epsilon) * ref);
    ++counts_.verified;
    counts_.failures += !(used <= 1);
    counts_.worst_verified = std::max(counts_.worst_verified, used);
    Expect(used <= kMostOff,
           where + "a verified head is off by " + std::to_string(used) + " epsilon");
    return;
  }
  const bool exact = verdict == VATTN_VERDICT_EXACT;
  Expect(exact || verdict == VATTN_VERDICT_DENSE, where + "verdict " + std::to_string(verdict));
  ++(exact ? counts_.exact : counts_.dense);
  const double used = distance / (kRounding * answer.rms_value);
  counts_.worst_exact = std::max(counts_.worst_exact, used);
  Expect(used <= 1,
         where + "an exact head is off by " + std::to_string(used * kRounding) + " of the values");
  Expect(std::abs(double{call.lse[at]} - answer.lse) <= 1e-3, where + "lse is off");
}

void SoakOracle::Finish() const {
  const OracleCounts& c = counts_;
  const double lower = c.verified == 0 ? 0
                                       : 1 - bench::ClopperPearsonUpper(c.verified - c.failures,
                                                                        c.verified, 1 - kAlarm);
  Expect(lower <= static_cast<double>(options_.delta),
         "the promise is refuted: " + std::to_string(c.failures) + " failures of " +
             std::to_string(c.verified));
  Expect(c.verified >= c.dense,
         "more heads fell back than were verified: " + std::to_string(c.dense) + " against " +
             std::to_string(c.verified));
}

}  // namespace vattn::test
