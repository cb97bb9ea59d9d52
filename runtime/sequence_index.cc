// The index of a sequence: which tokens have codes, and the segments whose tables code them.
#include <algorithm>
#include <cmath>

#include "absl/cleanup/cleanup.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/workers.h"
#include "kernels/rng.h"
#include "memory/status.h"
#include "runtime/backend.h"
#include "runtime/sequence.h"

namespace vattn {
namespace {

constexpr int64_t kCalibrationTokens = 2048;  // keys that tables are learnt from, at most
constexpr int64_t kLeastTablesTokens = 1024;  // that tables for other texts are learnt from
constexpr int64_t kCentreTokens = 1024;       // keys that a centre is made from, at most

// Keys and values that a segment is made from, in fp32: [count][dim_k] and [count][dim_v].
struct Sample {
  std::vector<float> keys, values;
  int64_t count = 0;
};

// Which tokens: of every `stride` runs of `run` tokens from `first` on, one. Which one is random
// (always the same for i): a text with a period would show a regular walk a fraction of its keys.
struct Walk {
  int64_t first = 0, run = 1, stride = 1, count = 0;
  bool others = false;  // of every stride another one than without

  static Walk Over(int64_t begin, int64_t end, int64_t run, int64_t most) {
    const int64_t n = end - begin, stride = (n + most - 1) / most;
    return {begin, run, stride, n / run / stride * run};
  }
  int64_t Token(int64_t i) const {
    const uint32_t stratum = static_cast<uint32_t>(i / run);
    const auto random = Philox({{stratum, 0, 0, 0}}, 0, 0);
    int64_t pick = random.word[0] % static_cast<uint64_t>(stride);
    if (others) pick = (pick + 1 + random.word[1] % static_cast<uint64_t>(stride - 1)) % stride;
    return first + (stratum * stride + pick) * run + i % run;
  }
};

void LoadSample(const Storage& s, const BlockTable& blocks, const Walk& walk, Sample& out) {
  const size_t begin = static_cast<size_t>(out.count);
  out.count += walk.count;
  out.keys.resize(static_cast<size_t>(out.count) * s.row.dim_k);
  out.values.resize(static_cast<size_t>(out.count) * s.row.dim_v);
  // The rows lie apart, so each is fetched while those before it are converted.
  constexpr int64_t kAhead = 8;
  const uint8_t* rows[kAhead];
  const auto fetch = [&](int64_t i) {
    const int64_t token = walk.Token(i);
    rows[i % kAhead] =
        reinterpret_cast<const uint8_t*>(s.base + blocks[token / kBlockTokens] * s.block.bytes +
                                         token % kBlockTokens * s.row.row_bytes);
    for (int32_t at = 0; at < s.row.row_bytes; at += 64) cpu::FetchSoon(rows[i % kAhead] + at);
  };
  for (int64_t i = 0; i < std::min(kAhead, walk.count); ++i) fetch(i);
  for (int64_t i = 0; i < walk.count; ++i) {
    const uint8_t* row = rows[i % kAhead];
    if (i + kAhead < walk.count) fetch(i + kAhead);
    const size_t at = begin + static_cast<size_t>(i);
    cpu::LoadRows({.rows = &row, .count = 1, .offset = 0, .dim = s.row.dim_k, .dtype = s.row.dtype},
                  out.keys.data() + at * s.row.dim_k);
    cpu::LoadRows({.rows = &row,
                   .count = 1,
                   .offset = s.row.v_offset,
                   .dim = s.row.dim_v,
                   .dtype = s.row.dtype},
                  out.values.data() + at * s.row.dim_v);
  }
}

// Moves the keys from number `from` on so that their mean is that of the ones before.
void ShareMean(Sample& sample, int64_t from, int dim) {
  std::vector<double> before(dim, 0), behind(dim, 0);
  for (int64_t i = 0; i < sample.count; ++i) {
    std::vector<double>& sum = i < from ? before : behind;
    for (int c = 0; c < dim; ++c) sum[c] += static_cast<double>(sample.keys[i * dim + c]);
  }
  for (int c = 0; c < dim; ++c) {
    const double move = before[c] / static_cast<double>(from) -
                        behind[c] / static_cast<double>(sample.count - from);
    for (int64_t i = from; i < sample.count; ++i)
      sample.keys[i * dim + c] += static_cast<float>(move);
  }
}

}  // namespace

absl::Status Sequence::AddQueries(const AppendRequest& r,
                                  std::vector<std::unique_ptr<QueryMoment>>& moments) const {
  const Storage& s = runtime_->storage();
  const int group_heads = runtime_->group_heads(r.layer), dim = s.row.dim_k,
            element = ElementBytes(s.row.dtype);
  const int64_t picks = QueryMoment::NumPicks(r.num_queries, group_heads),
                groups = static_cast<int64_t>(moments.size());
  std::vector<int64_t> offsets;  // [KV heads][picks]
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < picks; ++i) {
      const QueryMoment::Pick pick = QueryMoment::PickAt(i, r.num_queries, group_heads);
      offsets.push_back(
          (pick.token * r.q_token_stride + (g * group_heads + pick.head) * r.q_head_stride) *
          element);
    }
  }
  std::vector<const std::byte*> rows;
  std::vector<std::byte> copy;
  VATTN_RETURN_IF_ERROR(
      runtime_->backend().OnHost(r.q, offsets, int64_t{dim} * element, rows, copy));
  cpu::ParallelFor(runtime_->workers(), groups, [&](int64_t g) {
    const KvHead& kv_head = layers_[r.layer].kv_heads[g];
    moments[g] = kv_head.moment ? std::make_unique<QueryMoment>(*kv_head.moment)
                                : std::make_unique<QueryMoment>(dim);
    std::vector<float> queries(static_cast<size_t>(picks * dim));
    for (int64_t i = 0; i < picks; ++i) {
      const uint8_t* row = reinterpret_cast<const uint8_t*>(rows[g * picks + i]);
      cpu::LoadRows({.rows = &row, .count = 1, .offset = 0, .dim = dim, .dtype = s.row.dtype},
                    queries.data() + i * dim);
    }
    for (float& x : queries) x *= s.scale;
    moments[g]->Add(queries.data(), picks, r.num_queries);
  });
  return absl::OkStatus();
}

