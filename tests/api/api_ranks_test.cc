// One context over several ranks: each has a slice, their records merge into one answer with one joint
// certificate, and every rank decides the same.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "tests/api/attention_model.h"
#include "tests/api/backend.h"

namespace vattn::test {
namespace {

size_t RecordFloats(const Shape& shape) {
  return VATTN_PARTIAL_SCALARS + 2 * static_cast<size_t>(shape.dim_v);
}

// A context cut into slices, one runtime each, one slot a sequence.
class World {
 public:
  World(const Shape& shape, const vattn_options& options,
        const std::vector<std::vector<int64_t>>& slices, float key_sigma = 1)
      : shape_(shape), slots_(static_cast<int>(slices[0].size())), rows_(slices[0].size()) {
    for (const std::vector<int64_t>& lengths : slices) {
      Rank& rank = ranks_.emplace_back(options, slots_);
      for (int s = 0; s < slots_; ++s) {
        Rows slice;
        slice.AddGaussian(shape, engine_, lengths[s], key_sigma);
        rank.sequences.emplace_back(rank.runtime, s + 1);
        AppendRows(rank.sequences.back(), shape, 0, slice);
        rank.batch.Set(s, rank.sequences.back());
        rows_[s].Add(shape, slice.k, slice.v);
      }
    }
  }

  // A step of all ranks; their calls, whose answers are to be the same.
  std::vector<Call> Step(float query_sigma = 2) {
    Begin(query_sigma);
    Forecast();
    rounds = 0;
    while (More() > 0) ++rounds;
    return calls_;
  }
  void Begin(float query_sigma) {
    calls_.assign(ranks_.size(), Call(shape_, slots_, 0));
    calls_.back().Fill(engine_, 1, query_sigma);
    for (size_t r = 0; r < ranks_.size(); ++r) {
      const bool last = r + 1 == ranks_.size();
      if (!last) calls_[r].q = calls_.back().q;
      ranks_[r].batch.BeginStep(last ? 1 : 0);
    }
    for (int s = 0; s < slots_; ++s) calls_.back().AddTo(rows_[s], s);
  }
  void Forecast() {
    gathered.assign(ranks_.size() * Floats(), 0);
    for (size_t r = 0; r < ranks_.size(); ++r) {
      ranks_[r].partial.assign(Floats(), -7);
      ranks_[r].batch.Attend(Params(r));
    }
  }
  int32_t More() {
    int32_t first = -1;
    for (size_t r = 0; r < ranks_.size(); ++r)
      std::copy(ranks_[r].partial.begin(), ranks_[r].partial.end(),
                gathered.begin() + r * Floats());
    for (size_t r = 0; r < ranks_.size(); ++r) {
      int32_t again = -7;
      vattn_attend_params params = Params(r);
      params.gathered = gathered.data();
      params.again = &again;
      ranks_[r].batch.AttendMore(params);
      if (r == 0) first = again;
      EXPECT_EQ(again, first) << "rank " << r << " decided otherwise";
      EXPECT_GE(again, 0);
    }
    return first;
  }

  vattn_attend_params Params(size_t r) {
    vattn_attend_params params = calls_[r].Params();
    params.partial = ranks_[r].partial.data();
    params.rank = static_cast<int32_t>(r);
    params.ranks = static_cast<int32_t>(ranks_.size());
    return params;
  }
  size_t Floats() const {
    return static_cast<size_t>(slots_) * shape_.q_heads * RecordFloats(shape_);
  }
  const Rows& rows(int slot) const { return rows_[slot]; }
  Batch& batch(size_t rank) { return ranks_[rank].batch; }
  const Runtime& runtime(size_t rank) const { return ranks_[rank].runtime; }
  std::vector<float>& partial(size_t rank) { return ranks_[rank].partial; }

  std::vector<float> gathered;
  int rounds = 0;

