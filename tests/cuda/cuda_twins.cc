#include "tests/cuda/cuda_twins.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>

#include "kernels/rng.h"

namespace vattn::test {
namespace {

constexpr double kBorder = 1e-3;   // relative distance of u from pi that rounding may bridge
constexpr double kMostMoved = .1;  // the same where a query's level rounded the other way
constexpr double kMostLoose = .1;  // share of lists that this may happen to
// Share of heads that part ways in a step: the order of sums moves the controller's state by an ulp,
// that moves one token over the border now and then, and a token moves all heads of its group. From
// then on the controllers differ, so that the group is not compared any more; the verdicts stay the
// same.
constexpr double kMostApart = .1;
constexpr double kMostDiffer = .005;  // share of drawn tokens that only one backend drew
// Share of drawn tokens that only one backend was sure of: an estimate that is rounded the other
// way, in fp16, can be on the other side of the score from which on tokens are drawn whatever their
// probability is.
constexpr double kMostSure = .004;

vattn_options On(vattn_options options, int32_t backend) {
  options.backend = backend;
  options.num_threads = 0;
  return options;
}

// What became of draws.
struct DrawTally {
  int64_t lists = 0, loose = 0, drawn = 0, differ = 0, sure = 0;
};

// One (slot, KV head): tokens of both lists, and of one alone.
void CompareList(const Twins& twins, int slot, int head, const Lists& a, const Lists& b,
                 DrawTally& tally) {
  const int at = slot * twins.shape(0).kv_heads + head;
  const RandomKey key =
      MakeRandomKey(twins.options().seed, Twins::Id(slot), 0, static_cast<uint32_t>(head));
  const Lists* const lists[] = {&a, &b};
  int64_t i[2] = {0, 0};
  double moved = 0;
  const auto token = [&](int side) {
    return i[side] < lists[side]->counts[at] ? lists[side]->tokens[at * a.capacity + i[side]]
                                             : INT32_MAX;
  };
  const auto weight = [&](int side) {
    return double{lists[side]->weights[at * a.capacity + i[side]]};
  };
  while (token(0) != INT32_MAX || token(1) != INT32_MAX) {
    if (token(0) == token(1)) {
      const double apart = std::abs(weight(0) - weight(1));
      if (apart > kMostMoved && std::min(weight(0), weight(1)) == 0) {
        ++tally.sure;
      } else {
        moved = std::max(moved, apart);
      }
      tally.drawn += weight(0) > 0;
      ++i[0], ++i[1];
      continue;
    }
    const int only = token(0) < token(1) ? 0 : 1;
    if (weight(only) == 0) {
      ++tally.sure, ++tally.differ, ++tally.drawn, ++i[only];
      continue;
    }
    const double pi = std::exp(-weight(only));
    const double u = double{TokenUniform(key, static_cast<uint32_t>(token(only)), twins.steps(),
                                         static_cast<uint32_t>(twins.options().refresh))};
    EXPECT_LE(u, pi * (1 + 1e-5)) << "token " << token(only) << " was drawn without reason";
    EXPECT_LE(std::abs(u - pi), kMostMoved * pi)
        << "token " << token(only) << " of " << (only == 0 ? "the CPU" : "CUDA") << " alone";
    moved = std::max(moved, std::abs(u - pi) / pi);
    ++tally.differ, ++tally.drawn, ++i[only];
  }
  EXPECT_LE(moved, kMostMoved) << "slot " << slot << " head " << head;
  ++tally.lists;
  if (moved > kBorder) {
    ++tally.loose;
    std::printf("slot %d head %d: weights of the draw are up to %.2g apart\n", slot, head, moved);
  }
}

}  // namespace

Rows Twins::GaussianRows(const Shape& shape, std::mt19937_64& engine, int64_t count) {
  Rows rows;
  rows.AddGaussian(shape, engine, count);
  return rows;
}

Twins::Twins(const vattn_options& options, std::vector<Shape> layers, std::vector<int64_t> lengths,
             MakeRows make_rows)
    : options_(options),
      layers_(std::move(layers)),
      lengths_(std::move(lengths)),
      cpu(On(options, VATTN_BACKEND_CPU), slots()),
      cuda(On(options, VATTN_BACKEND_CUDA), slots()) {
  for (int s = 0; s < slots(); ++s) {
    for (Side* side : {&cpu, &cuda}) side->sequences.emplace_back(side->runtime, Id(s));
    if (!Filled(s)) continue;
    for (int l = 0; l < static_cast<int>(layers_.size()); ++l) {
      if (layers_[l].kv_heads == 0 || lengths_[s] == 0) continue;
      const Rows rows = make_rows(layers_[l], engine, lengths_[s]);
      AppendRows(cpu.sequences[s], layers_[l], l, rows);
      AppendRows(cuda.sequences[s], layers_[l], l, rows);
    }
    for (Side* side : {&cpu, &cuda}) side->batch.Set(s, side->sequences[s]);
  }
}

void Twins::Append(int64_t count, MakeRows make_rows) {
  for (int s = 0; s < slots(); ++s) {
    for (int l = 0; l < static_cast<int>(layers_.size()); ++l) {
      if (layers_[l].kv_heads == 0 || lengths_[s] <= 0) continue;
      const Rows rows = make_rows(layers_[l], engine, count);
      AppendRows(cpu.sequences[s], layers_[l], l, rows);
      AppendRows(cuda.sequences[s], layers_[l], l, rows);
    }
  }
}

void Twins::BuildIndices() {
  for (Side* side : {&cpu, &cuda}) {
    for (int s = 0; s < slots(); ++s) {
      if (Filled(s)) side->sequences[s].BuildIndex();
    }
  }
}

void Twins::BeginStep() {
  cpu.batch.BeginStep(query_tokens);
  cuda.batch.BeginStep(query_tokens);
  ++steps_;
}

std::pair<Call, Call> Twins::Calls(int layer, float query_sigma, int32_t out_dtype) {
  Call call(layers_[layer], slots(), layer, out_dtype, query_tokens);
  call.Fill(engine, query_tokens, query_sigma);
  return {call, call};
}

void CompareSelect(Twins& twins, float query_sigma, Lists& a) {
  const Shape& shape = twins.shape(0);
  Lists b(shape, twins.slots(), a.capacity);
  auto [on_cpu, on_cuda] = twins.Calls(0, query_sigma);
  twins.BeginStep();
  vattn_selection first = a.Selection(), second = b.Selection();
  twins.cpu.batch.Select(on_cpu.Params(), first);
  twins.cuda.batch.Select(on_cuda.Params(), second);
  EXPECT_EQ(on_cpu.middle, on_cuda.middle);
  DrawTally tally;
  for (int s = 0; s < twins.slots(); ++s) {
    for (int h = 0; h < shape.kv_heads; ++h) {
      const int at = s * shape.kv_heads + h;
      if (!twins.Filled(s)) {
        EXPECT_EQ(b.counts[at], -1) << "an empty slot was written";
        EXPECT_EQ(b.tokens[at * b.capacity], -1);
        continue;
      }
      EXPECT_EQ(b.counts[at] - on_cuda.selected[at], a.counts[at] - on_cpu.selected[at]);
      CompareList(twins, s, h, a, b, tally);
    }
  }
  std::printf("%d of %d drawn tokens differ, of %d one is sure, %d of %d lists moved\n",
              static_cast<int>(tally.differ), static_cast<int>(tally.drawn),
              static_cast<int>(tally.sure), static_cast<int>(tally.loose),
              static_cast<int>(tally.lists));
  EXPECT_GT(tally.drawn, 4 * tally.lists);
  EXPECT_LE(static_cast<double>(tally.sure), 1 + kMostSure * static_cast<double>(tally.drawn));
  EXPECT_LE(static_cast<double>(tally.differ), 1 + kMostDiffer * static_cast<double>(tally.drawn));
  EXPECT_LE(static_cast<double>(tally.loose), 1 + kMostLoose * static_cast<double>(tally.lists));
}

double Norm(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t j = 0; j < a.size(); ++j) {
    const double x = double{a[j]} - (b.empty() ? 0 : double{b[j]});
    sum += x * x;
  }
  return std::sqrt(sum);
}

