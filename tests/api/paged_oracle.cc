#include "tests/api/paged_oracle.h"

#include <algorithm>
#include <cmath>

#include "tests/api/backend.h"

namespace vattn::test {
namespace {

constexpr double kMostOff = 4;     // times epsilon, that no verified head may ever be off by
constexpr double kNeedleOff = .5;  // of ref: a stale row is off by 1 or more
constexpr double kSigmas = 5;      // of a count of failures over its expectation

std::string Where(const Text& text, int64_t position, int32_t layer, int q_head) {
  return "token " + std::to_string(position) + " of " + std::to_string(text.size()) + ", layer " +
         std::to_string(layer) + ", head " + std::to_string(q_head) + ": ";
}

void Expect(bool holds, const std::string& what) {
  if (!holds) throw WrongAnswer(what);
}

}  // namespace

void PagedOracle::CheckExact(const Answer& answer, const HeadAnswer& given,
                             const std::string& where) const {
  const double off = Distance(answer, given.out);
  // On CUDA weights are rounded to the type of rows before they meet the values.
  const double weights = OnCuda() ? answer.rms_value / 256 : 0;
  Expect(off <= Tolerance(answer, VATTN_F32) + weights, where + "an exact answer is off by " +
                                                            std::to_string(off / answer.rms_value) +
                                                            " of the values");
  Expect(std::abs(double{given.lse} - answer.lse) <= 1e-3 * (1 + std::abs(answer.lse)),
         where + "lse is " + std::to_string(given.lse) + ", must be " + std::to_string(answer.lse));
}

void PagedOracle::CheckStep(const Text& text, int64_t position, int32_t layer, int q_head,
                            const HeadAnswer& given) {
  const std::string where = Where(text, position, layer, q_head);
  const Answer answer = model_.Attend(text, position, layer, q_head);
  if (given.verdict == VATTN_VERDICT_EXACT || given.verdict == VATTN_VERDICT_DENSE) {
    ++(given.verdict == VATTN_VERDICT_EXACT ? tally_.exact : tally_.dense);
    Expect(given.error == 0, where + "an exact answer's error is " + std::to_string(given.error));
    return CheckExact(answer, given, where);
  }
  Expect(given.verdict == VATTN_VERDICT_VERIFIED,
         where + "verdict " + std::to_string(given.verdict));
  const double epsilon = double{options_.epsilon};
  Expect(given.error >= 0 && given.error <= options_.epsilon * 1.001f,
         where + "a verified answer's error is " + std::to_string(given.error));
  Expect(std::isfinite(given.lse), where + "lse is not finite");
  const double ref = std::max(answer.norm, double{options_.norm_floor} * answer.rms_value);
  const double off = Distance(answer, given.out) / ref;
  ++tally_.verified;
  tally_.failures += !(off <= epsilon);
  tally_.worst_verified = std::max(tally_.worst_verified, off / epsilon);
  Expect(off <= kMostOff * epsilon, where + "a verified answer is off by " + std::to_string(off));
  if (!model_.LooksForNeedle(text, position, layer, q_head)) return;
  tally_.worst_needle = std::max(tally_.worst_needle, off);
  Expect(off <= kNeedleOff,
         where + "an answer of one token is off by " + std::to_string(off) + ", as a stale row is");
}

void PagedOracle::CheckPrompt(const Text& text, int64_t position, int32_t layer, int q_head,
                              const HeadAnswer& given) {
  ++tally_.prompt;
  CheckExact(model_.Attend(text, position, layer, q_head), given,
             "prompt, " + Where(text, position, layer, q_head));
}

void PagedOracle::CheckPromise() const {
  const double expected = double{options_.delta} * static_cast<double>(tally_.verified);
  const double most = expected + kSigmas * std::sqrt(expected) + kSigmas;
  Expect(static_cast<double>(tally_.failures) <= most,
         "the promise is refuted: " + std::to_string(tally_.failures) + " of " +
             std::to_string(tally_.verified) + " verified answers are off by more than epsilon");
}

}  // namespace vattn::test
