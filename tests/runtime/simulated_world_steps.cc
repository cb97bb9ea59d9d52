// Steps of a simulated world, and what their answers must be.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tests/runtime/simulated_world.h"

namespace vattn::test {
namespace {

constexpr float kNothing = std::numeric_limits<float>::quiet_NaN();

// The arrays of a call beside its answer, in plain memory.
struct Reports {
  static constexpr int kUntouched = -7;
  static constexpr int kSlots = SimulatedWorld::kSlots, kQHeads = SimulatedWorld::kQHeads,
                       kKvHeads = SimulatedWorld::kKvHeads;
  template <class T, int kCount>
  struct Filled : std::array<T, kCount> {
    Filled() { this->fill(kUntouched); }
  };
  Filled<float, kSlots * kQHeads> lse;
  Filled<int32_t, kSlots * kQHeads> verdict;
  Filled<int32_t, kSlots * kKvHeads> selected, fetched, looks;
  Filled<int64_t, kSlots * kKvHeads> middle;

  void AskFor(AttendRequest& request) {
    request.lse = lse.data(), request.verdict = verdict.data();
    request.selected = selected.data(), request.fetched = fetched.data();
    request.looks = looks.data(), request.middle = middle.data();
  }
  // Every array has its own numbers in the rows of a filled slot, and is untouched in others.
  bool AreRight(int slot, bool filled) const {
    const auto is = [&](const auto& array, Reported which, int heads) {
      for (int at = slot * heads; at < (slot + 1) * heads; ++at) {
        if (array[static_cast<size_t>(at)] != (filled ? ReportOf(which, at) : kUntouched))
          return false;
      }
      return true;
    };
    for (int h = 0; h < kQHeads; ++h) {
      const float x = lse[static_cast<size_t>(slot * kQHeads + h)];
      if (filled ? !std::isfinite(x) || x == kUntouched : x != kUntouched) return false;
    }
    return is(verdict, Reported::kVerdict, kQHeads) &&
           is(selected, Reported::kSelected, kKvHeads) &&
           is(fetched, Reported::kFetched, kKvHeads) && is(looks, Reported::kLooks, kKvHeads) &&
           is(middle, Reported::kMiddle, kKvHeads);
  }
};

}  // namespace

void SimulatedWorld::NewBatch(int b) {
  std::fill(std::begin(seats_[b]), std::end(seats_[b]), nullptr);
  for (Graph& graph : graphs_) graph.operations.clear();
  batches_[b].reset();
  batches_[b] = std::make_unique<Batch>(runtime_, kSlots);
}

void SimulatedWorld::Step(int b) {
  bool any = false;
  for (int slot = 0; slot < kSlots; ++slot) {
    Twin*& twin = seats_[b][slot];
    if (twin != nullptr && twin->size() == 0) {
      Done(batches_[b]->Clear(slot), "clear");
      twin = nullptr;
    }
    any |= twin != nullptr;
  }
  if (!any) return Sit(b);
  // Batch 0 is an engine's, on a stream that seldom changes; batch 1 has its arrays in plain
  // memory.
  if (Below(20) == 0) std::swap(streams_[0], streams_[1]);
  const bool staged = b == 1;
  const DeviceStream stream = staged ? nullptr : streams_[0];
  const int new_tokens = Below(8) == 0 ? 0 : 1;
  if (!Done(batches_[b]->BeginStep(new_tokens, stream), "begin step")) return;
  for (int layer = 0; layer < kLayers; ++layer) {
    Attend(b, layer, new_tokens, stream, staged);
    // In the middle of a step some wait for the device, and some go.
    if (Below(40) == 0) Destroy();
    Twin* const twin = Below(12) == 0 ? AnyTwin() : nullptr;
    if (twin != nullptr) Done(twin->sequence->ReadBackState(), "read back");
    if (Below(20) == 0) return Abandon(b, layer + 1, new_tokens);
  }
}

void SimulatedWorld::Abandon(int b, int layers, int new_tokens) {
  Check();  // a graph that is launched afterwards would answer nothing
  if (layers == kLayers && Below(3) == 0) Fork();  // shares what is to be cut
  if (!Done(batches_[b]->Abandon(), "abandon")) {
    // FULL: the step is open as before, and the layers left are attended.
    for (int layer = layers; layer < kLayers; ++layer)
      Attend(b, layer, new_tokens, b == 1 ? nullptr : streams_[0], b == 1);
    return;
  }
  ++abandoned_;
  for (Twin* twin : seats_[b]) {
    if (twin == nullptr) continue;
    for (int layer = 0; layer < layers && new_tokens == 1; ++layer) {
      for (auto& head : twin->rows[layer]) head.pop_back();
    }
  }
}

std::vector<float> SimulatedWorld::Attention(const Twin& twin, int layer, int q_head,
                                             const float* q) const {
  const std::vector<Row>& rows = twin.rows[layer][q_head * kKvHeads / kQHeads];
  const double scale = runtime_->storage().scale;
  double mass = 0;
  std::vector<double> sum(kDim);
  for (const Row& row : rows) {
    double score = 0;
    for (int c = 0; c < kDim; ++c) score += double{q[c]} * row.k[c];
    const double weight = std::exp(score * scale);
    mass += weight;
    for (int c = 0; c < kDim; ++c) sum[c] += weight * row.v[c];
  }
  std::vector<float> out;
  for (const double x : sum) out.push_back(static_cast<float>(x / mass));
  return out;
}

void SimulatedWorld::Attend(int b, int layer, int new_tokens, DeviceStream stream, bool staged) {
  constexpr size_t kQ = kSlots * kQHeads * kDim, kKv = kSlots * kKvHeads * kDim,
                   kErrors = kSlots * kQHeads;
  std::vector<float> in(kQ + 2 * kKv);
  for (float& x : in) x = normal_(random_);
  Answers answers;
  answers.expected.assign(kQ + kErrors, kNothing);
  answers.what = absl::StrCat("batch ", b, ", layer ", layer);
  for (int slot = 0; slot < kSlots; ++slot) {
    Twin* const twin = seats_[b][slot];
    if (twin == nullptr) continue;
    for (int h = 0; h < kKvHeads && new_tokens == 1; ++h) {
      const float* const k = in.data() + kQ + (slot * kKvHeads + h) * kDim;
      Row row;
      std::copy_n(k, kDim, row.k.begin());
      std::copy_n(k + kKv, kDim, row.v.begin());
      twin->rows[layer][h].push_back(row);
    }
    for (int h = 0; h < kQHeads; ++h) {
      const size_t head = static_cast<size_t>(slot) * kQHeads + h;
      const std::vector<float> out = Attention(*twin, layer, h, in.data() + head * kDim);
      std::copy(out.begin(), out.end(),
                answers.expected.begin() + static_cast<std::ptrdiff_t>(head * kDim));
      answers.expected[kQ + head] = static_cast<float>(twin->attended[static_cast<size_t>(layer)]);
    }
    ++twin->attended[static_cast<size_t>(layer)];
    absl::StrAppend(&answers.what, ", slot ", slot, ": ", twin->size(), " tokens");
  }
  const auto request = [&](float* base, float* out) {
    return AttendRequest{.layer = layer,
                         .q = base,
                         .k_new = new_tokens == 0 ? nullptr : base + kQ,
                         .v_new = new_tokens == 0 ? nullptr : base + kQ + kKv,
                         .out = out,
                         .error = out + kQ};
  };
  if (staged) {
    std::vector<float> out(answers.expected.size());
    Reports reports;
    AttendRequest wanted = request(in.data(), out.data());
    reports.AskFor(wanted);
    if (!Done(batches_[b]->Attend(wanted, stream), "attend")) return;
    Compare(answers, out.data());
    for (int slot = 0; slot < kSlots; ++slot) {
      if (!reports.AreRight(slot, seats_[b][slot] != nullptr))
        Wrong(absl::StrCat(answers.what, ": reports of slot ", slot, " are wrong"));
    }
    return;
  }
  Device& device = runtime_->cuda()->device();
  const uint64_t in_bytes = in.size() * sizeof(float),
                 out_bytes = answers.expected.size() * sizeof(float);
  Graph& graph = graphs_[layer];
  const bool replay = new_tokens == 1 && Below(3) > 0;
  DeviceMemory& memory = replay ? graph.memory : answers.memory;
  if (memory.data() == nullptr) memory = *device.Allocate(in_bytes + out_bytes);
  answers.pinned = *device.AllocatePinned(out_bytes);
  answers.stream = stream;
  float* const base = memory.as<float>();
  Done(device.Copy(base, in.data(), in_bytes, stream), "copy");
  if (!replay || graph.operations.empty()) {
    if (replay) simulation_.BeginCapture();
    Done(batches_[b]->Attend(request(base, base + in.size()), stream), "attend");
    if (replay) graph.operations = simulation_.EndCapture();
  }
  for (size_t i = 0; replay && i < graph.operations.size(); ++i)
    simulation_.Enqueue(stream, graph.operations[i]);
  Done(device.Copy(answers.pinned.data(), base + in.size(), out_bytes, stream), "copy");
  pending_.push_back(std::move(answers));
}

void SimulatedWorld::Check() {
  for (const Answers& answers : pending_) {
    Done(runtime_->cuda()->device().Synchronize(answers.stream), "synchronize");
    Compare(answers, answers.pinned.as<float>());
  }
  pending_.clear();
}

void SimulatedWorld::Compare(const Answers& answers, const float* got) {
  ++answers_;
  for (size_t i = 0; i < answers.expected.size(); ++i) {
    const float expected = answers.expected[i];
    if (std::isnan(expected) || std::abs(got[i] - expected) <= 1e-4f) continue;
    return Wrong(
        absl::StrCat(answers.what, ": number ", i, " is ", got[i], ", must be ", expected));
  }
}

}  // namespace vattn::test
