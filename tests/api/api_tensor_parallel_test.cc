// A rank of tensor parallelism has some of a model's KV heads. Each of its heads answers with the bits
// that it has in one runtime with all heads.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <numeric>

#include "tests/api/attention_model.h"
#include "tests/api/backend.h"
#include "tests/api/paged_pool.h"

namespace vattn::test {
namespace {

constexpr int64_t kTokens = 5000;
const Shape kWhole{8, 4, 64, 64, false, VATTN_BF16};

// KV heads [first, first + heads) of an array [tokens][all heads][dim].
std::vector<float> Part(const std::vector<float>& whole, int all, int first, int heads, int dim) {
  std::vector<float> part;
  for (size_t at = 0; at < whole.size(); at += static_cast<size_t>(all) * dim) {
    const auto from = whole.begin() + static_cast<int64_t>(at) + int64_t{first} * dim;
    part.insert(part.end(), from, from + int64_t{heads} * dim);
  }
  return part;
}

// The first `heads` KV heads from `first` on, with their query heads.
struct Rank {
  int first, heads;

  Shape shape() const {
    Shape s = kWhole;
    s.kv_heads = heads;
    s.q_heads = heads * kWhole.q_heads / kWhole.kv_heads;
    return s;
  }
  vattn_options options(int32_t policy) const {
    vattn_options o = OptionsFor(shape());
    o.policy = policy;
    o.first_kv_head = static_cast<uint64_t>(first);
    o.seed = 5;
    return o;
  }
  std::vector<float> Keys(const std::vector<float>& whole) const {
    return Part(whole, kWhole.kv_heads, first, heads, kWhole.dim_k);
  }
  std::vector<float> Queries(const std::vector<float>& whole) const {
    const int group = kWhole.q_heads / kWhole.kv_heads;
    return Part(whole, kWhole.q_heads, first * group, heads * group, kWhole.dim_k);
  }
};

const Rank kAll{0, 4};
const Rank kRanks[] = {{0, 1}, {1, 1}, {2, 2}};

// What a step has by head.
struct Answers {
  std::vector<float> out, lse, error;
  std::vector<int32_t> verdict, selected;

