// The same sequences on the CPU backend, which is the definition, and on CUDA, and comparisons of
// what both answer.
//
// Draws are equal but for rounding. Sums are taken in another order, so a token whose random number
// is next to its inclusion probability may change sides; and where a query's 8-bit level rounds the
// other way, which is rare, all weights of its group move by a little.
#ifndef VATTN_TESTS_CUDA_CUDA_TWINS_H_
#define VATTN_TESTS_CUDA_CUDA_TWINS_H_

#include <compare>
#include <cstdint>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "tests/api/attention_model.h"

namespace vattn::test {

// One backend's half of the twins.
struct Side {
  Side(const vattn_options& options, int slots) : runtime(options), batch(runtime, slots) {}

  const Runtime runtime;
  std::vector<Sequence> sequences;
  Batch batch;
};

// Selection arrays of every (slot, KV head).
struct Lists {
  Lists(const Shape& shape, int slots, int64_t most)
      : capacity(most),
        tokens(static_cast<size_t>(slots * shape.kv_heads * most), -1),
        counts(static_cast<size_t>(slots * shape.kv_heads), -1),
        weights(tokens.size(), -1) {}
  vattn_selection Selection(bool with_weights = true) {
    vattn_selection selection = Init<vattn_selection>();
    selection.capacity = capacity;
    selection.tokens = tokens.data();
    selection.log_weights = with_weights ? weights.data() : nullptr;
    selection.counts = counts.data();
    return selection;
  }

  int64_t capacity;
  std::vector<int32_t> tokens, counts;
  std::vector<float> weights;
};

class Twins {
 public:
  // Rows of a prompt.
  using MakeRows = Rows (*)(const Shape& shape, std::mt19937_64& engine, int64_t count);
  static Rows GaussianRows(const Shape& shape, std::mt19937_64& engine, int64_t count);

  // Shapes of layers differ in KV heads alone, 0: left out. Lengths by slot, -1: an empty slot.
  Twins(const vattn_options& options, std::vector<Shape> layers, std::vector<int64_t> lengths,
        MakeRows make_rows = GaussianRows);

  int slots() const { return static_cast<int>(lengths_.size()); }
  bool Filled(int slot) const { return lengths_[slot] >= 0; }
  static uint64_t Id(int slot) { return 100 + static_cast<uint64_t>(slot); }
  const vattn_options& options() const { return options_; }
  const Shape& shape(int layer) const { return layers_[layer]; }
  uint64_t steps() const { return steps_; }

  // As many more rows of a prompt for every layer of the sequences that began with some, on both.
  void Append(int64_t count, MakeRows make_rows = GaussianRows);
  // Codes what there is, on both.
  void BuildIndices();
  // Opens a step with query_tokens new tokens on both.
  void BeginStep();
  // The same queries and new rows for both.
  std::pair<Call, Call> Calls(int layer, float query_sigma, int32_t out_dtype = VATTN_F32);

 private:
  const vattn_options options_;
  const std::vector<Shape> layers_;
  const std::vector<int64_t> lengths_;
  uint64_t steps_ = 0;

 public:
  struct Place {
    int layer, slot, kv_head;
    auto operator<=>(const Place&) const = default;
  };

  int query_tokens = 1;   // of the steps that follow
  std::set<Place> apart;  // groups whose answers were not alike in some step
  Side cpu, cuda;
  std::mt19937_64 engine{5};
};

// |a|, or |a - b|.
double Norm(const std::vector<float>& a, const std::vector<float>& b = {});

struct AnswerTally {
  int64_t exact = 0, sampled = 0, loose = 0, verdicts_differ = 0;
  int64_t left_out = 0;    // of groups that were apart before
  int64_t most_heads = 0;  // of a group
};
// Exact heads must agree to rounding; sampled ones are tallied, those of groups in twins.apart apart,
// to which the others' that differ are added. Values are taken to be of variance 1, so that rms|v| is
// sqrt(dim_v).
void CompareAnswers(Twins& twins, const Call& on_cpu, const Call& on_cuda, AnswerTally& tally);
// Expects nearly all sampled heads to be alike.
void ExpectAlike(const AnswerTally& tally);

// vattn_select on layer 0 of both; `lists` has the CPU's then.
void CompareSelect(Twins& twins, float query_sigma, Lists& lists);
// vattn_attend_selected on layer 0 of both, over `lists`.
void CompareSelected(Twins& twins, Lists& lists, float query_sigma, bool with_weights);

}  // namespace vattn::test

#endif  // VATTN_TESTS_CUDA_CUDA_TWINS_H_
