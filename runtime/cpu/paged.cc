#include "runtime/cpu/paged.h"

#include <algorithm>
#include <map>

#include "kernels/cpu/decode.h"
#include "kernels/cpu/write.h"
#include "memory/status.h"
#include "runtime/runtime.h"

namespace vattn {

absl::StatusOr<std::unique_ptr<CpuPaged>> CpuPaged::Create(Runtime& runtime,
                                                           const PagedPool& pool) {
  std::unique_ptr<CpuPaged> paged(new CpuPaged(runtime, pool));
  VATTN_RETURN_IF_ERROR(paged->Allocate());
  return paged;
}

absl::Status CpuPaged::Allocate() {
  const PagedOptions& p = pool_.options;
  const int layers = runtime_.options().num_layers;
  layers_ = pool_.layers;
  tables_.resize(static_cast<size_t>(layers));
  rows_.resize(static_cast<size_t>(p.max_requests));
  states_.resize(static_cast<size_t>(layers) * p.max_requests);
  for (int l = 0; l < layers; ++l) {
    if (runtime_.kv_heads(l) == 0) continue;
    for (int row = 0; row < p.max_requests; ++row)
      StatesOf(l, row).resize(static_cast<size_t>(runtime_.options().num_q_heads));
    if (!pool_.coded()) continue;
    for (const std::shared_ptr<const Index>& index : pool_.tables[l])
      tables_[l].push_back(index->tables());
    if (layers_[l].codes != nullptr) continue;
    absl::StatusOr<VirtualRange> range =
        VirtualRange::Reserve(static_cast<uint64_t>(p.num_blocks * p.code_block_stride),
                              {.ops = runtime_.io().memory_ops});
    if (!range.ok()) return range.status();
    codes_.push_back(*std::move(range));
    layers_[l].codes = codes_.back().data();
  }
  return absl::OkStatus();
}

absl::Status CpuPaged::Write(const PagedRows& r, DeviceStream) {
  uint64_t outliers = 0;
  cpu::WriteSlots({.storage = layers_[r.layer],
                   .kv_heads = runtime_.kv_heads(r.layer),
                   .num_slots = pool_.num_slots(),
                   .index = pool_.coded() ? tables_[r.layer].data() : nullptr,
                   .count = r.num_tokens,
                   .slots = r.slots,
                   .k = r.k,
                   .v = r.v,
                   .k_token_stride = r.k_token_stride,
                   .k_head_stride = r.k_head_stride,
                   .v_token_stride = r.v_token_stride,
                   .v_head_stride = r.v_head_stride,
                   .outliers = &outliers},
                  runtime_.workers());
  runtime_.counters().outliers += outliers;
  return absl::OkStatus();
}

absl::Status CpuPaged::CheckRequest(const PagedStep& s, int i) const {
  const PagedOptions& p = pool_.options;
  const int32_t length = s.lengths[i], queries = s.query_starts[i + 1] - s.query_starts[i],
                row = s.request_rows[i];
  const auto named = [&](const char* array, int64_t at) {
    return absl::StrCat(array, "[", at, "]");
  };
  if (length > p.max_tokens) return OutOfRangeError(named("lengths", i), length, 0, p.max_tokens);
  if (queries > s.max_query_tokens || queries > length) {
    return InvalidArgumentError(
        named("query_starts", i + 1), " is ", s.query_starts[i + 1], ", ", queries,
        " over the one before, must be at most ", std::min(s.max_query_tokens, length),
        " over it: max_query_tokens is ", s.max_query_tokens, " and the length is ", length);
  }
  if (row < 0 || row >= p.max_requests)
    return OutOfRangeError(named("request_rows", i), row, 0, p.max_requests - 1);
  for (int64_t b = 0; b < pool_.BlocksOf(length); ++b) {
    const int64_t at = i * s.block_table_stride + b;
    if (s.block_table[at] < 0 || s.block_table[at] >= p.num_blocks) {
      return OutOfRangeError(absl::StrCat("block_table[", i, "][", b, "]"), s.block_table[at], 0,
                             p.num_blocks - 1);
    }
  }
  return absl::OkStatus();
}

absl::Status CpuPaged::CheckStep(const PagedStep& s) const {
  std::map<int32_t, int> taken;  // rows
  int64_t tokens = 0;
  if (s.num_requests > 0 && s.query_starts[s.num_requests] > s.num_query_tokens) {
    return OutOfRangeError(absl::StrCat("query_starts[", s.num_requests, "]"),
                           s.query_starts[s.num_requests], 0, s.num_query_tokens);
  }
  for (int i = 0; i < s.num_requests; ++i) {
    if (s.query_starts[i + 1] < s.query_starts[i] || s.query_starts[0] != 0) {
      return InvalidArgumentError("query_starts[", i, "] is ", s.query_starts[i],
                                  ", must ascend from 0: the next one is ", s.query_starts[i + 1]);
    }
    if (s.lengths[i] < 0)
      return OutOfRangeError(absl::StrCat("lengths[", i, "]"), s.lengths[i], 0,
                             pool_.options.max_tokens);
    if (s.lengths[i] == 0 || s.query_starts[i + 1] == s.query_starts[i]) continue;
    VATTN_RETURN_IF_ERROR(CheckRequest(s, i));
    tokens += s.lengths[i];
    const auto [at, is_new] = taken.emplace(s.request_rows[i], i);
    if (!is_new) {
      return InvalidArgumentError("request_rows[", i, "] is ", s.request_rows[i],
                                  ", must be another than request_rows[", at->second, "]");
    }
  }
  if (tokens > pool_.options.max_step_tokens) {
    return InvalidArgumentError("lengths add up to ", tokens, ", must be at most ",
                                pool_.options.max_step_tokens, " (max_step_tokens)");
  }
  return absl::OkStatus();
}

uint64_t CpuPaged::GroupBytes(const Request& r, int layer) const {
  return ScratchBytes(layers_[layer], runtime_.promise(), r.length,
                      r.num_queries * runtime_.group_heads(layer));
}

absl::Status CpuPaged::GrowScratch() {
  uint64_t most = 0;
  for (int l = 0; l < runtime_.options().num_layers; ++l) {
    uint64_t bytes = 0;
    for (const Request& r : requests_) {
      if (runtime_.kv_heads(l) > 0)
        bytes += static_cast<uint64_t>(runtime_.kv_heads(l)) * GroupBytes(r, l);
    }
    most = std::max(most, bytes);
  }
  if (most <= scratch_.size()) return absl::OkStatus();
  absl::StatusOr<VirtualRange> range =
      VirtualRange::Reserve(most + most / 8, {.ops = runtime_.io().memory_ops});
  if (!range.ok()) return range.status();
  scratch_ = *std::move(range);
  return absl::OkStatus();
}

absl::Status CpuPaged::BeginStep(const PagedStep& s, DeviceStream) {
  VATTN_RETURN_IF_ERROR(CheckStep(s));
  requests_.clear();
  for (int i = 0; i < s.num_requests; ++i) {
    const int32_t queries = s.query_starts[i + 1] - s.query_starts[i];
    if (s.lengths[i] > 0 && queries > 0)
      requests_.push_back({i, s.request_rows[i], s.lengths[i], s.query_starts[i], queries});
  }
  const int32_t queries = s.num_requests == 0 ? 0 : s.query_starts[s.num_requests];
  const size_t heads = static_cast<size_t>(queries) * runtime_.options().num_q_heads;
  verdicts_.resize(heads);
  errors_.resize(heads);
  work_.resize(heads);
  scores_.resize(heads);
  groups_.reserve(requests_.size() * static_cast<size_t>(runtime_.options().num_q_heads));
  VATTN_RETURN_IF_ERROR(GrowScratch());
  step_ = s;
  for (const Request& r : requests_) {
    Row& row = rows_[r.row];
    if (s.resets != nullptr && s.resets[r.number] != 0) {
      row = {.requests_before = row.requests_before + 1, .step = 0};
      for (int l = 0; l < runtime_.options().num_layers; ++l)
        std::fill(StatesOf(l, r.row).begin(), StatesOf(l, r.row).end(), HeadState());
    }
    ++row.step;
  }
  return absl::OkStatus();
}

Group CpuPaged::MakeGroup(const AttendRequest& r, const Request& of, int h, std::byte* memory,
                          HeadState* states) {
  const Options& o = runtime_.options();
  const Storage& s = layers_[r.layer];
  const int kv_heads = runtime_.kv_heads(r.layer), group_heads = runtime_.group_heads(r.layer);
  const int element = ElementBytes(s.row.dtype),
            out_element = ElementBytes(static_cast<DType>(r.out_dtype));
  const int64_t head = int64_t{of.first_query} * o.num_q_heads + int64_t{h} * group_heads;
  const Middle middle = MiddleOfStep(ExactSetsOf(o), of.length, of.num_queries);
  const Row& row = rows_[of.row];
  Group group;
  group.blocks = step_.block_table + of.number * step_.block_table_stride;
  group.kv_head = h;
  group.tokens = of.length;
  group.middle_begin = middle.begin;
  group.middle_end = middle.end;
  group.group_heads = of.num_queries * group_heads;
  group.num_tokens = of.num_queries;
  group.token_stride = o.num_q_heads;
  group.out_dtype = r.out_dtype;
  if (pool_.coded()) group.index = tables_[r.layer][h];
  // Each query token starts from where the last one of the step before has left the controller.
  group.state = states;
  for (int t = 0; t < of.num_queries; ++t)
    std::copy_n(StatesOf(r.layer, of.row).cbegin() + int64_t{h} * group_heads, group_heads,
                states + t * group_heads);
  group.key = MakeRandomKey(o.seed, RequestId(of.row, row.requests_before),
                            static_cast<uint32_t>(r.layer), KvHeadOfModel(o, h));
  group.step = row.step;
  group.q = static_cast<const std::byte*>(r.q) + head * s.row.dim_k * element;
  group.out = static_cast<std::byte*>(r.out) + head * s.row.dim_v * out_element;
  if (r.lse != nullptr) group.lse = r.lse + head;
  Verdict* const verdicts = reinterpret_cast<Verdict*>(r.verdict);  // same values, both 32 bits
  group.verdict = (verdicts != nullptr ? verdicts : verdicts_.data()) + head;
  group.error = (r.error != nullptr ? r.error : errors_.data()) + head;
  if (r.scores != nullptr) {
    const bool apart = r.score_heads == o.num_q_heads;
    const void** const rows = scores_.data() + (states - work_.data());
    for (int i = 0; i < group.group_heads; ++i) {
      const int64_t token = of.first_query + i / group_heads;
      const int64_t place =
          apart ? token * o.num_q_heads + h * group_heads + i % group_heads : token * kv_heads + h;
      rows[i] = static_cast<const std::byte*>(r.scores) +
                place * r.scores_stride * ElementBytes(static_cast<DType>(r.scores_dtype));
    }
    group.external = rows;
    group.external_dtype = static_cast<DType>(r.scores_dtype);
  }
  group.scratch = CarveScratch(s, runtime_.promise(), of.length, group.group_heads, memory);
  return group;
}

absl::Status CpuPaged::Attend(const AttendRequest& r, DeviceStream) {
  const int kv_heads = runtime_.kv_heads(r.layer), group_heads = runtime_.group_heads(r.layer);
  groups_.clear();
  std::byte* memory = scratch_.data();
  HeadState* states = work_.data();
  for (const Request& of : requests_) {
    for (int h = 0; h < kv_heads; ++h) {
      groups_.push_back(MakeGroup(r, of, h, memory, states));
      memory += GroupBytes(of, r.layer);
      states += groups_.back().group_heads;
    }
  }
  Promise promise = runtime_.promise();
  if (r.dense) promise.policy = Policy::kDense;
  cpu::Decode({.storage = layers_[r.layer],
               .promise = promise,
               .groups = groups_.data(),
               .num_groups = static_cast<int32_t>(groups_.size())},
              runtime_.workers());
  for (size_t i = 0; i < groups_.size(); ++i) {
    const HeadState* const end = groups_[i].state + groups_[i].group_heads;
    const int h = static_cast<int>(i) % kv_heads;
    std::copy(end - group_heads, end,
              StatesOf(r.layer, requests_[i / kv_heads].row).begin() + int64_t{h} * group_heads);
  }
  Account(r);
  return absl::OkStatus();
}

void CpuPaged::Account(const AttendRequest& r) {
  const int kv_heads = runtime_.kv_heads(r.layer);
  uint64_t verdicts[4] = {};
  uint64_t middle = 0, selected = 0, looks = 0, noisy = 0;
  for (size_t i = 0; i < groups_.size(); ++i) {
    const Group& group = groups_[i];
    const int64_t place = int64_t{requests_[i / kv_heads].number} * kv_heads +
                          static_cast<int64_t>(i) % kv_heads,
                  n = group.middle_end - group.middle_begin;
    if (r.selected != nullptr) r.selected[place] = static_cast<int32_t>(group.selected);
    // Every row is where the CPU reads it: there is no hot set.
    if (r.fetched != nullptr) r.fetched[place] = static_cast<int32_t>(group.selected);
    if (r.looks != nullptr) r.looks[place] = group.looks;
    if (r.middle != nullptr) r.middle[place] = n;
    if (group.noisy) noisy += static_cast<uint64_t>(group.group_heads);
    for (int g = 0; g < group.group_heads; ++g)
      ++verdicts[static_cast<int>(group.verdict[HeadPlace(group, g)])];
    middle += n, selected += group.selected, looks += group.looks;
  }
  Counters& c = runtime_.counters();
  c.steps += requests_.size();
  c.heads_exact += verdicts[0], c.heads_verified += verdicts[1];
  c.heads_dense += verdicts[2], c.heads_best_effort += verdicts[3];
  c.heads_noisy += noisy;
  c.rows_middle += middle, c.rows_selected += selected, c.rows_fetched += selected;
  c.bytes_fetched += selected * static_cast<uint64_t>(runtime_.storage().row.row_bytes);
  c.looks += looks;
}

absl::Status CpuPaged::Prefill(int, const PrefillParams& params) {
  return runtime_.backend().Prefill(params, runtime_.workers());
}

}  // namespace vattn
