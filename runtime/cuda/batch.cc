#include "runtime/cuda/batch.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "memory/status.h"
#include "runtime/sequence.h"

namespace vattn {
namespace {

constexpr int64_t kLeastIdlePages = 4;    // of slot_of, for the hot set to be emptied for them
constexpr int64_t kScratchTokens = 4096;  // working memory grows in steps of so many tokens

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
    cuda::AnswerShape shape;
    if (runtime_.kv_heads(l) > 0) {
      shape =
          cuda::ShapeAnswer(backend_.storage(), runtime_.group_heads(l), slots_ * runtime_.kv_heads(l));
    }
    if (runtime_.kv_heads(l) > 0 && shape.team == 0) {
      return NotSupportedError("rows of ", row_bytes,
                               " bytes do not fit the shared memory of device ", d.ordinal(), " (",
                               d.facts().name, ")");
    }
    answer_.push_back(shape);
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
        const int64_t from = f.sequence->hot_set == id_ ? std::min(kv_head.unseen_from, size) : 0;
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
        kv_head.unseen_from = static_cast<int64_t>(kv_head.blocks.size());
      }
    }
  }
  return absl::OkStatus();
}

absl::Status CudaBatch::GrowScratch(int new_tokens) {
  uint64_t most = 0;
  for (int l = 0; l < runtime_.options().num_layers; ++l) {
    const int kv_heads = runtime_.kv_heads(l);
    if (kv_heads == 0) continue;
    uint64_t bytes = 0;
    for (const Filled& f : filled_) {
      cuda::GroupScratch scratch;
      bytes += static_cast<uint64_t>(kv_heads) *
               cuda::CarveScratch(runtime_.storage(), runtime_.promise(),
                                  RoundUp(f.sequence->layer(l).tokens + new_tokens, kScratchTokens),
                                  runtime_.group_heads(l), answer_[l].team, nullptr, scratch);
    }
    most = std::max(most, bytes);
  }
  if (most <= scratch_.size()) return absl::OkStatus();
  absl::StatusOr<DeviceMemory> memory = backend_.device().Allocate(most + most / 8);
  if (!memory.ok()) return memory.status();
  scratch_ = *std::move(memory);
  return absl::OkStatus();
}

void CudaBatch::FillTables(int new_tokens, int steps) {
  const int layers = runtime_.options().num_layers;
  cuda::StepHeader* headers = pinned_[turn_].as<cuda::StepHeader>();
  cuda::DeviceGroup* groups = reinterpret_cast<cuda::DeviceGroup*>(headers + layers);
  for (int l = 0; l < layers; ++l) {
    headers[l] = {};
    if (runtime_.kv_heads(l) > 0)
      FillGroups(l, new_tokens, steps, headers[l], groups + first_group_[l]);
  }
}

void CudaBatch::FillGroups(int l, int new_tokens, int steps, cuda::StepHeader& header,
                           cuda::DeviceGroup* groups) const {
  const Options& o = runtime_.options();
  const int kv_heads = runtime_.kv_heads(l), group_size = runtime_.group_heads(l);
  std::byte* memory = scratch_.data();
  int count = 0;
  int64_t scanned = 0;
  for (const Filled& f : filled_) {
    const Layer& layer = f.sequence->layer(l);
    const int64_t tokens = layer.tokens + new_tokens;
    const int64_t begin = std::min<int64_t>(o.sinks, tokens),
                  end = std::max(begin, f.sequence->MiddleEnd(tokens));
    for (int h = 0; h < kv_heads; ++h, ++count) {
      const KvHead& kv_head = layer.kv_heads[h];
      cuda::DeviceGroup& g = groups[count];
      g = {};
      g.blocks = f.sequence->cuda()->blocks(l, h);
      g.fixed = f.sequence->cuda()->fixed(l, h);
      g.state = f.sequence->cuda()->state(l, h);
      g.num_segments = static_cast<int32_t>(kv_head.tables.size());
      if (g.num_segments > 0) {
        g.index = kv_head.tables[0].DeviceTables();
        g.segments = f.sequence->cuda()->segments(l, h);
      }
      g.key = MakeRandomKey(o.seed, f.sequence->id(), static_cast<uint32_t>(l),
                            static_cast<uint32_t>(h));
      g.slot = f.slot;
      g.kv_head = h;
      g.tokens = tokens;
      g.middle_begin = begin;
      g.middle_end = end;
      g.ring_begin = std::max<int64_t>(0, tokens - backend_.storage().ring_tokens);
      g.first_block = scanned;
      g.step = f.sequence->step() + static_cast<uint64_t>(steps);
      g.recent = f.sequence->cuda()->recent(l, h, g.step);
      if (end > begin) scanned += (end + kBlockTokens - 1) / kBlockTokens - begin / kBlockTokens;
      memory += cuda::CarveScratch(runtime_.storage(), runtime_.promise(),
                                   RoundUp(tokens, kScratchTokens), group_size, answer_[l].team,
                                   memory, g.scratch);
    }
  }
  header = {.scan_blocks = scanned, .num_groups = count};
}

