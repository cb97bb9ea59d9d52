#include "runtime/cpu/batch.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/cpu/attend.h"
#include "kernels/cpu/decode.h"
#include "kernels/cpu/ranks.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/write.h"
#include "memory/status.h"
#include "runtime/sequence.h"

namespace vattn {

CpuBatch::CpuBatch(Runtime& runtime, int slots) : runtime_(runtime), slots_(slots, nullptr) {}

int64_t CpuBatch::HotCapacity(int64_t middle) const {
  return static_cast<int64_t>(
      std::floor(runtime_.options().hot_share * static_cast<double>(std::max<int64_t>(middle, 0))));
}

absl::Status CpuBatch::BeginStep(const std::vector<Sequence*>& slots, DeviceStream) {
  slots_ = slots;
  query_tokens_ = 1;
  uint64_t most = 0;
  size_t most_groups = 0;
  for (int l = 0; l < runtime_.options().num_layers; ++l) {
    uint64_t bytes = 0;
    size_t groups = 0;
    for (Sequence* sequence : slots_) {
      if (sequence == nullptr || runtime_.kv_heads(l) == 0) continue;
      Layer& layer = sequence->layer(l);
      query_tokens_ = sequence->num_query_tokens();
      const int64_t end = sequence->middle_end_in_step();
      bytes += static_cast<uint64_t>(runtime_.kv_heads(l)) * GroupBytes(*sequence, l);
      groups += layer.kv_heads.size();
      if (runtime_.options().hot_share == 0) continue;
      for (KvHead& kv_head : layer.kv_heads)
        kv_head.hot.Reserve(end, HotCapacity(end - sequence->middle_begin_in_step()));
    }
    most = std::max(most, bytes);
    most_groups = std::max(most_groups, groups);
  }
  const size_t heads =
      slots_.size() * static_cast<size_t>(runtime_.options().num_q_heads) * query_tokens_;
  verdicts_.resize(heads);
  errors_.resize(heads);
  if (query_tokens_ > 1) states_.resize(heads);
  if (runtime_.promise().index == IndexKind::kExternal) score_rows_.resize(heads);
  blocks_.reserve(runtime_.options().num_q_heads);
  groups_.reserve(most_groups);
  owners_.reserve(most_groups);
  slices_.resize(most_groups);
  if (most <= scratch_.size()) return absl::OkStatus();
  absl::StatusOr<VirtualRange> range =
      VirtualRange::Reserve(most + most / 8, {.ops = runtime_.io().memory_ops});
  if (!range.ok()) return range.status();
  scratch_ = *std::move(range);
  return absl::OkStatus();
}

void CpuBatch::Leave(const Sequence& sequence) { slots_[sequence.slot] = nullptr; }

absl::Status CpuBatch::Call(Task task, const AttendRequest& r, const Selection& selection,
                            DeviceStream) {
  if (task == Task::kMore) {
    LookOn(r);
    return absl::OkStatus();
  }
  if (r.k_new != nullptr) WriteRows(r);
  PrepareGroups(r);
  if (task == Task::kSelect) {
    VATTN_RETURN_IF_ERROR(Select(r, selection));
    CarryStates();
    return absl::OkStatus();
  }
  if (task == Task::kForecast) {
    Forecast();
    return absl::OkStatus();
  }
  if (task == Task::kDecode) Decode(r);
  if (task == Task::kAttendSelected) AttendSelected(selection);
  CarryStates();
  Account(r);
  return absl::OkStatus();
}

uint64_t CpuBatch::GroupBytes(const Sequence& sequence, int layer) const {
  return ScratchBytes(runtime_.storage(), runtime_.promise(), sequence.tokens_in_step(),
                      query_tokens_ * runtime_.group_heads(layer));
}

void CpuBatch::CarryStates() {
  if (query_tokens_ == 1) return;
  for (size_t i = 0; i < groups_.size(); ++i) {
    std::vector<HeadState>& states = owners_[i].kv_head->states;
    const HeadState* const end = groups_[i].state + groups_[i].group_heads;
    std::copy(end - states.size(), end, states.begin());
  }
}

void CpuBatch::WriteRows(const AttendRequest& r) {
  const Storage& s = runtime_.storage();
  const int kv_heads = runtime_.kv_heads(r.layer), element = ElementBytes(s.row.dtype);
  for (int slot = 0; slot < static_cast<int>(slots_.size()); ++slot) {
    if (slots_[slot] == nullptr) continue;
    const Layer& layer = slots_[slot]->layer(r.layer);
    blocks_.clear();
    for (const KvHead& kv_head : layer.kv_heads) blocks_.push_back(kv_head.blocks.data());
    const auto at = [&](const void* base, int dim) {
      return base == nullptr ? nullptr
                             : static_cast<const std::byte*>(base) +
                                   int64_t{slot} * query_tokens_ * kv_heads * dim * element;
    };
    cpu::Write({.storage = s,
                .blocks = blocks_.data(),
                .kv_heads = kv_heads,
                .first = layer.tokens,
                .count = slots_[slot]->tokens_in_step() - layer.tokens,
                .k = at(r.k_new, s.row.dim_k),
                .v = at(r.v_new, s.row.dim_v),
                .k_token_stride = int64_t{kv_heads} * s.row.dim_k,
                .k_head_stride = s.row.dim_k,
                .v_token_stride = int64_t{kv_heads} * s.row.dim_v,
                .v_head_stride = s.row.dim_v},
               nullptr);
  }
}

void CpuBatch::PrepareGroups(const AttendRequest& r) {
  const int kv_heads = runtime_.kv_heads(r.layer);
  groups_.clear();
  owners_.clear();
  std::byte* memory = scratch_.data();
  for (int slot = 0; slot < static_cast<int>(slots_.size()); ++slot) {
    Sequence* const sequence = slots_[slot];
    if (sequence == nullptr) continue;
    for (int h = 0; h < kv_heads; ++h) {
      groups_.push_back(MakeGroup(r, slot, h, memory));
      memory += GroupBytes(*sequence, r.layer);
      owners_.push_back(
          {sequence, &sequence->layer(r.layer).kv_heads[h], int64_t{slot} * kv_heads + h});
    }
  }
}

Group CpuBatch::MakeGroup(const AttendRequest& r, int slot, int h, std::byte* memory) {
  const Options& o = runtime_.options();
  const Storage& s = runtime_.storage();
  const int kv_heads = runtime_.kv_heads(r.layer), group_heads = runtime_.group_heads(r.layer);
  const int element = ElementBytes(s.row.dtype);
  Sequence& sequence = *slots_[slot];
  KvHead& kv_head = sequence.layer(r.layer).kv_heads[h];
  const int64_t tokens = sequence.tokens_in_step();
  // Of the group's first head among those of the arrays.
  const int64_t head = int64_t{slot} * query_tokens_ * o.num_q_heads + int64_t{h} * group_heads;
  Group group;
  group.blocks = kv_head.blocks.data();
  group.tokens = tokens;
  group.middle_begin = sequence.middle_begin_in_step();
  group.middle_end = sequence.middle_end_in_step();
  group.group_heads = query_tokens_ * group_heads;
  group.num_tokens = query_tokens_;
  group.token_stride = o.num_q_heads;
  group.segments = kv_head.segments.data();
  group.num_segments = static_cast<int32_t>(kv_head.segments.size());
  if (group.num_segments > 0) group.index = kv_head.segments[0].tables;
  group.state = kv_head.states.data();
  // Its heads in arrays where those of all query tokens of a KV head lie together.
  const int64_t together =
      query_tokens_ * (int64_t{slot} * o.num_q_heads + int64_t{h} * group_heads);
  if (query_tokens_ > 1) {
    // Each query token starts from where the last one of the step before has left the controller.
    group.state = states_.data() + together;
    for (int t = 0; t < query_tokens_; ++t)
      std::copy_n(kv_head.states.cbegin(), group_heads, group.state + t * group_heads);
  }
  group.key =
      MakeRandomKey(o.seed, sequence.id(), static_cast<uint32_t>(r.layer), KvHeadOfModel(o, h));
  group.step = sequence.step();
  group.q = static_cast<const std::byte*>(r.q) + head * s.row.dim_k * element;
  PointTo(r, head, group);
  if (r.partial != nullptr) {
    RankStep& slice = slices_[groups_.size()];
    slice = {.rank = r.rank, .ranks = r.ranks};
    group.slice = &slice;
    group.partial = r.partial + head * PartialFloats(s.row.dim_v);
  }
  if (r.scores != nullptr) {
    const bool apart = r.score_heads == o.num_q_heads;
    const void** const rows = score_rows_.data() + together;
    for (int i = 0; i < group.group_heads; ++i) {
      const int64_t token = int64_t{slot} * query_tokens_ + i / group_heads;
      const int64_t row =
          apart ? token * o.num_q_heads + h * group_heads + i % group_heads : token * kv_heads + h;
      rows[i] = static_cast<const std::byte*>(r.scores) +
                row * r.scores_stride * ElementBytes(static_cast<DType>(r.scores_dtype));
    }
    group.external = rows;
    group.external_dtype = static_cast<DType>(r.scores_dtype);
  }
  group.scratch = CarveScratch(s, runtime_.promise(), tokens, group.group_heads, memory);
  return group;
}

void CpuBatch::PointTo(const AttendRequest& r, int64_t head, Group& group) {
  const RowLayout& row = runtime_.storage().row;
  group.out_dtype = r.out_dtype;
  if (r.out != nullptr) {
    group.out = static_cast<std::byte*>(r.out) +
                head * row.dim_v * ElementBytes(static_cast<DType>(r.out_dtype));
  }
  group.lse = r.lse != nullptr ? r.lse + head : nullptr;
  Verdict* const verdicts = reinterpret_cast<Verdict*>(r.verdict);  // same values, both 32 bits
  group.verdict = (verdicts != nullptr ? verdicts : verdicts_.data()) + head;
  group.error = (r.error != nullptr ? r.error : errors_.data()) + head;
}

void CpuBatch::Forecast() {
  cpu::Forecast({.storage = runtime_.storage(),
                 .promise = runtime_.promise(),
                 .groups = groups_.data(),
                 .num_groups = static_cast<int32_t>(groups_.size())},
                runtime_.workers());
  // The calls that follow do not have the queries.
  for (size_t i = 0; i < groups_.size(); ++i) {
    if (RecentPlace(groups_[i].step) >= 0) KeepQueries(groups_[i], *owners_[i].kv_head);
  }
}

void CpuBatch::LookOn(const AttendRequest& r) {
  const int64_t floats = PartialFloats(runtime_.storage().row.dim_v);
  const int q_heads = runtime_.options().num_q_heads, kv_heads = runtime_.kv_heads(r.layer);
  for (size_t i = 0; i < groups_.size(); ++i) {
    Group& group = groups_[i];
    const int64_t slot = owners_[i].place / kv_heads, kv_head = owners_[i].place % kv_heads,
                  head = slot * q_heads + kv_head * group.group_heads;
    PointTo(r, head, group);
    group.partial = r.partial + head * floats;
    group.gathered = r.gathered + head * floats;
    group.gathered_stride = static_cast<int64_t>(slots_.size()) * q_heads * floats;
  }
  cpu::LookOn({.storage = runtime_.storage(),
               .promise = runtime_.promise(),
               .groups = groups_.data(),
               .num_groups = static_cast<int32_t>(groups_.size())},
              runtime_.workers());
  const int64_t open = std::count_if(groups_.begin(), groups_.end(), [](const Group& group) {
    return group.slice->next != NextLook::kDone;
  });
  if (r.again != nullptr) *r.again = static_cast<int32_t>(open);
  if (open == 0) Account(r);
}

void CpuBatch::Decode(const AttendRequest& r) {
  Promise promise = runtime_.promise();
  if (r.dense) promise.policy = Policy::kDense;
  cpu::Decode({.storage = runtime_.storage(),
               .promise = promise,
               .groups = groups_.data(),
               .num_groups = static_cast<int32_t>(groups_.size())},
              runtime_.workers());
}

void CpuBatch::AttendSelected(const Selection& selection) {
  // One array row per group: empty slots have none, so rows are taken by slot and head.
  for (size_t i = 0; i < groups_.size(); ++i) {
    Group& group = groups_[i];
    const int64_t place = owners_[i].place;
    const int32_t* const tokens = selection.tokens + place * selection.capacity;
    cpu::AttendSelected({.storage = runtime_.storage(),
                         .groups = &group,
                         .num_groups = 1,
                         .tokens = tokens,
                         .log_weights = selection.log_weights == nullptr
                                            ? nullptr
                                            : selection.log_weights + place * selection.capacity,
                         .counts = selection.counts + place,
                         .capacity = selection.capacity},
                        runtime_.workers());
    group.selected = 0;
    for (int32_t k = 0; k < selection.counts[place]; ++k) {
      if (tokens[k] >= group.middle_begin && tokens[k] < group.middle_end)
        group.scratch.token[group.selected++] = static_cast<uint32_t>(tokens[k]);
    }
  }
}

absl::Status CpuBatch::Select(const AttendRequest& r, const Selection& selection) {
  // A call that lacks room is made again, and draws the same: from these states of the groups.
  std::vector<HeadState> before;
  for (const Group& group : groups_)
    before.insert(before.end(), group.state, group.state + group.group_heads);
  cpu::Select({.storage = runtime_.storage(),
               .promise = runtime_.promise(),
               .groups = groups_.data(),
               .num_groups = static_cast<int32_t>(groups_.size())},
              runtime_.workers());
  int64_t need = 0;
  for (size_t i = 0; i < groups_.size(); ++i) {
    const Group& group = groups_[i];
    const int64_t place = owners_[i].place, n = group.middle_end - group.middle_begin,
                  count = group.tokens - n + group.selected;
    selection.counts[place] = static_cast<int32_t>(count);
    need = std::max(need, count);
    if (r.selected != nullptr) r.selected[place] = static_cast<int32_t>(group.selected);
    if (r.middle != nullptr) r.middle[place] = n;
    if (count <= selection.capacity) WriteSelection(group, place, selection);
  }
  if (need > selection.capacity) {
    auto from = before.cbegin();
    for (const Group& group : groups_) {
      std::copy_n(from, group.group_heads, group.state);
      from += group.group_heads;
    }
  }
  return CheckCapacity(need, selection);
}

void CpuBatch::WriteSelection(const Group& group, int64_t place, const Selection& selection) const {
  int32_t* tokens = selection.tokens + place * selection.capacity;
  float* weights = selection.log_weights + place * selection.capacity;
  const auto add = [&](int64_t token, float weight) {
    *tokens++ = static_cast<int32_t>(token);
    *weights++ = weight;
  };
  for (int64_t t = 0; t < group.middle_begin; ++t) add(t, 0);
  for (int64_t i = 0; i < group.selected; ++i)
    add(group.scratch.token[i], -std::log(group.scratch.weight[i]));
  for (int64_t t = group.middle_end; t < group.tokens; ++t) add(t, 0);
}

void CpuBatch::KeepQueries(const Group& group, KvHead& kv_head) const {
  const Storage& s = runtime_.storage();
  if (s.code.kind != IndexKind::kBalanced) return;
  // Those of the last query token
  const int heads = group.group_heads / group.num_tokens;
  const int64_t count = int64_t{heads} * s.row.dim_k;
  std::vector<float> queries(static_cast<size_t>(count));
  const uint8_t* row =
      static_cast<const uint8_t*>(group.q) +
      HeadPlace(group, group.group_heads - heads) * s.row.dim_k * ElementBytes(s.row.dtype);
  cpu::LoadRows(
      {.rows = &row, .count = 1, .offset = 0, .dim = static_cast<int>(count), .dtype = s.row.dtype},
      queries.data());
  for (float& x : queries) x *= s.scale;
  kv_head.recent.Add(queries.data(), count);
}

void CpuBatch::Account(const AttendRequest& r) {
  uint64_t verdicts[4] = {};
  uint64_t middle = 0, selected = 0, fetched = 0, looks = 0, noisy = 0;
  for (size_t i = 0; i < groups_.size(); ++i) {
    const Group& group = groups_[i];
    KvHead& kv_head = *owners_[i].kv_head;
    const int64_t place = owners_[i].place, n = group.middle_end - group.middle_begin;
    int64_t misses = group.selected;
    if (runtime_.options().hot_share > 0) {
      kv_head.hot.SetCapacity(HotCapacity(n));
      // A whole reading streams past the hot set.
      misses = group.all_read ? n - kv_head.hot.size()
                              : kv_head.hot.Use(group.scratch.token, group.selected);
    }
    if (r.selected != nullptr) r.selected[place] = static_cast<int32_t>(group.selected);
    if (r.fetched != nullptr) r.fetched[place] = static_cast<int32_t>(misses);
    if (r.looks != nullptr) r.looks[place] = group.looks;
    if (r.middle != nullptr) r.middle[place] = n;
    if (group.slice == nullptr && RecentPlace(group.step) >= 0) KeepQueries(group, kv_head);
    if (group.noisy) noisy += static_cast<uint64_t>(group.group_heads);
    for (int g = 0; g < group.group_heads; ++g)
      ++verdicts[static_cast<int>(group.verdict[HeadPlace(group, g)])];
    middle += n, selected += group.selected, fetched += misses, looks += group.looks;
  }
  Counters& c = runtime_.counters();
  c.steps += groups_.size() / static_cast<size_t>(runtime_.kv_heads(r.layer));
  c.heads_exact += verdicts[0], c.heads_verified += verdicts[1];
  c.heads_dense += verdicts[2], c.heads_best_effort += verdicts[3];
  c.heads_noisy += noisy;
  c.rows_middle += middle, c.rows_selected += selected, c.rows_fetched += fetched;
  c.bytes_fetched += fetched * static_cast<uint64_t>(runtime_.storage().row.row_bytes);
  c.looks += looks;
}

}  // namespace vattn
