#include "tests/runtime/simulated_world.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "memory/status.h"
#include "tests/memory/host_pages.h"

namespace vattn::test {
namespace {

constexpr size_t kMostTwins = 6, kMostTokens = 900, kMostPending = 24;

}  // namespace

SimulatedWorld::SimulatedWorld(uint64_t seed, Lacks lacks, const std::string& disk_path)
    : simulation_(seed, lacks), random_(seed + 1) {
  Options o;
  o.num_layers = kLayers;
  o.num_q_heads = kQHeads;
  o.num_kv_heads = kKvHeads;
  o.head_dim_k = o.head_dim_v = kDim;
  o.dtype = DType::kF32;
  o.backend = BackendKind::kCuda;
  o.num_threads = 1;
  o.window = 32;
  o.exact_below = 64;
  o.index_bytes = 16;
  o.hot_share = .002f;
  o.host_bytes = 64 * static_cast<uint64_t>(MakeStorage(o).block.bytes);
  o.disk_path = disk_path;
  o.spill = true;
  runtime_ = *Runtime::Create(o, nullptr);
  for (auto& batch : batches_) batch = std::make_unique<Batch>(runtime_, kSlots);
  for (int i = 0; i < 2; ++i) streams_.push_back(simulation_.NewStream());
  // Every third world has less device memory than it asks for.
  host_pages.limit = seed % 3 == 0 ? 32 : std::numeric_limits<int64_t>::max();
}

SimulatedWorld::~SimulatedWorld() {
  EndsEmpty();
  runtime_.reset();
  host_pages.limit = std::numeric_limits<int64_t>::max();
}

bool SimulatedWorld::EndsEmpty() {
  pending_.clear();
  for (Graph& graph : graphs_) graph = Graph();
  for (auto& batch : batches_) batch.reset();
  twins_.clear();
  const HostStore& store = runtime_->store();
  return store.num_free() == store.num_blocks() && store.CheckInvariants().ok();
}

void SimulatedWorld::Run(int operations) {
  for (int i = 0; i < operations; ++i) {
    const size_t operation = Below(32);
    if (operation == 0) Create();
    if (operation == 1 || operation == 2) Append();
    if (operation == 3) Fork();
    if (operation == 4) Begin();
    if (operation == 5) Truncate();
    if (operation == 6 && Below(2) == 0) Destroy();
    if (operation == 7) Sleep();
    if (operation == 8 || operation == 9) BuildIndex();
    if (operation == 10 || operation == 11) Sit(static_cast<int>(Below(kBatches)));
    if (operation == 12 && Below(3) == 0) NewBatch(static_cast<int>(Below(kBatches)));
    if (operation == 13) Check();
    if (operation > 13) Step(Below(4) == 0 ? 1 : 0);
    if (pending_.size() > kMostPending) Check();
  }
  Check();
}

SimulatedWorld::Row SimulatedWorld::RandomRow() {
  Row row;
  for (float& x : row.k) x = normal_(random_);
  for (float& x : row.v) x = normal_(random_);
  return row;
}

void SimulatedWorld::Wrong(const std::string& what) {
  if (wrong_++ == 0) first_wrong_ = what;
}

bool SimulatedWorld::Done(const absl::Status& status, const char* call) {
  const Code code = CodeOf(status);
  if (code == Code::kFull || code == Code::kOutOfMemory)
    ++refused_;
  else if (!status.ok())
    Wrong(absl::StrCat(call, ": ", status.message()));
  return status.ok();
}

// One that is awake.
SimulatedWorld::Twin* SimulatedWorld::AnyTwin() {
  if (twins_.empty()) return nullptr;
  Twin* const twin = twins_[Below(twins_.size())].get();
  return Done(twin->sequence->Wake(), "wake") ? twin : nullptr;
}

void SimulatedWorld::Create() {
  if (twins_.size() == kMostTwins) return;
  absl::StatusOr<std::unique_ptr<Sequence>> made =
      Sequence::Create(runtime_, {.reserve_tokens = Below(2) == 0 ? 0 : 300});
  if (!Done(made.status(), "create")) return;
  twins_.push_back(std::make_unique<Twin>());
  twins_.back()->sequence = *std::move(made);
}

void SimulatedWorld::Append() {
  Twin* const twin = AnyTwin();
  if (twin == nullptr) return;
  const size_t before = twin->size(), count = 1 + Below(Below(3) > 0 ? 400 : 20);
  if (before + count > kMostTokens) return;
  Device& device = runtime_->cuda()->device();
  const bool there = Below(2) == 0;
  for (int layer = 0; layer < kLayers; ++layer) {
    std::vector<Row> rows(count * kKvHeads);  // [tokens][kv_heads]
    for (Row& row : rows) row = RandomRow();
    const uint64_t bytes = rows.size() * sizeof(Row);
    DeviceMemory memory;
    const float* from = rows[0].k.data();
    if (there) {
      memory = *device.Allocate(bytes);
      from = memory.as<float>();
      Done(device.Copy(memory.data(), rows.data(), bytes, device.stream()), "copy");
      Done(device.Synchronize(device.stream()), "synchronize");
    }
    const AppendRequest request = {.layer = layer,
                                   .num_tokens = static_cast<int64_t>(count),
                                   .k = from,
                                   .v = from + kDim,
                                   .k_token_stride = 2 * kDim * kKvHeads,
                                   .k_head_stride = 2 * kDim,
                                   .v_token_stride = 2 * kDim * kKvHeads,
                                   .v_head_stride = 2 * kDim};
    if (!Done(twin->sequence->Append(request), "append")) {
      // All layers or none.
      Done(twin->sequence->Truncate(static_cast<int64_t>(before)), "truncate");
      for (auto& heads : twin->rows)
        for (auto& head : heads) head.resize(before);
      return;
    }
    for (size_t i = 0; i < rows.size(); ++i) twin->rows[layer][i % kKvHeads].push_back(rows[i]);
  }
}

void SimulatedWorld::Fork() {
  Twin* const twin = AnyTwin();
  if (twin == nullptr || twins_.size() == kMostTwins) return;
  absl::StatusOr<std::unique_ptr<Sequence>> made = twin->sequence->Fork(0);
  if (!Done(made.status(), "fork")) return;
  Enter(*std::move(made), *twin, twin->size(), twin->attended);
}

// As from a kept prefix.
void SimulatedWorld::Begin() {
  Twin* const twin = AnyTwin();
  if (twin == nullptr || twins_.size() == kMostTwins) return;
  const size_t keep = Below(twin->size() + 1);
  if (!Done(twin->sequence->BuildIndex(), "build index")) return;
  absl::StatusOr<SharedLayers> layers = twin->sequence->Share(static_cast<int64_t>(keep));
  if (!Done(layers.status(), "share")) return;
  const SequenceOptions options = {.reserve_tokens = Below(2) == 0 ? 0 : 300};
  absl::StatusOr<std::unique_ptr<Sequence>> made =
      Sequence::FromLayers(runtime_, options, *std::move(layers));
  if (!Done(made.status(), "begin")) return;
  Enter(*std::move(made), *twin, keep, {});
}

void SimulatedWorld::Enter(std::unique_ptr<Sequence> sequence, const Twin& like, size_t tokens,
                           const std::array<int, kLayers>& attended) {
  auto copy = std::make_unique<Twin>();
  copy->sequence = std::move(sequence);
  for (int l = 0; l < kLayers; ++l) std::copy_n(like.rows[l], kKvHeads, copy->rows[l]);
  for (auto& heads : copy->rows)
    for (auto& head : heads) head.resize(tokens);
  copy->attended = attended;
  twins_.push_back(std::move(copy));
}

void SimulatedWorld::Truncate() {
  Twin* const twin = AnyTwin();
  if (twin == nullptr) return;
  const size_t keep = Below(2) == 0 ? Below(twin->size() + 1)
                                    : twin->size() - std::min<size_t>(twin->size(), Below(9));
  if (!Done(twin->sequence->Truncate(static_cast<int64_t>(keep)), "truncate")) return;
  for (auto& heads : twin->rows)
    for (auto& head : heads) head.resize(keep);
}

void SimulatedWorld::Destroy() {
  if (twins_.empty()) return;
  const size_t i = Below(twins_.size());
  Twin* const nobody = nullptr;
  for (auto& seats : seats_)
    std::replace(std::begin(seats), std::end(seats), twins_[i].get(), nobody);
  twins_.erase(twins_.begin() + static_cast<std::ptrdiff_t>(i));
}

// Several, so that they wake in other blocks.
void SimulatedWorld::Sleep() {
  for (const auto& twin : twins_) {
    if (twin->sequence->seat.load() == nullptr && !twin->sequence->hibernated() && Below(2) == 0) {
      Done(twin->sequence->Spill(), "spill");
    }
  }
}

void SimulatedWorld::BuildIndex() {
  if (Twin* const twin = AnyTwin()) Done(twin->sequence->BuildIndex(), "build index");
}

void SimulatedWorld::Sit(int b) {
  Twin* const twin = AnyTwin();
  if (twin == nullptr) return;
  for (int other = 0; other < kBatches; ++other) {
    for (int slot = 0; slot < kSlots; ++slot) {
      if (seats_[other][slot] != twin) continue;
      Done(batches_[other]->Clear(slot), "clear");
      seats_[other][slot] = nullptr;
    }
  }
  const int slot = static_cast<int>(Below(kSlots));
  if (Done(batches_[b]->Set(slot, twin->sequence.get()), "set")) seats_[b][slot] = twin;
}

}  // namespace vattn::test