absl::Status CudaBatch::BeginStep(const std::vector<Sequence*>& slots, int new_tokens,
                                  DeviceStream stream) {
  Device& d = backend_.device();
  VATTN_RETURN_IF_ERROR(d.Activate());
  const DeviceStream used = stream != nullptr ? stream : d.stream();
  if (stream_ != nullptr && stream_ != used) VATTN_RETURN_IF_ERROR(d.SynchronizeAll());
  stream_ = used;
  filled_.clear();
  for (int slot = 0; slot < slots_; ++slot) {
    if (slots[slot] != nullptr) filled_.push_back({slots[slot], slot});
  }
  std::vector<CudaSequence*> halves;
  for (const Filled& f : filled_) {
    absl::StatusOr<CudaSequence*> half = f.sequence->Cuda();
    if (!half.ok()) return half.status();
    halves.push_back(*half);
  }
  VATTN_RETURN_IF_ERROR(GrowScratch(new_tokens));
  VATTN_RETURN_IF_ERROR(UpdateHotSet(stream_));
  for (size_t i = 0; i < filled_.size(); ++i)
    VATTN_RETURN_IF_ERROR(halves[i]->Flush(*filled_[i].sequence, stream_));
  turn_ = (turn_ + 1) % kTurns;
  VATTN_RETURN_IF_ERROR(d.Wait(passed_[turn_]));
  FillTables(new_tokens, 1);
  VATTN_RETURN_IF_ERROR(
      d.Copy(tables_.data(), pinned_[turn_].data(), pinned_[turn_].size(), stream_));
  return d.Record(passed_[turn_], stream_);
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
  FillTables(0, 0);  // the sequences count the open step already
  VATTN_RETURN_IF_ERROR(
      d.Copy(tables_.data(), pinned_[turn_].data(), pinned_[turn_].size(), d.stream()));
  return d.Synchronize(d.stream());
}

absl::Status CudaBatch::Launch(cuda::Task task, const AttendRequest& r, const Selection& selection,
                               DeviceStream stream) {
  Device& d = backend_.device();
  cuda::DecodeParams p;
  p.task = task;
  p.storage = backend_.storage();
  p.promise = backend_.promise();
  p.hot = hot_;
  const int layers = runtime_.options().num_layers, kv_heads = runtime_.kv_heads(r.layer);
  p.header = tables_.as<cuda::StepHeader>() + r.layer;
  p.groups = reinterpret_cast<cuda::DeviceGroup*>(tables_.as<cuda::StepHeader>() + layers) +
             first_group_[r.layer];
  p.counters = backend_.counters();
  p.most_groups = slots_ * kv_heads;
  p.kv_heads = kv_heads;
  p.q_heads = runtime_.group_heads(r.layer);
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
            .out_dtype = r.out_dtype};
  p.selection = {selection.capacity, selection.tokens, selection.log_weights, selection.counts};
  return d.Check(cuda::Decode(p, answer_[r.layer], d.facts().multiprocessors, {stream}),
                 "enqueueing attention");
}