int64_t Sequence::MiddleEnd(int64_t tokens) const {
  return vattn::MiddleEnd(ExactSetsOf(runtime_->options()), tokens);
}

Middle Sequence::middle_in_step() const {
  return MiddleOfStep(ExactSetsOf(runtime_->options()), tokens_in_step(), num_query_tokens());
}

absl::Status Sequence::BuildIndex() {
  if (Seat* const sits_in = seat.load()) VATTN_RETURN_IF_ERROR(sits_in->EndStep());
  VATTN_RETURN_IF_ERROR(MakeRoomAndCode(0, /*in_turn=*/false));
  return half_->Settle(*this);
}

absl::StatusOr<std::vector<std::vector<std::shared_ptr<const Index>>>> Sequence::LearnTables() {
  VATTN_RETURN_IF_ERROR(CheckWhole());
  const Options& o = runtime_->options();
  if (runtime_->storage().code.kind != IndexKind::kBalanced) {
    return NotSupportedError("index is ", static_cast<int32_t>(o.index),
                             ", tables are learnt for balanced (0)");
  }
  VATTN_RETURN_IF_ERROR(ReadBackState());
  TakeRecentQueries();
  std::vector<std::vector<std::shared_ptr<const Index>>> tables(layers_.size());
  for (int l = 0; l < static_cast<int>(layers_.size()); ++l) {
    if (layers_[l].kv_heads.empty()) continue;
    const int64_t end = (layers_[l].tokens - o.window) / kCodeTokens * kCodeTokens;
    if (end - o.sinks < kLeastTablesTokens) {
      return InvalidArgumentError("layer ", l, " has ", std::max<int64_t>(0, end - o.sinks),
                                  " tokens between sinks and window, must have at least ",
                                  kLeastTablesTokens, " for tables to be learnt from");
    }
    tables[l] = Learn(l, o.sinks, end);
  }
  return tables;
}

absl::Status Sequence::OpenStep(int new_tokens) {
  for (const Layer& layer : layers_) {
    if (!layer.kv_heads.empty()) tokens_before_step_ = layer.tokens;
  }
  new_tokens_ = new_tokens;
  half_->BeginStep(*this);
  return MakeRoomAndCode(new_tokens, /*in_turn=*/true);
}

void Sequence::GiveUpStep() {
  CutTo(tokens_before_step_);
  --step_;
  half_->GiveUpStep(*this);
}

void Sequence::TakeRecentQueries() {
  // What a lost device had is left out; the calls that follow report it.
  half_->ReadBackQueries(*this).IgnoreError();
  for (int l = 0; l < static_cast<int>(layers_.size()); ++l) {
    for (KvHead& kv_head : layers_[l].kv_heads) {
      if (kv_head.recent.empty()) continue;
      if (!kv_head.moment)
        kv_head.moment = std::make_unique<QueryMoment>(runtime_->storage().row.dim_k);
      kv_head.recent.MoveTo(*kv_head.moment, runtime_->group_heads(l));
    }
  }
}