 private:
  struct Rank {
    Rank(const vattn_options& options, int slots) : runtime(options), batch(runtime, slots) {}
    const Runtime runtime;
    std::vector<Sequence> sequences;
    Batch batch;
    std::vector<float> partial;
  };
  const Shape shape_;
  const int slots_;
  std::mt19937_64 engine_{5};
  std::vector<Rows> rows_;
  std::deque<Rank> ranks_;
  std::vector<Call> calls_;
};

void ExpectSame(const std::vector<Call>& calls) {
  for (const Call& call : calls) {
    EXPECT_EQ(call.out, calls[0].out);
    EXPECT_EQ(call.lse, calls[0].lse);
    EXPECT_EQ(call.verdict, calls[0].verdict);
    EXPECT_EQ(call.error, calls[0].error);
  }
}

std::vector<std::vector<int64_t>> Even(int ranks, int64_t tokens) {
  return std::vector<std::vector<int64_t>>(ranks, {tokens / ranks});
}

struct Case {
  const char* name;
  Shape shape;
};
class DenseRanksTest : public testing::TestWithParam<Case> {};

// Everything is read, whatever the slices are.
TEST_P(DenseRanksTest, IsExact) {
  const Shape& shape = GetParam().shape;
  vattn_options options = OptionsFor(shape);
  options.policy = VATTN_POLICY_DENSE;
  World world(shape, options, {{700, 3}, {1, 2000}, {253, 40}});
  for (int step = 0; step < 2; ++step) {
    const std::vector<Call> calls = world.Step();
    ExpectSame(calls);
    for (int s = 0; s < 2; ++s) ExpectExact(calls[1], s, world.rows(s));
    EXPECT_EQ(calls[0].verdict[0], VATTN_VERDICT_EXACT);
    EXPECT_EQ(calls[0].error[0], 0);
  }
}
INSTANTIATE_TEST_SUITE_P(Shapes, DenseRanksTest,
                         testing::Values(Case{"mha_64_f32", {4, 4, 64, 64, false, VATTN_F32}},
                                         Case{"gqa_128_bf16", {12, 2, 128, 128, false, VATTN_BF16}},
                                         Case{"mla_576_512_bf16",
                                              {16, 1, 576, 512, true, VATTN_BF16}}),
                         [](const auto& info) { return std::string(info.param.name); });

// Slices too short for a middle beside one that is sampled, and the policy that samples.
TEST(RanksTest, ShortSlicesAreExact) {
  const Shape shape;
  World world(shape, OptionsFor(shape), {{300}, {1}, {200}});
  for (int step = 0; step < 3; ++step) {
    const std::vector<Call> calls = world.Step();
    ExpectSame(calls);
    ExpectExact(calls[0], 0, world.rows(0));
    EXPECT_EQ(calls[0].verdict[0], VATTN_VERDICT_EXACT);
  }
}

// One slice is the whole context: as without ranks.
TEST(RanksTest, OneRankIsAsNone) {
  const Shape shape{8, 2, 64, 64, false, VATTN_F32};
  const vattn_options options = OptionsFor(shape);
  World world(shape, options, {{6000}}), other(shape, options, {{6000}});
  for (int step = 0; step < 6; ++step) {
    const std::vector<Call> calls = world.Step(1);
    other.Begin(1);
    Call whole = calls[0];
    vattn_attend_params params = whole.Params();
    other.batch(0).Attend(params);
    EXPECT_EQ(whole.selected, calls[0].selected) << "step " << step;
    EXPECT_EQ(whole.looks, calls[0].looks);
    EXPECT_EQ(whole.verdict, calls[0].verdict);
    EXPECT_EQ(whole.middle, calls[0].middle);
    for (int h = 0; h < shape.q_heads; ++h) {
      EXPECT_NEAR(whole.error[h], calls[0].error[h], 2e-4f * whole.error[h]);
      EXPECT_NEAR(whole.lse[h], calls[0].lse[h], 1e-5f * (1 + std::abs(whole.lse[h])));
      const std::vector<float> a = whole.Out(0, h), b = calls[0].Out(0, h);
      for (int j = 0; j < shape.dim_v; ++j) EXPECT_NEAR(a[j], b[j], 1e-5f);
    }
  }
}

class VerifiedRanksTest : public testing::TestWithParam<int> {};

// Verified answers of several ranks keep the promise, with about the rows of one.
TEST_P(VerifiedRanksTest, KeepThePromise) {
  const int ranks = GetParam();
  const Shape shape{8, 2, 64, 64, false, VATTN_F32};
  vattn_options options = OptionsFor(shape);
  options.refresh = 1;
  World world(shape, options, Even(ranks, 24000)), one(shape, options, {{24000}});
  int verified = 0, failures = 0, trials = 0;
  int64_t rows = 0, rows_of_one = 0, middle = 0;
  for (int step = 0; step < 16; ++step) {
    const std::vector<Call> calls = world.Step(1.5f), alone = one.Step(1.5f);
    ExpectSame(calls);
    for (const Call& call : calls) {
      for (int h = 0; h < shape.kv_heads; ++h) rows += call.selected[h], middle += call.middle[h];
    }
    for (int h = 0; h < shape.kv_heads; ++h) rows_of_one += alone[0].selected[h];
    for (int h = 0; h < shape.q_heads; ++h, ++trials) {
      const Answer answer = Attend(shape, world.rows(0), h / 4, calls[0].Query(0, h));
      const double distance = Distance(answer, calls[0].Out(0, h).data());
      const double ref = std::max(answer.norm, double{options.norm_floor} * answer.rms_value);
      if (calls[0].verdict[h] == VATTN_VERDICT_VERIFIED) {
        ++verified;
        failures += distance > options.epsilon * ref;
        EXPECT_LE(calls[0].error[h], options.epsilon);
        EXPECT_NEAR(calls[0].lse[h], answer.lse, .2);
      } else {
        EXPECT_EQ(calls[0].verdict[h], VATTN_VERDICT_DENSE);
        EXPECT_LE(distance, 1e-4 * answer.rms_value);
      }
    }
  }
  RecordProperty("rows", static_cast<int>(rows));
  RecordProperty("rows_of_one", static_cast<int>(rows_of_one));
  EXPECT_GT(verified, trials / 2);
  // 10 % are allowed: 3 standard deviations over that.
  EXPECT_LE(failures, .1 * verified + 3 * std::sqrt(.09 * verified));
  EXPECT_LT(rows, middle / 2);
  EXPECT_LT(static_cast<double>(rows), 2. * static_cast<double>(rows_of_one))
      << rows << " rows, one rank " << rows_of_one;
}
INSTANTIATE_TEST_SUITE_P(Ranks, VerifiedRanksTest, testing::Values(2, 4, 8));

// What a look leaves merges to what the ranks have answered.
TEST(RanksTest, MergeAgrees) {
  const Shape shape{8, 2, 64, 64, false, VATTN_F32};
  World world(shape, OptionsFor(shape), Even(3, 12000));
  for (int step = 0; step < 4; ++step) {
    const std::vector<Call> calls = world.Step(1);
    if (std::count(calls[0].verdict.begin(), calls[0].verdict.end(), VATTN_VERDICT_VERIFIED) <
        shape.q_heads)
      continue;
    std::vector<float> out(8 * 64), lse(8), error(8);
    std::vector<int32_t> verdict(8);
    int32_t again = -7;
    vattn_merge_params merge = Init<vattn_merge_params>();
    merge.heads = shape.q_heads;
    merge.ranks = 3;
    merge.records = world.gathered.data();
    merge.out = out.data();
    merge.lse = lse.data();
    merge.verdict = verdict.data();
    merge.error = error.data();
    merge.again = &again;
    Merge(world.runtime(1), merge);
    EXPECT_EQ(again, 0);
    EXPECT_EQ(verdict, calls[0].verdict);
    for (int h = 0; h < 8; ++h) {
      EXPECT_NEAR(lse[h], calls[0].lse[h], 1e-5f);
      EXPECT_NEAR(error[h], calls[0].error[h], 1e-4f);
      const std::vector<float> of_step = calls[0].Out(0, h);
      for (int j = 0; j < 64; ++j) EXPECT_NEAR(out[h * 64 + j], of_step[j], 1e-5f);
    }
    merge.ranks = 2;  // the stride is then wrong: rank 1's place has no record of it
    merge.heads = shape.q_heads + 1;
    Merge(world.runtime(1), merge);
    EXPECT_EQ(again, -1);
    return;
  }
  FAIL() << "no step was verified";
}

// What cannot be verified is read whole by every rank, or returned as it is.
TEST(RanksTest, UnverifiedHeads) {
  const Shape shape{4, 2, 64, 64, false, VATTN_F32};
  vattn_options options = OptionsFor(shape);
  options.epsilon = 1e-4f;
  World dense(shape, options, Even(3, 9000));
  const std::vector<Call> calls = dense.Step();
  ExpectSame(calls);
  ExpectExact(calls[2], 0, dense.rows(0));
  for (const int32_t verdict : calls[0].verdict) EXPECT_EQ(verdict, VATTN_VERDICT_DENSE);
  options.on_unverified = VATTN_ON_UNVERIFIED_BEST_EFFORT;
  World effort(shape, options, Even(3, 9000));
  const std::vector<Call> estimates = effort.Step();
  ExpectSame(estimates);
  for (const int32_t verdict : estimates[0].verdict) EXPECT_EQ(verdict, VATTN_VERDICT_BEST_EFFORT);
  for (int h = 0; h < 4; ++h) {
    const Answer answer = Attend(shape, effort.rows(0), h / 2, estimates[0].Query(0, h));
    EXPECT_LT(Distance(answer, estimates[0].Out(0, h).data()), .5 * answer.rms_value);
    EXPECT_GT(estimates[0].error[h], options.epsilon);
  }
}

std::string TextOf(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(RanksTest, Errors) {
  const Shape shape;
  World world(shape, OptionsFor(shape), Even(2, 6000));
  world.Begin(1);
  const auto attend = [&](auto change, bool more = false) {
    vattn_attend_params params = world.Params(1);
    if (more) params.gathered = world.gathered.data();
    change(params);
    return TextOf(
        [&] { more ? world.batch(1).AttendMore(params) : world.batch(1).Attend(params); });
  };
  const auto has = [](const std::string& text, const char* part) {
    EXPECT_NE(text.find(part), std::string::npos) << text << " has no: " << part;
  };
  world.partial(1).assign(world.Floats(), 0);
  has(attend([](auto& p) { p.rank = 2; }), "rank is 2, must be 0 to 1");
  has(attend([](auto& p) { p.ranks = 65; }), "ranks is 65, must be 1 to 64");
  has(attend([](auto&) {}, true), "layer is 0, must be that of the call before");
  world.Forecast();
  has(attend([](auto&) {}, true), "gathered[0][0][0] is of version 0");
  has(attend([](auto& p) { p.gathered = nullptr; }, true), "gathered is NULL");
  has(attend([](auto& p) { p.rank = 0; }, true), "rank is 0 of 2, must be as in the call before");
  EXPECT_GT(world.More(), 0);
  // The forecasts once more, in place of the looks.
  const std::vector<float> look = world.gathered;
  has(attend([](auto&) {}, true), "round 0, must be of version 1, rank 0 and round 1");
  while (world.More() > 0) continue;

  vattn_options options = OptionsFor(shape);
  options.policy = VATTN_POLICY_TOPK;
  World ranked(shape, options, Even(2, 6000));
  ranked.Begin(1);
  has(TextOf([&] { ranked.Forecast(); }), "policy 1, slices of a context need verified");
}

// A rank is lost between two looks: the others give the step up, and take it again without loss.
TEST(RanksTest, AbandonedStepIsTakenAgain) {
  const Shape shape;
  World world(shape, OptionsFor(shape), Even(2, 9000));
  world.Step();
  world.Begin(1);
  world.Forecast();
  world.More();
  const std::vector<float> records = world.partial(1);
  for (int r = 0; r < 2; ++r) world.batch(r).Abandon();
  for (int r = 0; r < 2; ++r) world.batch(r).BeginStep(r);
  world.Forecast();
  world.More();
  if (!OnCuda()) {
    EXPECT_EQ(world.partial(1), records);
  }
  while (world.More() > 0) continue;
}

}  // namespace
}  // namespace vattn::test