void CompareAnswers(Twins& twins, const Call& a, const Call& b, AnswerTally& tally) {
  const Shape& shape = a.shape;
  const int group = shape.q_heads / shape.kv_heads;
  EXPECT_EQ(a.middle, b.middle);
  const double rms = std::sqrt(shape.dim_v);
  tally.most_heads = std::max(tally.most_heads, int64_t{a.tokens} * group);
  std::set<Twins::Place> parted;
  for (int s = 0; s < twins.slots(); ++s) {
    for (int i = 0; i < a.tokens * shape.q_heads; ++i) {
      const int t = i / shape.q_heads, h = i % shape.q_heads;
      SCOPED_TRACE("slot " + std::to_string(s) + " token " + std::to_string(t) + " head " +
                   std::to_string(h));
      const size_t q = a.At(s, h, t);
      const int kv = s * shape.kv_heads + h / group;
      const std::vector<float> mine = a.Out(s, h, t), theirs = b.Out(s, h, t);
      if (!twins.Filled(s)) {
        EXPECT_EQ(mine, theirs) << "an empty slot was written";
        EXPECT_EQ(b.verdict[q], -7);
        continue;
      }
      const double apart = Norm(mine, theirs);
      if (a.verdict[q] == VATTN_VERDICT_EXACT) {
        ++tally.exact;
        EXPECT_EQ(b.verdict[q], VATTN_VERDICT_EXACT);
        EXPECT_LE(apart, 4e-5 * rms);
        EXPECT_NEAR(a.lse[q], b.lse[q], 4e-5 * (1 + std::abs(a.lse[q])));
        EXPECT_EQ(b.error[q], 0);
        EXPECT_EQ(b.selected[kv], a.selected[kv]);
        continue;
      }
      const Twins::Place place{a.layer, s, h / group};
      const bool compared = twins.apart.count(place) == 0;
      tally.verdicts_differ += compared && a.verdict[q] != b.verdict[q];
      const double ref = std::max(Norm(mine), .5 * rms);
      EXPECT_LE(apart, 4 * double{twins.options().epsilon} * ref);
      const bool same = a.verdict[q] == b.verdict[q] && a.selected[kv] == b.selected[kv] &&
                        a.looks[kv] == b.looks[kv];
      const bool close = same && apart <= 1e-3 * ref &&
                         std::abs(a.lse[q] - b.lse[q]) <= 1e-3 * (1 + std::abs(a.lse[q])) &&
                         std::abs(a.error[q] - b.error[q]) <= 2e-2 * a.error[q];
      if (!compared) {
        ++tally.left_out;
        continue;
      }
      ++tally.sampled;
      tally.loose += !close;
      if (!close) parted.insert(place);
    }
  }
  twins.apart.merge(parted);
}