int64_t Sequence::FirstOwnBlock(const Layer& layer) const {
  int64_t b = layer.coded / kBlockTokens;
  const auto own = [&](int64_t block) {
    return std::all_of(layer.kv_heads.begin(), layer.kv_heads.end(), [&](const KvHead& kv_head) {
      return block >= static_cast<int64_t>(kv_head.blocks.size()) ||
             runtime_->store().IsUnique(BlockId{kv_head.blocks[static_cast<size_t>(block)]});
    });
  };
  // Before this one it makes no difference.
  const int64_t least =
      layer.segments.empty() ? 0 : WithoutTables(layer.segments.back()) / kBlockTokens;
  if (!runtime_->store().AnyShared()) return std::min(b + 1, least);
  while (b >= least && own(b)) --b;
  return b + 1;
}

CodingPlan Sequence::PlanLayer(int l, int64_t end, bool in_turn) const {
  const Layer& layer = layers_[l];
  const int64_t sinks = runtime_->options().sinks;
  CodingPlan plan{.begin = end};
  if (layer.kv_heads.empty() || end <= sinks) return plan;
  const bool growing = runtime_->storage().code.kind == IndexKind::kBalanced;
  plan = PlanCoding(layer.segments, sinks, layer.coded, FirstOwnBlock(layer) * kBlockTokens, end,
                    growing);
  // What an append brought is coded at once. While tokens come one by one a step makes the segment
  // of one layer; the others wait, coded as before. Which one follows from the step's number, so
  // that one given up leaves no trace.
  const bool waits = in_turn && !layer.segments.empty() && end - layer.coded <= kCodeTokens;
  const bool turn = step_ % layers_.size() == static_cast<uint64_t>(l);
  if (plan.coding == Coding::kExtend || !waits || turn) return plan;
  return {.coding = Coding::kExtend, .begin = std::max<int64_t>(layer.coded, sinks)};
}

absl::Status Sequence::MakeRoomAndCode(int new_tokens, bool in_turn) {
  std::vector<BlockNeed> needs;
  std::vector<CodingPlan> plans(layers_.size());
  bool makes = false;
  for (int l = 0; l < static_cast<int>(layers_.size()); ++l) {
    const Layer& layer = layers_[l];
    // What has left the window of the first new token is coded, for all of them.
    const int64_t tokens = layer.tokens + new_tokens,
                  end = MiddleEnd(layer.tokens + std::min(new_tokens, 1));
    plans[l] = PlanLayer(l, end, in_turn);
    makes |= plans[l].coding != Coding::kExtend;
    // One list per layer without repeats: what is coded lies before what is written.
    const int64_t code_from = plans[l].begin,
                  write_from = layer.tokens / kBlockTokens * kBlockTokens;
    if (end > code_from) blocks_.ListNeeds(l, code_from, std::min(end, write_from), needs);
    blocks_.ListNeeds(
        l, end > code_from ? std::min(layer.tokens, std::max(code_from, write_from)) : layer.tokens,
        tokens, needs);
  }
  VATTN_RETURN_IF_ERROR(TakeBlocksFor(needs));
  if (new_tokens > 0) {
    for (Layer& layer : layers_) blocks_.ClaimLastBlock(layer);
  }
  // Segments are made from rows and queries that steps have written.
  if (makes) {
    VATTN_RETURN_IF_ERROR(ReadBackState());
    TakeRecentQueries();
  }
  for (int l = 0; l < static_cast<int>(layers_.size()); ++l) {
    CodeLayer(l, plans[l], MiddleEnd(layers_[l].tokens + std::min(new_tokens, 1)));
  }
  CountTables();
  return absl::OkStatus();
}

void Sequence::CodeLayer(int l, const CodingPlan& plan, int64_t end) {
  Layer& layer = layers_[l];
  if (end <= plan.begin || layer.kv_heads.empty()) return;
  if (plan.coding != Coding::kExtend) MakeSegment(l, plan, end);
  runtime_->counters().segments_refused += plan.refused;
  layer.coded = end;
  layer.codes_made = std::min(layer.codes_made, plan.begin);
  half_->Code(*this, l, plan.begin);
}

