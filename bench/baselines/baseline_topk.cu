#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <unordered_set>

#include "bench/baselines/baseline_data.h"
#include "bench/baselines/baseline_hot_set.h"
#include "bench/baselines/baseline_plan.h"
#include "bench/baselines/cuda_baselines.h"
#include "bench/cuda/cuda_timing.h"

namespace vattn::bench {
namespace {

constexpr int kWarmUpSteps = 4;

// The lists of one unit, step after step: uniform tokens, of which a share stays.
class ListMaker {
 public:
  ListMaker(int64_t tokens, int32_t count, double overlap, uint64_t seed)
      : tokens_(tokens),
        renewed_(std::min<int64_t>(std::llround((1 - overlap) * count), tokens - count)),
        random_(seed) {
    while (static_cast<int32_t>(list_.size()) < count) list_.push_back(NewToken());
  }

  const std::vector<int32_t>& list() const { return list_; }
  void Advance() {
    std::vector<int32_t> places(list_.size());
    std::iota(places.begin(), places.end(), 0);
    std::shuffle(places.begin(), places.end(), random_);
    std::vector<int32_t> gone;
    for (int64_t i = 0; i < renewed_; ++i) {
      gone.push_back(list_[places[i]]);
      list_[places[i]] = NewToken();
    }
    for (const int32_t token : gone) used_.erase(token);
  }

 private:
  int32_t NewToken() {
    std::uniform_int_distribution<int64_t> any(0, tokens_ - 1);
    while (true) {
      const auto token = static_cast<int32_t>(any(random_));
      if (used_.insert(token).second) return token;
    }
  }

  const int64_t tokens_, renewed_;
  std::mt19937_64 random_;
  std::vector<int32_t> list_;
  std::unordered_set<int32_t> used_;  // in the list, or renewed in this step
};

// A hot set in the plainest form: its tokens, the least recently used first; -1 is a free slot.
// Tokens used in the same step keep their order, those that were missing come last in the order of
// the list.
void UseTokens(const std::vector<int32_t>& list, std::vector<int32_t>* tokens) {
  const std::unordered_set<int32_t> used(list.begin(), list.end());
  const std::unordered_set<int32_t> present(tokens->begin(), tokens->end());
  const size_t slots = tokens->size();
  std::stable_partition(tokens->begin(), tokens->end(), [&](int32_t t) { return !used.count(t); });
  for (const int32_t token : list) {
    if (!present.count(token)) tokens->push_back(token);
  }
  tokens->erase(tokens->begin(), tokens->end() - static_cast<std::ptrdiff_t>(slots));
}

}  // namespace

struct HotSetTopK::Impl {
  Impl(const BaselineShape& s, const HotSetShape& hot_set)
      : shape(s),
        k(hot_set.k),
        slots(hot_set.slots),
        units(static_cast<int32_t>(shape.lengths.size()) * shape.kv_heads),
        host(shape.bytes(), shape.threads,
             [&](uint64_t* words, size_t first, size_t count) {
               for (size_t i = 0; i < count; ++i) words[i] = DataWord(shape.seed, first + i);
             }),
        hot(static_cast<size_t>(units) * slots * shape.row_bytes()),
        slot_token(std::vector<int32_t>(static_cast<size_t>(units) * slots, -1)),
        order(FirstOrder()),
        slot_of(static_cast<size_t>(units) * k),
        stream(MakeStream()) {
    std::vector<uint64_t> rows;
    std::vector<int32_t> list_counts;
    std::vector<AttendItem> items;
    int64_t row = 0;
    for (int32_t unit = 0; unit < units; ++unit) {
      const int64_t tokens = shape.lengths[unit / shape.kv_heads];
      const auto count = static_cast<int32_t>(std::min<int64_t>(k, tokens));
      first_row.push_back(row);
      rows.push_back(host.device_address() + row * shape.row_bytes());
      list_counts.push_back(count);
      makers.emplace_back(tokens, count, hot_set.overlap, shape.seed * 7919 + unit);
      const int32_t step = ItemTokens(int64_t{units} * k);
      for (int32_t i = 0; i < count; i += step) {
        items.push_back({.rows = hot.data() + int64_t{unit} * slots * shape.row_bytes(),
                         .slot = slot_of.data() + int64_t{unit} * k + i,
                         .tokens = std::min(step, count - i),
                         .unit = unit});
      }
      row += tokens;
    }
    host_rows = DeviceArray<uint64_t>(rows);
    counts = DeviceArray<int32_t>(list_counts);
    plan = std::make_unique<AttendPlan>(items, units, shape.group, shape.head_dim, shape.seed + 1);
  }

  std::vector<int16_t> FirstOrder() const {
    std::vector<int16_t> all(static_cast<size_t>(units) * slots);
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int16_t>(i % slots);
    return all;
  }