void ExpectAlike(const AnswerTally& tally) {
  std::printf(
      "%d exact heads; of %d sampled ones %d are not alike and %d verdicts differ; %d more had "
      "been "
      "apart before\n",
      static_cast<int>(tally.exact), static_cast<int>(tally.sampled), static_cast<int>(tally.loose),
      static_cast<int>(tally.verdicts_differ), static_cast<int>(tally.left_out));
  EXPECT_GT(tally.exact, 0);
  EXPECT_GT(tally.sampled, 0);
  // Two groups may be apart whatever the number of steps.
  EXPECT_LE(static_cast<double>(tally.loose),
            2 * tally.most_heads + kMostApart * static_cast<double>(tally.sampled));
  EXPECT_LE(static_cast<double>(tally.verdicts_differ),
            1 + .02 * static_cast<double>(tally.sampled));
}

void CompareSelected(Twins& twins, Lists& lists, float query_sigma, bool with_weights) {
  const Shape& shape = twins.shape(0);
  auto [on_cpu, on_cuda] = twins.Calls(0, query_sigma);
  twins.BeginStep();
  const vattn_selection selection = lists.Selection(with_weights);
  twins.cpu.batch.AttendSelected(on_cpu.Params(), selection);
  twins.cuda.batch.AttendSelected(on_cuda.Params(), selection);
  EXPECT_EQ(on_cpu.selected, on_cuda.selected);
  EXPECT_EQ(on_cpu.verdict, on_cuda.verdict);
  for (int s = 0; s < twins.slots(); ++s) {
    for (int i = 0; i < on_cpu.tokens * shape.q_heads && twins.Filled(s); ++i) {
      const int t = i / shape.q_heads, h = i % shape.q_heads;
      SCOPED_TRACE("slot " + std::to_string(s) + " token " + std::to_string(t) + " head " +
                   std::to_string(h));
      const size_t q = on_cpu.At(s, h, t);
      EXPECT_LE(Norm(on_cpu.Out(s, h, t), on_cuda.Out(s, h, t)), 1e-4 * std::sqrt(shape.dim_v));
      EXPECT_NEAR(on_cpu.lse[q], on_cuda.lse[q], 1e-4 * (1 + std::abs(on_cpu.lse[q])));
    }
  }
}

}  // namespace vattn::test