void Sequence::MakeSegment(int l, const CodingPlan& plan, int64_t end) {
  Layer& layer = layers_[l];
  const int64_t begin =
      std::max<int64_t>(plan.first_block * kBlockTokens, runtime_->options().sinks);
  const bool replaces =
      !layer.segments.empty() && layer.segments.back().first_block == plan.first_block;
  // All KV heads or none: one that fails throws.
  std::vector<std::shared_ptr<const Index>> made;
  // One that is learnt because of a flood stays provisional: its first few tokens do not speak for
  // those that follow.
  const bool provisional = plan.coding == Coding::kRecentre;
  bool learns = !provisional;
  if (provisional) {
    double flooded = 0;
    made = Recentre(layer, begin, end, &flooded);
    learns = flooded > kFloodShare && end - begin >= kLeastFlooded;
    runtime_->counters().index_floods += learns;
  }
  if (learns) made = Learn(l, begin, end);
  std::vector<Segment> segments = layer.segments;
  if (!replaces) {
    // A provisional segment that ends here stays as it is.
    if (!segments.empty()) segments.back().provisional = false;
    segments.emplace_back();
  }
  segments.back() = {plan.first_block, end, provisional};
  for (KvHead& kv_head : layer.kv_heads) {
    kv_head.tables.reserve(segments.size());
    kv_head.segments.reserve(segments.size());
  }
  // Nothing throws from here on: a layer has as many tables in every KV head as it has segments.
  const bool recodes = begin < layer.coded;
  layer.segments.swap(segments);
  for (size_t g = 0; g < made.size(); ++g) {
    KvHead& kv_head = layer.kv_heads[g];
    kv_head.tables.resize(layer.segments.size());
    kv_head.tables.back() = {std::move(made[g]), nullptr};
  }
  UpdateSegments(layer);
  Counters& counters = runtime_->counters();
  counters.segments_learnt += learns;
  counters.segments_recoded += recodes;
}

std::vector<std::shared_ptr<const Index>> Sequence::Recentre(const Layer& layer, int64_t begin,
                                                             int64_t end, double* flooded) const {
  const Storage& s = runtime_->storage();
  // The tables of the last segment that is not provisional.
  size_t k = layer.segments.size() - 1;
  while (k > 0 && layer.segments[k].provisional) --k;
  const Walk walk = Walk::Over(begin, end, 1, kCentreTokens);
  std::vector<std::shared_ptr<const Index>> made(layer.kv_heads.size());
  std::vector<double> shares(layer.kv_heads.size());
  cpu::Workers* const workers = runtime_->workers();
  cpu::ParallelFor(workers, static_cast<int64_t>(layer.kv_heads.size()), [&](int64_t g) {
    const KvHead& kv_head = layer.kv_heads[g];
    Sample sample;
    LoadSample(s, kv_head.blocks, walk, sample);
    made[g] = Index::Recentre(s, *kv_head.tables[k].index, sample.keys.data(), sample.values.data(),
                              sample.count, &shares[g]);
  });
  *flooded = *std::max_element(shares.begin(), shares.end());
  return made;
}

std::vector<std::shared_ptr<const Index>> Sequence::Learn(int l, int64_t begin, int64_t end) {
  Layer& layer = layers_[l];
  const Storage& s = runtime_->storage();
  const int64_t sinks = runtime_->options().sinks;
  // Indices that speak for tiles are fitted on whole ones; the tokens are a multiple of 16.
  const int64_t run = s.code.kind == IndexKind::kPage ? kTileTokens : 1;
  const Walk walk = Walk::Over(begin, end, run, kCalibrationTokens);
  // A few tokens do not say in which directions keys vary: those before help.
  const int64_t help = std::min(begin - sinks, std::max<int64_t>(0, kLeastLearnt - walk.count));
  std::vector<std::shared_ptr<const Index>> made(layer.kv_heads.size());
  cpu::Workers* const workers = runtime_->workers();
  cpu::ParallelFor(workers, static_cast<int64_t>(layer.kv_heads.size()), [&](int64_t g) {
    KvHead& kv_head = layer.kv_heads[g];
    Sample sample;
    LoadSample(s, kv_head.blocks, walk, sample);
    if (help > 0) {
      LoadSample(s, kv_head.blocks, {begin - help, 1, 1, help}, sample);
      ShareMean(sample, walk.count, s.row.dim_k);
    }
    const QueryMoment moment =
        kv_head.moment ? *kv_head.moment : runtime_->ProfileMoment(l, static_cast<int>(g));
    made[g] = Index::Make(s, sample.keys.data(), sample.values.data(), sample.count, moment,
                          runtime_->LearnedMap(l, static_cast<int>(g)));
    if (s.code.kind == IndexKind::kBalanced && walk.stride > 1) {
      Walk others = walk;
      others.others = true;
      Sample held_out;
      LoadSample(s, kv_head.blocks, others, held_out);
      made[g] =
          made[g]->WithLimitsOf(s, held_out.keys.data(), held_out.values.data(), held_out.count);
    }
    // Values are coded alike in every segment.
    if (begin > sinks) made[g] = made[g]->WithValuesOf(s, *kv_head.tables[0].index);
  });
  return made;
}

}  // namespace vattn
