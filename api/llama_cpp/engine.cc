#include "api/llama_cpp/engine.h"

#include <algorithm>
#include <chrono>

namespace vattn::llama_cpp {
namespace {

// Sequences of a layer's cache that are known at a time; others than these begin anew.
constexpr size_t kMostRanges = 8;

// Adds the time of its life to a counter.
class Timer {
 public:
  explicit Timer(uint64_t& ns) : ns_(ns), start_(std::chrono::steady_clock::now()) {}
  ~Timer() {
    ns_ += static_cast<uint64_t>(
        std::chrono::nanoseconds(std::chrono::steady_clock::now() - start_).count());
  }

 private:
  uint64_t& ns_;
  const std::chrono::steady_clock::time_point start_;
};

}  // namespace

Range& Engine::Find(Ranges& ranges, const FlashAttention& f, const Run& run) {
  auto found = std::find_if(ranges.begin(), ranges.end(),
                            [&](const auto& r) { return r->begin() == run.begin; });
  if (found == ranges.end()) {
    if (ranges.size() == kMostRanges) ranges.erase(ranges.begin());
    ranges.push_back(std::make_unique<Range>(f, run.begin));
  } else {
    std::rotate(found, found + 1, ranges.end());
  }
  return *ranges.back();
}

bool Engine::Answer(const FlashAttention& f) {
  Ranges* ranges = nullptr;
  try {
    ranges = &layers_[{f.k, f.v, f.cell_stride, f.head_stride, f.shape}];
    return AnswerIn(*ranges, f);
  } catch (const std::exception& error) {
    // What the layer was in the middle of is not relied on any more.
    if (ranges != nullptr) ranges->clear();
    counters_.failure = error.what();
    ++counters_.ggml_failures;
    return false;
  }
}

bool Engine::AnswerIn(Ranges& ranges, const FlashAttention& f) {
  const Run run = FindRun(f);
  const bool is_step = f.num_tokens <= Range::MostQueries(f.shape);
  if (!run.found()) {
    for (const auto& range : ranges) range->SeeUnknown();
    ++counters_.ggml_masks;
    return false;
  }
  Range& range = Find(ranges, f, run);
  const bool plain = range.See(f, run.end);
  for (const auto& other : ranges) {
    if (other.get() == &range) continue;
    other->SeeOther(run.end - f.num_tokens, run.end);
    if (!plain) other->SeeUnknown();
  }
  // A sliding window is another run in every step.
  if (is_step && range.is_new() && run.begin > 0) {
    ++counters_.ggml_masks;
    return false;
  }
  return AnswerFrom(range, f, is_step, run.end - run.begin);
}

bool Engine::AnswerFrom(Range& range, const FlashAttention& f, bool is_step, int64_t length) {
  uint64_t *calls = &counters_.dense_calls, *ns = &counters_.dense_ns;
  const bool is_verified = is_step && settings_.options.policy == VATTN_POLICY_VERIFIED &&
                           length >= settings_.min_tokens && range.CanVerify();
  if (!is_step) calls = &counters_.chunk_calls, ns = &counters_.chunk_ns;
  if (is_verified) calls = &counters_.verified_calls, ns = &counters_.verified_ns;
  const Timer timer(*ns);
  const bool finite = !is_step      ? range.Chunk(f, runtimes_, threads_)
                      : is_verified ? range.Verified(f, runtimes_, threads_, counters_)
                                    : range.Dense(f, runtimes_, threads_);
  if (finite) {
    ++*calls;
  } else {
    counters_.failure = "a query or an answer is not finite in fp16";
    ++counters_.ggml_failures;
  }
  return finite;
}

}  // namespace vattn::llama_cpp