  void Append(const Answers& more) {
    const auto add = [](auto& to, const auto& from) {
      to.insert(to.end(), from.begin(), from.end());
    };
    add(out, more.out), add(lse, more.lse), add(error, more.error);
    add(verdict, more.verdict), add(selected, more.selected);
  }
  bool operator==(const Answers&) const = default;
};

// Steps of one sequence of which `rank` has its heads.
std::vector<Answers> Decode(const Rank& rank, int32_t policy) {
  std::mt19937_64 engine(31);
  Rows whole;
  whole.AddGaussian(kWhole, engine, kTokens);
  const Shape shape = rank.shape();
  Rows rows;
  rows.Add(shape, rank.Keys(whole.k), rank.Keys(whole.v));
  const Runtime runtime(rank.options(policy));
  Sequence sequence(runtime, 9);
  AppendRows(sequence, shape, 0, rows);
  Batch batch(runtime, 1);
  batch.Set(0, sequence);
  std::vector<Answers> steps;
  for (int step = 0; step < 5; ++step) {
    Call all(kWhole, 1, 0);
    all.Fill(engine, 1, 1.5f);
    Call call(shape, 1, 0);
    call.q = rank.Queries(all.q), call.k_new = rank.Keys(all.k_new);
    call.v_new = rank.Keys(all.v_new);
    batch.BeginStep(1);
    batch.Attend(call.Params());
    steps.push_back({{}, call.lse, call.error, call.verdict, call.selected});
    for (int h = 0; h < shape.q_heads; ++h) {
      const std::vector<float> out = call.Out(0, h);
      steps.back().out.insert(steps.back().out.end(), out.begin(), out.end());
    }
  }
  return steps;
}

// The same over a pool whose tables are those of the whole model.
std::vector<Answers> DecodePaged(const Rank& rank, const std::string& tables) {
  std::mt19937_64 engine(32);
  Rows whole;
  whole.AddGaussian(kWhole, engine, 3500);
  const Shape shape = rank.shape();
  Pool pool({"", shape, 32, false}, rank.options(VATTN_POLICY_VERIFIED), 200, "gauss", tables);
  Request request;
  request.rows.Add(shape, rank.Keys(whole.k), rank.Keys(whole.v));
  pool.Write(request, 0, true);
  std::vector<Answers> steps;
  for (int step = 0; step < 4; ++step) {
    const std::vector<float> q =
        Gaussian(engine, kWhole.dtype, kWhole.q_heads * kWhole.dim_k, 1.5f);
    std::vector<Request*> requests{&request};
    const PagedCall call = pool.Step(requests, {1}, 1, VATTN_F32, rank.Queries(q));
    steps.push_back({{}, call.lse, call.error, call.verdict, call.selected});
    for (int h = 0; h < shape.q_heads; ++h) {
      const std::vector<float> out = pool.Out(call, 0, 0, h);
      steps.back().out.insert(steps.back().out.end(), out.begin(), out.end());
    }
  }
  return steps;
}

void ExpectEqual(const std::vector<Answers>& whole,
                 const std::vector<std::vector<Answers>>& ranks) {
  for (size_t step = 0; step < whole.size(); ++step) {
    Answers joined;
    for (const std::vector<Answers>& rank : ranks) joined.Append(rank[step]);
    EXPECT_EQ(joined, whole[step]) << "step " << step;
  }
}

TEST(TensorParallelTest, SequencesHaveEqualBits) {
  for (const int32_t policy :
       {VATTN_POLICY_VERIFIED, VATTN_POLICY_TOPK_UNIFORM, VATTN_POLICY_DENSE}) {
    SCOPED_TRACE(policy);
    std::vector<std::vector<Answers>> ranks;
    for (const Rank& rank : kRanks) ranks.push_back(Decode(rank, policy));
    const std::vector<Answers> whole = Decode(kAll, policy);
    ExpectEqual(whole, ranks);
    if (policy == VATTN_POLICY_DENSE) continue;
    if (policy == VATTN_POLICY_VERIFIED) {
      EXPECT_LT(whole[1].selected[0], kTokens / 2);
    }
    // Another place among the heads draws other rows.
    EXPECT_NE(Decode({3, 1}, policy)[1].out, Decode({2, 1}, policy)[1].out);
  }
}

TEST(TensorParallelTest, PoolsHaveEqualBits) {
  const Runtime runtime(kAll.options(VATTN_POLICY_VERIFIED));
  const std::string tables = MakeTables(runtime, kWhole) + "_whole";
  std::filesystem::rename(TablesPath(), tables);
  std::vector<std::vector<Answers>> ranks;
  for (const Rank& rank : kRanks) ranks.push_back(DecodePaged(rank, tables));
  const std::vector<Answers> whole = DecodePaged(kAll, tables);
  ExpectEqual(whole, ranks);
  EXPECT_LT(whole[1].selected[0], 2000);
  std::filesystem::remove(tables);
}

TEST(TensorParallelTest, Errors) {
  const auto refused = [](const auto& make, const std::string& text) {
    try {
      make();
      ADD_FAILURE() << "not refused: " << text;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
    }
  };
  vattn_options o = kAll.options(VATTN_POLICY_VERIFIED);
  o.first_kv_head = 64513;
  refused([&] { Runtime{o}; }, "first_kv_head is 64513");
  const Runtime runtime(kAll.options(VATTN_POLICY_VERIFIED));
  const std::string tables = MakeTables(runtime, kWhole);
  const auto pool = [&](const Rank& rank, int q_heads) {
    Shape shape = rank.shape();
    shape.q_heads = q_heads;
    vattn_options options = OptionsFor(shape);
    options.first_kv_head = static_cast<uint64_t>(rank.first);
    Pool({"", shape, 32, false}, options, 100, "gauss", tables);
  };
  refused([&] { pool({3, 2}, 4); }, "must have KV heads [3, 5) with 2 query heads each");
  refused([&] { pool({0, 2}, 8); }, "must have KV heads [0, 2) with 4 query heads each");
  std::filesystem::remove(tables);
}

}  // namespace
}  // namespace vattn::test