  // Lists of the next steps, to the device.
  void MakeLists(int steps) {
    const size_t stride = static_cast<size_t>(units) * k;
    std::vector<int32_t> all(steps * stride);
    for (int step = 0; step < steps; ++step) {
      for (int32_t unit = 0; unit < units; ++unit) {
        makers[unit].Advance();
        const std::vector<int32_t>& list = makers[unit].list();
        std::copy(list.begin(), list.end(), all.begin() + step * stride + size_t{1} * unit * k);
      }
    }
    lists = DeviceArray<int32_t>(all);
    missed = DeviceArray<unsigned long long>(std::vector<unsigned long long>(steps));
    next_step = 0;
  }

  void EnqueueStep() {
    const HotSetParams params = {.tokens = lists.data() + int64_t{next_step} * units * k,
                                 .counts = counts.data(),
                                 .host_rows = host_rows.data(),
                                 .hot_rows = hot.data(),
                                 .slot_token = slot_token.data(),
                                 .order = order.data(),
                                 .slot_of = slot_of.data(),
                                 .missed = missed.data() + next_step,
                                 .units = units,
                                 .k = k,
                                 .slots = slots,
                                 .row_bytes = static_cast<int32_t>(shape.row_bytes())};
    ++next_step;
    CheckCuda(ResolveAndFetch(params, stream.get()), "ResolveAndFetch");
    plan->Attend(0, plan->num_items(), stream.get());
    plan->Merge(stream.get());
  }

  // The tokens in the slots of all units, each unit's least recently used first.
  std::vector<int32_t> TokensInOrder() const {
    const std::vector<int32_t> token = slot_token.Download();
    const std::vector<int16_t> place = order.Download();
    std::vector<int32_t> list(token.size());
    for (size_t i = 0; i < list.size(); ++i) list[i] = token[i / slots * slots + place[i]];
    return list;
  }

  const BaselineShape shape;
  const int32_t k, slots, units;
  HostRegion host;
  DeviceArray<std::byte> hot;
  DeviceArray<int32_t> slot_token;
  DeviceArray<int16_t> order;
  DeviceArray<int32_t> slot_of, counts, lists;
  DeviceArray<uint64_t> host_rows;
  DeviceArray<unsigned long long> missed;  // [steps]
  CudaStream stream;
  std::vector<int64_t> first_row;  // [units] of host
  std::vector<ListMaker> makers;   // [units]
  std::unique_ptr<AttendPlan> plan;
  int next_step = 0;
  double missed_rows = 0;  // a step
};

HotSetTopK::HotSetTopK(const BaselineShape& shape, const HotSetShape& hot_set)
    : impl_(std::make_unique<Impl>(shape, hot_set)) {}
HotSetTopK::~HotSetTopK() = default;

double HotSetTopK::RunMicroseconds(int repetitions) {
  Impl& impl = *impl_;
  impl.MakeLists(kWarmUpSteps + 1 + repetitions);
  for (int i = 0; i < kWarmUpSteps; ++i) impl.EnqueueStep();
  const double us = MedianMicroseconds(repetitions, impl.stream.get(), [&] { impl.EnqueueStep(); });
  const std::vector<unsigned long long> missed = impl.missed.Download();
  impl.missed_rows = std::accumulate(missed.end() - repetitions, missed.end(), 0.) /
                     static_cast<double>(repetitions);
  return us;
}

double HotSetTopK::missed_share() const {
  double rows = 0;
  for (const ListMaker& maker : impl_->makers) rows += static_cast<double>(maker.list().size());
  return impl_->missed_rows / rows;
}

double HotSetTopK::fetched_bytes() const {
  return impl_->missed_rows * static_cast<double>(impl_->shape.row_bytes());
}

double HotSetTopK::Check() {
  Impl& impl = *impl_;
  std::vector<std::vector<int32_t>> expected(impl.units, std::vector<int32_t>(impl.slots, -1));
  const int steps = 4 * impl.slots / impl.k + 4;
  for (int step = 0; step < steps; ++step) {
    impl.MakeLists(1);
    impl.EnqueueStep();
    CheckCuda(cudaStreamSynchronize(impl.stream.get()), "hot set step");
    const std::vector<int32_t> tokens = impl.TokensInOrder();
    for (int32_t unit = 0; unit < impl.units; ++unit) {
      UseTokens(impl.makers[unit].list(), &expected[unit]);
      if (!std::equal(expected[unit].begin(), expected[unit].end(),
                      tokens.begin() + int64_t{unit} * impl.slots)) {
        throw Failure("hot set: step " + std::to_string(step) + ", unit " + std::to_string(unit) +
                      " does not hold the least recently used order");
      }
    }
  }
  return impl.plan->RelativeError([&](int32_t unit) {
    std::vector<const uint16_t*> rows;
    for (const int32_t token : impl.makers[unit].list()) {
      rows.push_back(reinterpret_cast<const uint16_t*>(
          impl.host.data() + (impl.first_row[unit] + token) * impl.shape.row_bytes()));
    }
    return rows;
  });
}

}  // namespace vattn::bench
