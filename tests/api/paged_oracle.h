// Holds every answer of a test engine to float64 attention over the text that it was asked about.
#ifndef VATTN_TESTS_API_PAGED_ORACLE_H_
#define VATTN_TESTS_API_PAGED_ORACLE_H_

#include <cstdint>
#include <stdexcept>
#include <string>

#include "tests/api/text_model.h"

namespace vattn::test {

// An answer or a promise that does not hold.
class WrongAnswer : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// What an engine was answered for one query head.
struct HeadAnswer {
  const float* out;  // [dim_v]
  float lse;
  int32_t verdict = VATTN_VERDICT_EXACT;
  float error = 0;
};

struct OracleTally {
  int64_t verified = 0, failures = 0, exact = 0, dense = 0, prompt = 0;
  double worst_verified = 0;  // in epsilon
  double worst_needle = 0;    // of ref
};

class PagedOracle {
 public:
  PagedOracle(const TextModel& model, const vattn_options& options)
      : model_(model), options_(options) {}

  // Throws WrongAnswer.
  void CheckStep(const Text& text, int64_t position, int32_t layer, int q_head,
                 const HeadAnswer& given);
  void CheckPrompt(const Text& text, int64_t position, int32_t layer, int q_head,
                   const HeadAnswer& given);
  // Over all steps so far: the promise is not refuted.
  void CheckPromise() const;
  const OracleTally& tally() const { return tally_; }

 private:
  void CheckExact(const Answer& answer, const HeadAnswer& given, const std::string& where) const;

  const TextModel& model_;
  const vattn_options options_;
  OracleTally tally_;
};

}  // namespace vattn::test

#endif  // VATTN_TESTS_API_PAGED_ORACLE_H_
