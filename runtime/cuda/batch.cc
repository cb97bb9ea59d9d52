#include "runtime/cuda/batch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "memory/status.h"
#include "runtime/cuda/sequence_half.h"
#include "runtime/sequence.h"

namespace vattn {
namespace {

// Pages of slot_of_ about free blocks alone from which on the hot set is emptied for them.
constexpr int64_t kLeastIdlePages = 4;
// Working memory grows in steps of this many tokens, so that few steps allocate.
constexpr int64_t kScratchTokens = 4096;

int64_t RoundUp(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

}  // namespace

CudaBatch::CudaBatch(Runtime& runtime, int slots)
    : runtime_(runtime), backend_(*runtime.cuda()), id_(backend_.NextBatch()), slots_(slots) {}

CudaBatch::~CudaBatch() {
  // Nothing that is enqueued may outlive its tables.
  if (backend_.device().Activate().ok()) backend_.device().SynchronizeAll().IgnoreError();
}

absl::StatusOr<std::unique_ptr<CudaBatch>> CudaBatch::Create(Runtime& runtime, int slots) {
  std::unique_ptr<CudaBatch> batch(new CudaBatch(runtime, slots));
  VATTN_RETURN_IF_ERROR(batch->Allocate());
  return batch;
}

absl::Status CudaBatch::Allocate() {
  Device& d = backend_.device();
  const Options& o = runtime_.options();
  const int64_t row_bytes = runtime_.storage().row.row_bytes,
                tokens = backend_.num_blocks() * kBlockTokens;
  VATTN_RETURN_IF_ERROR(d.Activate());
  for (int l = 0; l < o.num_layers; ++l) {
    first_group_.push_back(most_groups_);
    most_groups_ += int64_t{slots_} * runtime_.kv_heads(l);
    cuda::AnswerShape shape, wide;
    if (runtime_.kv_heads(l) > 0) {
      const int groups = slots_ * runtime_.kv_heads(l);
      shape = cuda::ShapeAnswer(backend_.storage(), runtime_.group_heads(l), groups);
      wide = cuda::ShapeAnswer(backend_.storage(), cuda::kMaxDeviceGroup, groups);
    }
    if (runtime_.kv_heads(l) > 0 && shape.team == 0) {
      return NotSupportedError("rows of ", row_bytes,
                               " bytes do not fit the shared memory of device ", d.ordinal(), " (",
                               d.facts().name, ")");
    }
    answer_.push_back(shape);
    answer_wide_.push_back(wide);
  }
  const uint64_t table_bytes = static_cast<uint64_t>(o.num_layers) * sizeof(cuda::StepHeader) +
                               static_cast<uint64_t>(most_groups_) * sizeof(cuda::DeviceGroup);
  absl::StatusOr<DeviceMemory> memory = d.Allocate(table_bytes);
  if (!memory.ok()) return memory.status();
  tables_ = *std::move(memory);
  for (DeviceMemory& pinned : pinned_) {
    memory = d.AllocatePinned(table_bytes);
    if (!memory.ok()) return memory.status();
    pinned = *std::move(memory);
  }
  hot_.slots = static_cast<int32_t>(std::min<double>(
      std::floor(static_cast<double>(o.hot_share) * static_cast<double>(tokens)), INT32_MAX / 2));
  const int64_t slots = hot_.slots;
  memory = d.Allocate(static_cast<uint64_t>(slots * row_bytes));
  if (!memory.ok()) return memory.status();
  hot_rows_ = *std::move(memory);
  // owner [slots], use [slots], the clock's hand and the count of calls.
  memory = d.Allocate(static_cast<uint64_t>(slots * 16 + 16));
  if (!memory.ok()) return memory.status();
  hot_tables_ = *std::move(memory);
  hot_.rows = hot_rows_.data();
  hot_.owner = hot_tables_.as<int64_t>();
  hot_.use = reinterpret_cast<unsigned long long*>(hot_.owner + slots);
  hot_.hand = hot_.use + slots;
  hot_.call = hot_.hand + 1;
  absl::StatusOr<std::unique_ptr<DeviceRange>> slot_of = DeviceRange::Reserve(
      backend_.pages(), backend_.num_blocks(), slots > 0 ? kBlockTokens * sizeof(int32_t) : 0);
  if (!slot_of.ok()) return slot_of.status();
  slot_of_ = *std::move(slot_of);
  hot_.slot_of = reinterpret_cast<int32_t*>(slot_of_->data());
  VATTN_RETURN_IF_ERROR(d.Fill(hot_.hand, 0, 16, d.stream()));  // and the count of calls
  VATTN_RETURN_IF_ERROR(EmptySlots(d.stream()));
  seen_.resize(static_cast<size_t>(backend_.num_blocks()));
  for (int64_t b = 0; b < backend_.num_blocks(); ++b)
    seen_[b] = backend_.generation(static_cast<int32_t>(b));
  return d.Synchronize(d.stream());
}

absl::Status CudaBatch::EmptySlots(DeviceStream stream) {
  const uint64_t bytes = static_cast<uint64_t>(hot_.slots) * sizeof(int64_t);
  VATTN_RETURN_IF_ERROR(backend_.device().Fill(hot_.owner, 0xff, bytes, stream));
  return backend_.device().Fill(hot_.use, 0, bytes, stream);
}

absl::Status CudaBatch::ShrinkHotSet(DeviceStream stream) {
  if (reclaims_ == backend_.reclaims()) return absl::OkStatus();
  reclaims_ = backend_.reclaims();
  const auto idle = [this](int64_t first, int64_t end) { return backend_.AllFree(first, end); };
  const int64_t pages = slot_of_->idle_pages(idle);
  if (pages < kLeastIdlePages || 2 * pages < slot_of_->mapped_pages()) return absl::OkStatus();
  VATTN_RETURN_IF_ERROR(backend_.device().SynchronizeAll());
  VATTN_RETURN_IF_ERROR(EmptySlots(stream));
  slot_of_->Reclaim(0, idle);
  unset_ = slot_of_->mapped();
  return absl::OkStatus();
}

absl::Status CudaBatch::UpdateHotSet(DeviceStream stream) {
  VATTN_RETURN_IF_ERROR(ShrinkHotSet(stream));
  std::vector<int32_t> changed, renewed;
  for (const Filled& f : filled_) {
    for (int l = 0; l < runtime_.options().num_layers; ++l) {
      for (const KvHead& kv_head : f.sequence->layer(l).kv_heads) {
        // A sequence that comes from another batch may bring blocks that changed there.
        const int64_t size = static_cast<int64_t>(kv_head.blocks.size());
        const int64_t from =
            f.sequence->hot_set == id_ ? std::min(kv_head.blocks.unseen_from(), size) : 0;
        changed.insert(changed.end(), kv_head.blocks.begin() + from, kv_head.blocks.end());
      }
    }
  }
  for (const int32_t id : changed) {
    if (seen_[id] != backend_.generation(id)) renewed.push_back(id);
  }
  Device& d = backend_.device();
  VATTN_RETURN_IF_ERROR(
      backend_.Hold(*slot_of_, changed.data(), static_cast<int64_t>(changed.size()), &unset_));
  for (const auto& [begin, end] : unset_) {
    VATTN_RETURN_IF_ERROR(d.Fill(slot_of_->data() + begin, 0xff, end - begin, stream));
  }
  unset_.clear();
  if (!renewed.empty()) {
    const uint64_t bytes = renewed.size() * sizeof(int32_t);
    if (bytes > forget_.size()) {
      absl::StatusOr<DeviceMemory> memory = d.Allocate(2 * bytes);
      if (!memory.ok()) return memory.status();
      forget_ = *std::move(memory);
    }
    VATTN_RETURN_IF_ERROR(d.Copy(forget_.data(), renewed.data(), bytes, stream));
    VATTN_RETURN_IF_ERROR(
        d.Check(cuda::ForgetBlocks(hot_, forget_.as<int32_t>(),
                                   static_cast<int64_t>(renewed.size()), {stream}),
                "updating the hot set"));
  }
  for (const int32_t id : renewed) seen_[id] = backend_.generation(id);
  for (const Filled& f : filled_) {
    f.sequence->hot_set = id_;
    for (int l = 0; l < runtime_.options().num_layers; ++l) {
      for (KvHead& kv_head : f.sequence->layer(l).kv_heads) {
        kv_head.blocks.MarkSeen();
      }
    }
  }
  return absl::OkStatus();
}

int CudaBatch::heads_in_step(int l) const { return query_tokens_ * runtime_.group_heads(l); }

const cuda::AnswerShape& CudaBatch::shape(int l) const {
  return query_tokens_ == 1 || heads_in_step(l) <= 4 ? answer_[l] : answer_wide_[l];
}

absl::Status CudaBatch::GrowScratch() {
  uint64_t most = 0;
  for (int l = 0; l < runtime_.options().num_layers; ++l) {
    const int kv_heads = runtime_.kv_heads(l);
    if (kv_heads == 0) continue;
    uint64_t bytes = 0;
    for (const Filled& f : filled_) {
      cuda::GroupScratch scratch;
      bytes += static_cast<uint64_t>(kv_heads) *
               cuda::CarveScratch(runtime_.storage(), runtime_.promise(),
                                  RoundUp(f.sequence->tokens_in_step(), kScratchTokens),
                                  heads_in_step(l), shape(l).team, nullptr, scratch);
    }
    most = std::max(most, bytes);
  }
  if (most <= scratch_.size()) return absl::OkStatus();
  absl::StatusOr<DeviceMemory> memory = backend_.device().Allocate(most + most / 8);
  if (!memory.ok()) return memory.status();
  scratch_ = *std::move(memory);
  return absl::OkStatus();
}

void CudaBatch::FillTables(int steps) {
  const int layers = runtime_.options().num_layers;
  cuda::StepHeader* headers = pinned_[turn_].as<cuda::StepHeader>();
  cuda::DeviceGroup* groups = reinterpret_cast<cuda::DeviceGroup*>(headers + layers);
  for (int l = 0; l < layers; ++l) {
    headers[l] = {};
    if (runtime_.kv_heads(l) > 0) FillGroups(l, steps, headers[l], groups + first_group_[l]);
  }
}

void CudaBatch::FillGroups(int l, int steps, cuda::StepHeader& header,
                           cuda::DeviceGroup* groups) const {
  const Options& o = runtime_.options();
  const int kv_heads = runtime_.kv_heads(l);
  std::byte* memory = scratch_.data();
  int count = 0;
  int64_t scanned = 0;
  for (const Filled& f : filled_) {
    const CudaSequence& on_device = CudaSequenceHalf::Of(*f.sequence).on_device();
    const int64_t tokens = f.sequence->tokens_in_step();
    const int64_t begin = f.sequence->middle_begin_in_step(),
                  end = f.sequence->middle_end_in_step();
    for (int h = 0; h < kv_heads; ++h, ++count) {
      const KvHead& kv_head = f.sequence->layer(l).kv_heads[h];
      cuda::DeviceGroup& g = groups[count];
      g = {};
      g.blocks = on_device.blocks(l, h);
      g.fixed = on_device.fixed(l, h);
      g.state = on_device.state(l, h);
      g.num_segments = static_cast<int32_t>(kv_head.tables.size());
      if (g.num_segments > 0) {
        g.index = kv_head.tables[0].DeviceTables();
        g.segments = on_device.segments(l, h);
      }
      g.key =
          MakeRandomKey(o.seed, f.sequence->id(), static_cast<uint32_t>(l), KvHeadOfModel(o, h));
      g.slot = f.slot;
      g.kv_head = h;
      g.first_query = int64_t{f.slot} * query_tokens_;
      g.num_queries = query_tokens_;
      g.tokens = tokens;
      g.middle_begin = begin;
      g.middle_end = end;
      g.ring_begin = std::max<int64_t>(0, tokens - backend_.storage().ring_tokens);
      g.first_block = scanned;
      g.step = f.sequence->step() + static_cast<uint64_t>(steps);
      g.recent = on_device.recent(l, h, g.step);
      if (end > begin) scanned += (end + kBlockTokens - 1) / kBlockTokens - begin / kBlockTokens;
      memory += cuda::CarveScratch(runtime_.storage(), runtime_.promise(),
                                   RoundUp(tokens, kScratchTokens), heads_in_step(l), shape(l).team,
                                   memory, g.scratch);
      if (query_tokens_ > 1) {
        g.carried = g.state;
        g.state = g.scratch.state_of_token;
      }
    }
  }
  header = {.scan_blocks = scanned, .num_groups = count, .num_tokens = query_tokens_};
}

absl::Status CudaBatch::BeginStep(const std::vector<Sequence*>& slots, DeviceStream stream) {
  Device& d = backend_.device();
  VATTN_RETURN_IF_ERROR(d.Activate());
  const DeviceStream used = stream != nullptr ? stream : d.stream();
  if (stream_ != nullptr && stream_ != used) VATTN_RETURN_IF_ERROR(d.SynchronizeAll());
  stream_ = used;
  filled_.clear();
  for (int slot = 0; slot < slots_; ++slot) {
    if (slots[slot] != nullptr) filled_.push_back({slots[slot], slot});
  }
  query_tokens_ = filled_.empty() ? 1 : filled_[0].sequence->num_query_tokens();
  for (int l = 0; l < runtime_.options().num_layers; ++l) {
    if (runtime_.kv_heads(l) == 0 || shape(l).team > 0) continue;
    return NotSupportedError("new_tokens is ", query_tokens_, ", must be at most ",
                             4 / runtime_.group_heads(l), ": rows of ",
                             runtime_.storage().row.row_bytes,
                             " bytes leave the shared memory of this device no room for more than "
                             "4 query heads per KV head");
  }
  for (const Filled& f : filled_)
    VATTN_RETURN_IF_ERROR(CudaSequenceHalf::Of(*f.sequence).Make(*f.sequence));
  VATTN_RETURN_IF_ERROR(GrowScratch());
  VATTN_RETURN_IF_ERROR(UpdateHotSet(stream_));
  for (const Filled& f : filled_) {
    CudaSequence& on_device = CudaSequenceHalf::Of(*f.sequence).on_device();
    VATTN_RETURN_IF_ERROR(on_device.SendChanges(*f.sequence, stream_));
  }
  turn_ = (turn_ + 1) % kTurns;
  VATTN_RETURN_IF_ERROR(d.Wait(passed_[turn_]));
  FillTables(1);
  VATTN_RETURN_IF_ERROR(
      d.Copy(tables_.data(), pinned_[turn_].data(), pinned_[turn_].size(), stream_));
  VATTN_RETURN_IF_ERROR(d.Record(passed_[turn_], stream_));
  for (int l = 0; l < runtime_.options().num_layers; ++l) {
    if (runtime_.kv_heads(l) > 0) runtime_.counters().steps += filled_.size();
  }
  return absl::OkStatus();
}

void CudaBatch::Leave(const Sequence& sequence) {
  if (std::erase_if(filled_, [&](const Filled& f) { return f.sequence == &sequence; }) == 0) return;
  SendOpenTables().IgnoreError();  // what fails here fails again in the next call of the step
}

absl::Status CudaBatch::LeaveAll() {
  const std::vector<Filled> before = filled_;
  filled_.clear();
  const absl::Status status = SendOpenTables();
  if (!status.ok()) filled_ = before;
  return status;
}

absl::Status CudaBatch::SendOpenTables() {
  // The caller's stream may be gone.
  Device& d = backend_.device();
  VATTN_RETURN_IF_ERROR(d.Activate());
  VATTN_RETURN_IF_ERROR(d.SynchronizeAll());
  FillTables(0);
  VATTN_RETURN_IF_ERROR(
      d.Copy(tables_.data(), pinned_[turn_].data(), pinned_[turn_].size(), d.stream()));
  return d.Synchronize(d.stream());
}

absl::Status CudaBatch::Launch(Task task, const AttendRequest& r, const Selection& selection,
                               DeviceStream stream) {
  Device& d = backend_.device();
  cuda::StepParams p;
  p.task = task;
  p.storage = backend_.storage();
  p.promise = backend_.promise();
  if (r.dense) p.promise.policy = Policy::kDense;
  p.hot = hot_;
  const int layers = runtime_.options().num_layers, kv_heads = runtime_.kv_heads(r.layer);
  p.header = tables_.as<cuda::StepHeader>() + r.layer;
  p.groups = reinterpret_cast<cuda::DeviceGroup*>(tables_.as<cuda::StepHeader>() + layers) +
             first_group_[r.layer];
  p.counters = backend_.counters();
  p.most_groups = slots_ * kv_heads;
  p.kv_heads = kv_heads;
  p.group_heads = heads_in_step(r.layer);
  p.num_tokens = query_tokens_;
  p.call = {.q = r.q,
            .k_new = r.k_new,
            .v_new = r.v_new,
            .out = r.out,
            .lse = r.lse,
            .verdict = r.verdict,
            .error = r.error,
            .selected = r.selected,
            .fetched = r.fetched,
            .looks = r.looks,
            .middle = r.middle,
            .timeline = r.timeline,
            .out_dtype = r.out_dtype,
            .score_heads = r.score_heads == 0 ? kv_heads : r.score_heads,
            .scores_dtype = r.scores_dtype,
            .scores = r.scores,
            .scores_stride = r.scores_stride};
  p.selection = {selection.capacity, selection.tokens, selection.log_weights, selection.counts};
  p.slice = {.partial = r.partial,
             .gathered = r.gathered,
             .gathered_stride = int64_t{slots_} * runtime_.options().num_q_heads *
                                PartialFloats(runtime_.storage().row.dim_v),
             .again = r.again,
             .rank = r.rank,
             .ranks = r.ranks};
  if (task == Task::kForecast) {
    looked_on_ = false;
    return d.Check(cuda::Forecast(p, d.facts().multiprocessors, {stream}), "enqueueing a forecast");
  }
  if (task == Task::kMore) {
    const bool first = !looked_on_;
    looked_on_ = true;
    return d.Check(cuda::LookOn(p, shape(r.layer), first, {stream}), "enqueueing a look");
  }
  return d.Check(cuda::Decode(p, shape(r.layer), d.facts().multiprocessors, {stream}),
                 "enqueueing attention");
}

namespace {

// kBoth: what the call does not write stays. kAllIn and kAllOut have no slots.
enum class Way { kIn, kOut, kBoth, kAllIn, kAllOut };

// visit(array, bytes a slot, way) for every array of a call; the one list of them.
template <class Visit>
void ForEachArray(const Runtime& runtime, Task task, AttendRequest& r, Selection& list,
                  Visit&& visit) {
  const RowLayout& row = runtime.storage().row;
  const int64_t q_heads = r.num_tokens * runtime.options().num_q_heads,
                kv_heads = runtime.kv_heads(r.layer), new_rows = r.num_tokens * kv_heads;
  const int64_t element = ElementBytes(row.dtype),
                out_element = ElementBytes(static_cast<DType>(r.out_dtype));
  visit(r.q, q_heads * row.dim_k * element, Way::kIn);
  visit(r.k_new, new_rows * row.dim_k * element, Way::kIn);
  visit(r.v_new, new_rows * row.dim_v * element, Way::kIn);
  const int64_t score_heads = r.score_heads == 0 ? runtime.kv_heads(r.layer) : r.score_heads;
  visit(r.scores,
        r.num_tokens * score_heads * r.scores_stride *
            ElementBytes(static_cast<DType>(r.scores_dtype)),
        Way::kIn);
  visit(r.out, q_heads * row.dim_v * out_element, Way::kOut);
  visit(r.lse, q_heads * int64_t{sizeof(*r.lse)}, Way::kOut);
  visit(r.verdict, q_heads * int64_t{sizeof(*r.verdict)}, Way::kOut);
  visit(r.error, q_heads * int64_t{sizeof(*r.error)}, Way::kOut);
  visit(r.selected, kv_heads * int64_t{sizeof(*r.selected)}, Way::kOut);
  visit(r.fetched, kv_heads * int64_t{sizeof(*r.fetched)}, Way::kOut);
  visit(r.looks, kv_heads * int64_t{sizeof(*r.looks)}, Way::kOut);
  visit(r.middle, kv_heads * int64_t{sizeof(*r.middle)}, Way::kOut);
  const int64_t record_bytes = q_heads * PartialFloats(row.dim_v) * int64_t{sizeof(*r.partial)};
  visit(r.partial, record_bytes, Way::kBoth);
  visit(r.gathered, record_bytes * r.ranks, Way::kAllIn);
  visit(r.again, int64_t{sizeof(*r.again)}, Way::kAllOut);
  if (task != Task::kSelect && task != Task::kAttendSelected) return;
  const Way way = task == Task::kSelect ? Way::kOut : Way::kIn;
  visit(list.tokens, kv_heads * list.capacity * int64_t{sizeof(*list.tokens)}, way);
  visit(list.log_weights, kv_heads * list.capacity * int64_t{sizeof(*list.log_weights)}, way);
  visit(list.counts, kv_heads * int64_t{sizeof(*list.counts)}, way);
}

// An array of the host and its place on the device.
struct Staged {
  std::byte* host;
  std::byte* there;
  int64_t slot_bytes;
  Way way;
};

}  // namespace

absl::Status CudaBatch::CallFromHost(Task task, const AttendRequest& r, const Selection& selection,
                                     DeviceStream stream) {
  Device& d = backend_.device();
  AttendRequest request = r;
  Selection list = selection;
  const auto room = [&](int64_t slot_bytes) { return RoundUp(slot_bytes * slots_, 256); };
  int64_t bytes = 0;
  ForEachArray(runtime_, task, request, list, [&](auto* array, int64_t slot_bytes, Way) {
    if (array != nullptr) bytes += room(slot_bytes);
  });
  constexpr uint64_t kTimelineBytes = cuda::kTimelinePoints * sizeof(uint64_t);
  const uint64_t needed = static_cast<uint64_t>(bytes) + kTimelineBytes;
  if (needed > staging_.size()) {
    absl::StatusOr<DeviceMemory> memory = d.Allocate(needed);
    if (!memory.ok()) return memory.status();
    staging_ = *std::move(memory);
    // Lists come back whole, past what the device writes of them.
    VATTN_RETURN_IF_ERROR(d.Fill(staging_.data(), 0, needed, stream));
  }
  // From here on request and list have the device's arrays.
  std::vector<Staged> arrays;
  std::byte* next = staging_.data();
  ForEachArray(runtime_, task, request, list, [&](auto*& array, int64_t slot_bytes, Way way) {
    if (array == nullptr) return;
    using Pointer = std::remove_reference_t<decltype(array)>;
    arrays.push_back({static_cast<std::byte*>(const_cast<void*>(static_cast<const void*>(array))),
                      next, slot_bytes, way});
    array = static_cast<Pointer>(static_cast<void*>(next));
    next += room(slot_bytes);
  });
  if (r.timeline != nullptr)
    request.timeline = reinterpret_cast<uint64_t*>(staging_.data() + bytes);
  const auto copy_filled = [&](Way way) {
    for (const Staged& a : arrays) {
      const bool in = a.way == Way::kAllIn;
      if (!in && a.way != Way::kAllOut) continue;
      if (in != (way == Way::kIn)) continue;
      const uint64_t all = static_cast<uint64_t>(a.slot_bytes * (in ? slots_ : 1));
      VATTN_RETURN_IF_ERROR(d.Copy(in ? a.there : a.host, in ? a.host : a.there, all, stream));
    }
    for (const Filled& f : filled_) {
      for (const Staged& a : arrays) {
        if (a.way != way && a.way != Way::kBoth) continue;
        std::byte* const host = a.host + f.slot * a.slot_bytes;
        std::byte* const there = a.there + f.slot * a.slot_bytes;
        VATTN_RETURN_IF_ERROR(d.Copy(way == Way::kIn ? there : host, way == Way::kIn ? host : there,
                                     static_cast<uint64_t>(a.slot_bytes), stream));
      }
    }
    return absl::OkStatus();
  };
  VATTN_RETURN_IF_ERROR(copy_filled(Way::kIn));
  VATTN_RETURN_IF_ERROR(Launch(task, request, list, stream));
  VATTN_RETURN_IF_ERROR(copy_filled(Way::kOut));
  if (r.timeline != nullptr)
    VATTN_RETURN_IF_ERROR(d.Copy(r.timeline, request.timeline, kTimelineBytes, stream));
  VATTN_RETURN_IF_ERROR(d.Synchronize(stream));
  return task == Task::kSelect ? CheckCounts(r.layer, selection) : absl::OkStatus();
}

absl::Status CudaBatch::CheckCounts(int layer, const Selection& selection) const {
  const int kv_heads = runtime_.kv_heads(layer);
  int64_t need = 0;
  for (const Filled& f : filled_) {
    for (int h = 0; h < kv_heads; ++h)
      need = std::max<int64_t>(need, selection.counts[int64_t{f.slot} * kv_heads + h]);
  }
  return CheckCapacity(need, selection);
}

absl::Status CudaBatch::Call(Task task, const AttendRequest& r, const Selection& selection,
                             DeviceStream stream) {
  Device& d = backend_.device();
  VATTN_RETURN_IF_ERROR(d.Activate());
  const DeviceStream used = stream != nullptr ? stream : stream_;
  const void* const given = task == Task::kMore ? static_cast<const void*>(r.gathered) : r.q;
  if (!d.CanFollow(given)) return CallFromHost(task, r, selection, used);
  VATTN_RETURN_IF_ERROR(Launch(task, r, selection, used));
  return stream != nullptr ? absl::OkStatus() : d.Synchronize(used);
}

}  // namespace vattn
