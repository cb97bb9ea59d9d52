#include "runtime/cuda/paged.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "memory/status.h"
#include "memory/virtual_range.h"
#include "runtime/runtime.h"

namespace vattn {
namespace {

constexpr int kMostLayers = 256;  // what the kernel that fits requests counts for
constexpr int kMostTeam = 16;     // thread blocks of a team, as working memory is carved for

}  // namespace

template <class T>
void CudaPaged::Staging::Add(T*& array, int64_t bytes, bool out) {
  if (array == nullptr || bytes == 0) return;
  // Memory that was pinned ends with a page, and an array may begin in it and end behind.
  const std::byte* const first = reinterpret_cast<const std::byte*>(array);
  if (device_->CanFollow(first) && device_->CanFollow(first + bytes - 1)) return;
  void* const place = const_cast<void*>(static_cast<const void*>(&array));
  items_.push_back({static_cast<void**>(place), const_cast<void*>(static_cast<const void*>(array)),
                    bytes, used_, out});
  used_ += (bytes + 255) / 256 * 256;
}

absl::Status CudaPaged::Staging::Send(DeviceStream stream) {
  if (empty()) return absl::OkStatus();
  // By way of pinned memory: no copy may cross the end of memory that is pinned.
  absl::StatusOr<DeviceMemory> memory = device_->AllocatePinned(static_cast<uint64_t>(used_));
  if (!memory.ok()) return memory.status();
  pinned_ = *std::move(memory);
  memory = device_->Allocate(static_cast<uint64_t>(used_));
  if (!memory.ok()) return memory.status();
  memory_ = *std::move(memory);
  // What is to come back goes there too: a call may leave parts as they are.
  for (const Item& item : items_) {
    std::memcpy(pinned_.data() + item.offset, item.host, static_cast<size_t>(item.bytes));
    *item.array = memory_.data() + item.offset;
  }
  return device_->Copy(memory_.data(), pinned_.data(), static_cast<uint64_t>(used_), stream);
}

absl::Status CudaPaged::Staging::Receive(DeviceStream stream) {
  VATTN_RETURN_IF_ERROR(
      device_->Copy(pinned_.data(), memory_.data(), static_cast<uint64_t>(used_), stream));
  VATTN_RETURN_IF_ERROR(device_->Synchronize(stream));
  for (const Item& item : items_) {
    if (item.out)
      std::memcpy(item.host, pinned_.data() + item.offset, static_cast<size_t>(item.bytes));
  }
  return absl::OkStatus();
}

CudaPaged::CudaPaged(Runtime& runtime, const PagedPool& pool)
    : runtime_(runtime),
      backend_(*runtime.cuda()),
      pool_(pool),
      step_arrays_(runtime.cuda()->device()) {}

CudaPaged::~CudaPaged() {
  // Nothing that is enqueued may outlive its memory.
  Device& d = backend_.device();
  if (d.Activate().ok()) d.SynchronizeAll().IgnoreError();
  for (const Range& range : mapped_) d.Unregister(range.first, range.second);
}

absl::StatusOr<std::unique_ptr<CudaPaged>> CudaPaged::Create(Runtime& runtime,
                                                             const PagedPool& pool) {
  std::unique_ptr<CudaPaged> paged(new CudaPaged(runtime, pool));
  VATTN_RETURN_IF_ERROR(paged->backend_.device().Activate());
  VATTN_RETURN_IF_ERROR(paged->CheckAlignment());
  VATTN_RETURN_IF_ERROR(paged->MapPool());
  VATTN_RETURN_IF_ERROR(paged->AllocateHotSet());
  VATTN_RETURN_IF_ERROR(paged->AllocateLayers());
  VATTN_RETURN_IF_ERROR(paged->AllocateSteps());
  Device& d = paged->backend_.device();
  VATTN_RETURN_IF_ERROR(d.Synchronize(d.stream()));
  return paged;
}

absl::Status CudaPaged::CheckAlignment() const {
  const PagedOptions& p = pool_.options;
  if (runtime_.options().num_layers > kMostLayers) {
    return NotSupportedError("num_layers is ", runtime_.options().num_layers,
                             ", vattn_paged on CUDA has at most ", kMostLayers);
  }
  const int element = ElementBytes(runtime_.storage().row.dtype), unit = 16 / element;
  for (const auto& [name, stride] :
       {std::pair{"block_stride", p.block_stride}, std::pair{"token_stride", p.token_stride},
        std::pair{"head_stride", p.head_stride}}) {
    if (stride % unit != 0)
      return InvalidArgumentError(name, " is ", stride, ", must be a multiple of ", unit,
                                  " on CUDA: 16 bytes");
  }
  const auto aligned = [&](const char* name, const std::vector<void*>& list) {
    for (size_t l = 0; l < list.size(); ++l) {
      if (reinterpret_cast<uintptr_t>(list[l]) % 16 != 0)
        return InvalidArgumentError(name, "[", l, "] is no multiple of 16, must be on CUDA");
    }
    return absl::OkStatus();
  };
  VATTN_RETURN_IF_ERROR(aligned("k", p.k));
  VATTN_RETURN_IF_ERROR(aligned("v", p.v));
  VATTN_RETURN_IF_ERROR(aligned("codes", p.codes));
  for (size_t l = 0; l < p.codes.size(); ++l) {
    if (p.codes[l] != nullptr && !backend_.IsOnDevice(p.codes[l]))
      return InvalidArgumentError("codes[", l, "] is plain host memory, must be the device's");
  }
  for (size_t l = 0; p.pinned && l < p.k.size(); ++l) {
    if (p.k[l] != nullptr && !backend_.IsOnDevice(p.k[l]))
      return InvalidArgumentError("pinned is 1, and k[", l, "] is not page-locked, must be");
  }
  return absl::OkStatus();
}

absl::Status CudaPaged::MapPool() {
  const PagedOptions& p = pool_.options;
  if (p.pinned) return absl::OkStatus();
  const RowLayout& row = runtime_.storage().row;
  const int64_t element = ElementBytes(row.dtype);
  const uintptr_t page = static_cast<uintptr_t>(PageBytes());
  std::vector<std::pair<uintptr_t, uintptr_t>> spans;
  const auto add = [&](void* base, int layer, int dim) {
    const Storage& s = pool_.layers[layer];
    const int64_t bytes = (p.num_blocks - 1) * s.block.bytes +
                          (p.block_tokens - 1) * s.block.token_bytes +
                          (runtime_.kv_heads(layer) - 1) * s.block.head_bytes + dim * element;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(base);
    spans.emplace_back(begin, begin + static_cast<uintptr_t>(bytes));
  };
  for (int l = 0; l < runtime_.options().num_layers; ++l) {
    if (runtime_.kv_heads(l) == 0) continue;
    add(p.k[l], l, row.dim_k);
    if (!row.shared_kv) add(p.v[l], l, row.dim_v);
  }
  std::sort(spans.begin(), spans.end());
  for (size_t i = 0; i < spans.size();) {
    uintptr_t end = spans[i].second;
    size_t next = i + 1;
    // A page is pinned once.
    for (; next < spans.size() && spans[next].first / page <= (end - 1) / page; ++next)
      end = std::max(end, spans[next].second);
    std::byte* const base = reinterpret_cast<std::byte*>(spans[i].first);
    absl::StatusOr<std::byte*> there = backend_.device().Register(base, end - spans[i].first, 1);
    mapped_.emplace_back(base, end - spans[i].first);
    if (!there.ok()) return there.status();
    if (*there != base) return NotSupportedError("this device maps host memory at other addresses");
    i = next;
  }
  return absl::OkStatus();
}

template <class T>
absl::Status CudaPaged::Keep(int64_t count, T** at) {
  Device& d = backend_.device();
  const uint64_t bytes = static_cast<uint64_t>(count) * sizeof(T);
  absl::StatusOr<DeviceMemory> memory = d.Allocate(bytes);
  if (!memory.ok()) return memory.status();
  kept_.push_back(*std::move(memory));
  *at = kept_.back().as<T>();
  return bytes == 0 ? absl::OkStatus() : d.Fill(kept_.back().data(), 0, bytes, d.stream());
}

absl::Status CudaPaged::AllocateHotSet() {
  Device& d = backend_.device();
  const int64_t row_bytes = runtime_.storage().row.row_bytes;
  const int64_t slots = static_cast<int64_t>(std::min<uint64_t>(
      pool_.options.hot_bytes / static_cast<uint64_t>(row_bytes), INT32_MAX / 2));
  int64_t keys = 0;
  for (int l = 0; l < runtime_.options().num_layers; ++l)
    keys += runtime_.kv_heads(l) * pool_.num_slots();
  hot_.slots = static_cast<int32_t>(slots);
  VATTN_RETURN_IF_ERROR(Keep(slots * row_bytes, &hot_.rows));
  VATTN_RETURN_IF_ERROR(Keep(slots, &hot_.owner));
  VATTN_RETURN_IF_ERROR(Keep(slots, &hot_.use));
  VATTN_RETURN_IF_ERROR(Keep(1, &hot_.hand));
  VATTN_RETURN_IF_ERROR(Keep(1, &hot_.call));
  VATTN_RETURN_IF_ERROR(Keep(slots > 0 ? keys : 0, &hot_.slot_of));
  if (slots == 0) return absl::OkStatus();
  VATTN_RETURN_IF_ERROR(d.Fill(hot_.owner, 0xff, static_cast<uint64_t>(slots) * 8, d.stream()));
  return d.Fill(hot_.slot_of, 0xff, static_cast<uint64_t>(keys) * 4, d.stream());
}

absl::Status CudaPaged::SendTables(int layer, cuda::PagedLayer& to) {
  Device& d = backend_.device();
  std::vector<IndexTables> tables;
  for (const std::shared_ptr<const Index>& index : pool_.tables[layer]) {
    float* floats = nullptr;
    VATTN_RETURN_IF_ERROR(Keep(static_cast<int64_t>(index->floats().size()), &floats));
    VATTN_RETURN_IF_ERROR(
        d.Copy(floats, index->floats().data(), static_cast<uint64_t>(index->bytes()), d.stream()));
    tables.push_back(index->TablesAt(floats));
  }
  IndexTables* there = nullptr;
  VATTN_RETURN_IF_ERROR(Keep(static_cast<int64_t>(tables.size()), &there));
  to.index = there;
  return d.Copy(there, tables.data(), tables.size() * sizeof(IndexTables), d.stream());
}

absl::Status CudaPaged::AllocateLayers() {
  const PagedOptions& p = pool_.options;
  const RowLayout& row = runtime_.storage().row;
  const int element = ElementBytes(row.dtype);
  const int used = (row.shared_kv ? row.dim_k : row.dim_k + row.dim_v) * element;
  int64_t hot_key = 0;
  for (int l = 0; l < runtime_.options().num_layers; ++l) {
    cuda::DeviceStorage s = backend_.storage();
    cuda::PagedLayer layer;
    layer.kv_heads = runtime_.kv_heads(l);
    if (layer.kv_heads > 0) {
      layer.group_heads = runtime_.group_heads(l);
      s.host = pool_.layers[l];
      s.host.row = row;  // as rows lie on the device
      s.pool_v_offset = pool_.layers[l].row.v_offset;
      s.split = s.pool_v_offset != row.v_offset || used != row.row_bytes;
      s.code_block_bytes = p.code_block_stride;
      s.codes = s.host.codes;
      if (pool_.coded() && s.codes == nullptr)
        VATTN_RETURN_IF_ERROR(Keep(p.num_blocks * p.code_block_stride, &s.codes));
      if (pool_.coded()) VATTN_RETURN_IF_ERROR(SendTables(l, layer));
      const int64_t groups = int64_t{p.max_requests} * layer.kv_heads,
                    fixed = groups * (s.sinks + s.ring_tokens);
      uint32_t* writes = nullptr;
      VATTN_RETURN_IF_ERROR(Keep(groups * layer.group_heads, &layer.states));
      VATTN_RETURN_IF_ERROR(Keep(fixed * row.row_bytes, &layer.fixed));
      VATTN_RETURN_IF_ERROR(Keep(fixed, &layer.fixed_tag));
      VATTN_RETURN_IF_ERROR(Keep(pool_.num_slots(), &writes));
      VATTN_RETURN_IF_ERROR(Keep(1, &layer.header));
      VATTN_RETURN_IF_ERROR(Keep(groups, &layer.groups));
      layer.writes = writes;
      layer.hot_key = hot_key;
      hot_key += layer.kv_heads * pool_.num_slots();
    }
    storages_.push_back(s);
    layers_.push_back(layer);
  }
  VATTN_RETURN_IF_ERROR(Keep(static_cast<int64_t>(layers_.size()), &device_layers_));
  Device& d = backend_.device();
  return d.Copy(device_layers_, layers_.data(), layers_.size() * sizeof(cuda::PagedLayer),
                d.stream());
}

uint64_t CudaPaged::ScratchBytes(int l) const {
  // The working memory of a request grows ever more slowly with its tokens, so that requests alike take
  // the most. Rounding up adds less than a block and some bytes for each array.
  const PagedOptions& p = pool_.options;
  constexpr uint64_t kRounding = 64 * 256 * 2;
  const int64_t each = (p.max_step_tokens + p.max_requests - 1) / p.max_requests + 2 * kBlockTokens;
  cuda::GroupScratch none;
  const uint64_t bytes =
      cuda::CarveScratch(storages_[l].host, backend_.promise(), each,
                         p.max_query_tokens * runtime_.group_heads(l), kMostTeam, nullptr, none) +
      kRounding;
  return bytes * static_cast<uint64_t>(p.max_requests) *
         static_cast<uint64_t>(runtime_.kv_heads(l));
}

absl::Status CudaPaged::AllocateSteps() {
  const PagedOptions& p = pool_.options;
  uint64_t scratch = 0;
  int first = -1;
  for (int l = 0; l < runtime_.options().num_layers; ++l) {
    if (runtime_.kv_heads(l) == 0) continue;
    if (first < 0) first = l;
    scratch = std::max(scratch, ScratchBytes(l));
    step_.num_requests = p.max_requests;
    for (const int tokens : {1, p.max_query_tokens}) {
      step_.num_tokens = tokens;
      if (ShapeOf(l).team > 0) continue;
      return NotSupportedError("max_query_tokens is ", p.max_query_tokens, ": rows of ",
                               runtime_.storage().row.row_bytes,
                               " bytes leave the shared memory of this device no room for ",
                               tokens * runtime_.group_heads(l), " query heads per KV head");
    }
  }
  if (first >= 0) step_.storage = storages_[first];
  step_.promise = backend_.promise();
  step_.sets = ExactSetsOf(runtime_.options());
  step_.seed = runtime_.options().seed;
  step_.first_kv_head = KvHeadOfModel(runtime_.options(), 0);
  step_.num_layers = runtime_.options().num_layers;
  step_.layers = device_layers_;
  step_.num_blocks = p.num_blocks;
  step_.max_tokens = p.max_tokens;
  step_.max_step_tokens = p.max_step_tokens;
  step_.max_requests = p.max_requests;
  step_.counters = backend_.counters();
  step_.scratch_bytes = static_cast<int64_t>(scratch);
  VATTN_RETURN_IF_ERROR(Keep(p.max_requests, &step_.rows));
  VATTN_RETURN_IF_ERROR(Keep(p.max_requests, &step_.verdicts));
  return Keep(step_.scratch_bytes, &step_.scratch);
}

const cuda::AnswerShape& CudaPaged::ShapeOf(int l) {
  const int heads = step_.num_tokens * runtime_.group_heads(l),
            groups = std::max(step_.num_requests, 1) * runtime_.kv_heads(l);
  const auto [at, is_new] = shapes_.try_emplace({heads, groups});
  if (is_new) at->second = cuda::ShapeAnswer(storages_[l], heads, groups);
  return at->second;
}

absl::Status CudaPaged::Write(const PagedRows& r, DeviceStream stream) {
  Device& d = backend_.device();
  VATTN_RETURN_IF_ERROR(d.Activate());
  const DeviceStream used = stream != nullptr ? stream : d.stream();
  const RowLayout& row = runtime_.storage().row;
  const cuda::PagedLayer& layer = layers_[r.layer];
  PagedRows rows = r;
  Staging staging(d);
  const int64_t element = ElementBytes(row.dtype), last = r.num_tokens - 1;
  staging.Add(rows.slots, r.num_tokens * int64_t{sizeof(int64_t)}, false);
  staging.Add(
      rows.k,
      (last * r.k_token_stride + (layer.kv_heads - 1) * r.k_head_stride + row.dim_k) * element,
      false);
  staging.Add(
      rows.v,
      (last * r.v_token_stride + (layer.kv_heads - 1) * r.v_head_stride + row.dim_v) * element,
      false);
  VATTN_RETURN_IF_ERROR(staging.Send(used));
  WriteSlotsParams p{.storage = storages_[r.layer].host,
                     .kv_heads = layer.kv_heads,
                     .num_slots = pool_.num_slots(),
                     .index = layer.index,
                     .count = rows.num_tokens,
                     .slots = rows.slots,
                     .k = rows.k,
                     .v = rows.v,
                     .k_token_stride = rows.k_token_stride,
                     .k_head_stride = rows.k_head_stride,
                     .v_token_stride = rows.v_token_stride,
                     .v_head_stride = rows.v_head_stride};
  p.outliers = reinterpret_cast<uint64_t*>(&backend_.counters()->outliers);
  VATTN_RETURN_IF_ERROR(d.Check(cuda::WriteSlots(storages_[r.layer], p, hot_, layer.hot_key,
                                                 const_cast<uint32_t*>(layer.writes), {used}),
                                "writing rows"));
  if (layer.index != nullptr)
    VATTN_RETURN_IF_ERROR(d.Check(cuda::EncodeSlots(storages_[r.layer], p, {used}), "coding rows"));
  return !staging.empty() || stream == nullptr ? d.Synchronize(used) : absl::OkStatus();
}

absl::Status CudaPaged::BeginStep(const PagedStep& s, DeviceStream stream) {
  Device& d = backend_.device();
  VATTN_RETURN_IF_ERROR(d.Activate());
  const DeviceStream used = stream != nullptr ? stream : d.stream();
  PagedStep step = s;
  step_arrays_ = Staging(d);
  if (s.num_requests > 0) {
    const int64_t n = s.num_requests, word = sizeof(int32_t);
    step_arrays_.Add(
        step.block_table,
        ((n - 1) * s.block_table_stride + pool_.BlocksOf(pool_.options.max_tokens)) * word, false);
    step_arrays_.Add(step.lengths, n * word, false);
    step_arrays_.Add(step.query_starts, (n + 1) * word, false);
    step_arrays_.Add(step.request_rows, n * word, false);
    step_arrays_.Add(step.resets, n * word, false);
    VATTN_RETURN_IF_ERROR(step_arrays_.Send(used));
  }
  step_.num_requests = step.num_requests;
  step_.num_tokens = step.max_query_tokens;
  step_.num_query_tokens = step.num_query_tokens;
  step_.block_table = step.block_table;
  step_.block_table_stride = step.block_table_stride;
  step_.lengths = step.lengths;
  step_.query_starts = step.query_starts;
  step_.request_rows = step.request_rows;
  step_.resets = step.resets;
  VATTN_RETURN_IF_ERROR(d.Check(cuda::BeginPagedStep(step_, {used}), "beginning a step"));
  return !step_arrays_.empty() || stream == nullptr ? d.Synchronize(used) : absl::OkStatus();
}

absl::Status CudaPaged::Attend(const AttendRequest& r, DeviceStream stream) {
  Device& d = backend_.device();
  VATTN_RETURN_IF_ERROR(d.Activate());
  const DeviceStream used = stream != nullptr ? stream : d.stream();
  const cuda::PagedLayer& layer = layers_[r.layer];
  const RowLayout& row = runtime_.storage().row;
  AttendRequest request = r;
  Staging staging(d);
  const int64_t heads = step_.num_query_tokens * runtime_.options().num_q_heads,
                groups = int64_t{step_.num_requests} * layer.kv_heads, word = 4;
  staging.Add(request.q, heads * row.dim_k * ElementBytes(row.dtype), false);
  const int64_t score_heads = r.score_heads == 0 ? layer.kv_heads : r.score_heads;
  staging.Add(request.scores,
              step_.num_query_tokens * score_heads * r.scores_stride *
                  ElementBytes(static_cast<DType>(r.scores_dtype)),
              false);
  staging.Add(request.out, heads * row.dim_v * ElementBytes(static_cast<DType>(r.out_dtype)), true);
  staging.Add(request.lse, heads * word, true);
  staging.Add(request.verdict, heads * word, true);
  staging.Add(request.error, heads * word, true);
  staging.Add(request.selected, groups * word, true);
  staging.Add(request.fetched, groups * word, true);
  staging.Add(request.looks, groups * word, true);
  staging.Add(request.middle, groups * 2 * word, true);
  staging.Add(request.timeline, cuda::kTimelinePoints * 2 * word, true);
  VATTN_RETURN_IF_ERROR(staging.Send(used));
  cuda::StepParams p;
  p.storage = storages_[r.layer];
  p.promise = backend_.promise();
  if (r.dense) p.promise.policy = Policy::kDense;
  p.hot = hot_;
  p.header = layer.header;
  p.groups = layer.groups;
  p.counters = backend_.counters();
  p.most_groups = step_.num_requests * layer.kv_heads;
  p.kv_heads = layer.kv_heads;
  p.group_heads = step_.num_tokens * layer.group_heads;
  p.num_tokens = step_.num_tokens;
  p.paged = true;
  p.call = {.q = request.q,
            .out = request.out,
            .lse = request.lse,
            .verdict = request.verdict,
            .error = request.error,
            .selected = request.selected,
            .fetched = request.fetched,
            .looks = request.looks,
            .middle = request.middle,
            .timeline = request.timeline,
            .out_dtype = request.out_dtype,
            .score_heads = request.score_heads == 0 ? layer.kv_heads : request.score_heads,
            .scores_dtype = request.scores_dtype,
            .scores = request.scores,
            .scores_stride = request.scores_stride};
  VATTN_RETURN_IF_ERROR(
      d.Check(cuda::Decode(p, ShapeOf(r.layer), d.facts().multiprocessors, {used}),
              "enqueueing attention"));
  runtime_.counters().steps += static_cast<uint64_t>(step_.num_requests);
  if (!staging.empty()) return staging.Receive(used);
  return stream == nullptr ? d.Synchronize(used) : absl::OkStatus();
}

absl::Status CudaPaged::Prefill(int layer, const PrefillParams& params) {
  Device& d = backend_.device();
  VATTN_RETURN_IF_ERROR(d.Activate());
  const uint64_t bytes =
      static_cast<uint64_t>(pool_.BlocksOf(params.first + params.count)) * sizeof(int32_t);
  absl::StatusOr<DeviceMemory> ids = d.Allocate(bytes);
  if (!ids.ok()) return ids.status();
  VATTN_RETURN_IF_ERROR(d.Copy(ids->data(), params.blocks[0], bytes, d.copy_stream()));
  const auto fetch = [&](int64_t begin, int64_t tokens, std::byte* to, int64_t stride,
                         DeviceStream stream) {
    return d.Check(cuda::FetchRows(storages_[layer], ids->as<int32_t>(), params.kv_heads, begin,
                                   tokens, to, stride, {stream}),
                   "fetching a prompt's rows");
  };
  PrefillParams there = params;
  there.storage = storages_[layer].host;  // rows as they lie once they are fetched
  return backend_.PrefillBy(there, fetch);
}

}  // namespace vattn