absl::Status CudaBatch::Stage(cuda::Task task, const AttendRequest& r, const Selection& selection,
                              DeviceStream stream) {
  Device& d = backend_.device();
  const Options& o = runtime_.options();
  const RowLayout& row = runtime_.storage().row;
  const int64_t kv_heads = runtime_.kv_heads(r.layer), element = ElementBytes(row.dtype);
  // Every array as bytes a slot; in: copied before, out: copied after, for filled slots.
  struct Array {
    void* host;
    int64_t slot_bytes;
    bool in, out;
    int64_t at = 0;
  };
  AttendRequest staged = r;
  uint64_t* const timeline = r.timeline;
  Selection list = selection;
  const int64_t out_bytes =
      o.num_q_heads * int64_t{row.dim_v} * ElementBytes(static_cast<DType>(r.out_dtype));
  const bool given = task == cuda::Task::kAttendSelected, wanted = task == cuda::Task::kSelect;
  std::vector<Array> arrays = {
      {const_cast<void*>(r.q), o.num_q_heads * int64_t{row.dim_k} * element, true, false},
      {const_cast<void*>(r.k_new), kv_heads * row.dim_k * element, true, false},
      {const_cast<void*>(r.v_new), kv_heads * row.dim_v * element, true, false},
      {r.out, out_bytes, false, true},
      {r.lse, o.num_q_heads * 4, false, true},
      {r.verdict, o.num_q_heads * 4, false, true},
      {r.error, o.num_q_heads * 4, false, true},
      {r.selected, kv_heads * 4, false, true},
      {r.fetched, kv_heads * 4, false, true},
      {r.looks, kv_heads * 4, false, true},
      {r.middle, kv_heads * 8, false, true},
      {list.tokens, kv_heads * list.capacity * 4, given, wanted},
      {list.log_weights, kv_heads * list.capacity * 4, given, wanted},
      {list.counts, kv_heads * 4, given, wanted},
  };
  int64_t bytes = 0;
  for (Array& a : arrays) {
    a.at = bytes;
    if (a.host != nullptr) bytes += RoundUp(a.slot_bytes * slots_, 256);
  }
  constexpr uint64_t kTimelineBytes = cuda::kMarks * sizeof(uint64_t);
  if (static_cast<uint64_t>(bytes) + kTimelineBytes > staging_.size()) {
    absl::StatusOr<DeviceMemory> memory = d.Allocate(static_cast<uint64_t>(bytes) + kTimelineBytes);
    if (!memory.ok()) return memory.status();
    staging_ = *std::move(memory);
    // Lists come back whole, past what the device writes of them.
    VATTN_RETURN_IF_ERROR(
        d.Fill(staging_.data(), 0, static_cast<uint64_t>(bytes) + kTimelineBytes, stream));
  }
  const auto device = [&](size_t i) {
    return arrays[i].host == nullptr ? nullptr : static_cast<void*>(staging_.data() + arrays[i].at);
  };
  staged.q = device(0), staged.k_new = device(1), staged.v_new = device(2), staged.out = device(3);
  staged.lse = static_cast<float*>(device(4));
  staged.verdict = static_cast<int32_t*>(device(5));
  staged.error = static_cast<float*>(device(6));
  staged.selected = static_cast<int32_t*>(device(7));
  staged.fetched = static_cast<int32_t*>(device(8));
  staged.looks = static_cast<int32_t*>(device(9));
  staged.middle = static_cast<int64_t*>(device(10));
  staged.timeline =
      timeline == nullptr ? nullptr : reinterpret_cast<uint64_t*>(staging_.data() + bytes);
  list.tokens = static_cast<int32_t*>(device(11));
  list.log_weights = static_cast<float*>(device(12));
  list.counts = static_cast<int32_t*>(device(13));
  const auto copy = [&](const Array& a, int slot, bool to_device) {
    std::byte* host = static_cast<std::byte*>(a.host) + slot * a.slot_bytes;
    std::byte* there = staging_.data() + a.at + slot * a.slot_bytes;
    return to_device ? d.Copy(there, host, static_cast<uint64_t>(a.slot_bytes), stream)
                     : d.Copy(host, there, static_cast<uint64_t>(a.slot_bytes), stream);
  };
  for (const Filled& f : filled_) {
    for (const Array& a : arrays) {
      if (a.host != nullptr && a.in) VATTN_RETURN_IF_ERROR(copy(a, f.slot, true));
    }
  }
  VATTN_RETURN_IF_ERROR(Launch(task, staged, list, stream));
  for (const Filled& f : filled_) {
    for (const Array& a : arrays) {
      if (a.host != nullptr && a.out) VATTN_RETURN_IF_ERROR(copy(a, f.slot, false));
    }
  }
  if (timeline != nullptr)
    VATTN_RETURN_IF_ERROR(d.Copy(timeline, staged.timeline, kTimelineBytes, stream));
  return d.Synchronize(stream);
}

absl::Status CudaBatch::Call(cuda::Task task, const AttendRequest& r, const Selection& selection,
                             DeviceStream stream) {
  Device& d = backend_.device();
  VATTN_RETURN_IF_ERROR(d.Activate());
  const DeviceStream used = stream != nullptr ? stream : stream_;
  if (!d.CanFollow(r.q)) return Stage(task, r, selection, used);
  VATTN_RETURN_IF_ERROR(Launch(task, r, selection, used));
  return stream != nullptr ? absl::OkStatus() : d.Synchronize(used);
}

}  // namespace vattn
