// Endurance of the CUDA backend: thousands of graph-replayed steps while sequences start, end,
// fork, truncate and change slots at random in a pool that is now and then full. What is answered
// is compared with float64 attention over copies of the rows that the library never sees.
//
//   cuda_soak [--steps N] [--seed S]
//
// Prints one line; exit code 1 on any mismatch, 77 without a device.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "tests/cuda/cuda_calls.h"
#include "tests/cuda/soak_oracle.h"

namespace vattn::test {
namespace {

constexpr int kLayers = 2, kSlots = 8, kMostAlive = 13;
constexpr int64_t kMostPrompt = 6000, kMostTokens = 7000;
constexpr int kCheckEvery = 50, kCheckedHeads = 3;
constexpr int64_t kMostLeft = 64 << 20;  // device bytes that may stay behind
const Shape kShape = {8, 2, 64, 64, false, VATTN_BF16};

vattn_options MakeOptions(uint64_t seed, int32_t value_bits) {
  vattn_options options = OptionsFor(kShape);
  options.backend = VATTN_BACKEND_CUDA;
  options.num_layers = kLayers;
  options.num_threads = 0;
  options.epsilon = .2f;
  options.hot_share = .01f;
  options.value_bits = value_bits;
  options.seed = seed;
  options.host_bytes = uint64_t{36} << 20;  // about 120,000 rows: half of what may be alive
  return options;
}

// Gaussian numbers for millions of rows: pieces of one table.
class Noise {
 public:
  explicit Noise(uint64_t seed) : engine_(seed), table_(Gaussian(engine_, VATTN_BF16, kSize, 1)) {}
  std::vector<float> operator()(int64_t count) {
    std::vector<float> values(static_cast<size_t>(count));
    for (int64_t at = 0; at < count;) {
      const int64_t from = Below(kSize), size = std::min(count - at, kSize - from);
      std::copy_n(table_.begin() + from, size, values.begin() + at);
      at += size;
    }
    return values;
  }
  int64_t Below(int64_t end) {
    return static_cast<int64_t>(engine_() % static_cast<uint64_t>(end));
  }
  bool Chance(double probability) {
    return static_cast<double>(engine_() >> 11) * 0x1p-53 < probability;
  }

 private:
  static constexpr int64_t kSize = 1 << 20;
  std::mt19937_64 engine_;
  std::vector<float> table_;
};

struct Known {
  explicit Known(Sequence&& made) : sequence(std::move(made)) {}

  Sequence sequence;
  Rows rows[kLayers];
  int slot = -1;
};

struct Counts {
  int64_t started = 0, ended = 0, forked = 0, truncated = 0, moved = 0, full = 0;
};

class Soak {
 public:
  Soak(uint64_t seed, int32_t value_bits)
      : options_(MakeOptions(seed, value_bits)),
        noise_(seed),
        runtime_(options_),
        batch_(runtime_, kSlots),
        stream_(MakeStream()) {
    for (int l = 0; l < kLayers; ++l) {
      calls_.emplace_back(kShape, kSlots, l);
      FillCall(calls_[l]);
      arrays_.emplace_back(calls_[l], 1);
    }
  }
  ~Soak() { cudaStreamSynchronize(stream_.get()); }

  void Run(int64_t steps) {
    for (step_ = 0; step_ < steps; ++step_) {
      Shuffle();
      if (Step() && step_ % kCheckEvery == 0) CheckAnswers();
    }
    CheckLengths();
  }

  // Ends everything; the pool must be empty then.
  void Finish() {
    CheckCuda(cudaStreamSynchronize(stream_.get()), "waiting for the last step");
    while (!known_.empty()) End(0);
    const vattn_stats stats = runtime_.Stats();
    Expect(stats.host_bytes_used == 0,
           "pool bytes in use at the end: " + std::to_string(stats.host_bytes_used));
    Expect(stats.sequences == 0 && stats.tokens == 0, "sequences or tokens left at the end");
    Expect(stats.full_refusals == static_cast<uint64_t>(counts_.full),
           "full_refusals does not add up");
    Expect(counts_.full > 0 || step_ < 2000, "the pool was never full");
    oracle_.Finish();
  }
  const Counts& counts() const { return counts_; }
  const OracleCounts& checks() const { return oracle_.counts(); }

 private:
  void FillCall(Call& call) {
    call.q = noise_(int64_t{kSlots} * kShape.q_heads * kShape.dim_k);
    for (float& x : call.q) x *= 2;
    call.k_new = noise_(int64_t{kSlots} * kShape.kv_heads * kShape.dim_k);
    call.v_new = noise_(int64_t{kSlots} * kShape.kv_heads * kShape.dim_v);
  }

  // False if the pool was full, which changes nothing.
  template <class F>
  bool Try(F&& call) {
    try {
      call();
      return true;
    } catch (const Error& error) {
      if (error.code() != VATTN_FULL) throw;
      ++counts_.full;
      return false;
    }
  }

  int FreeSlot() const {
    bool taken[kSlots] = {};
    for (const auto& one : known_) {
      if (one->slot >= 0) taken[one->slot] = true;
    }
    return static_cast<int>(std::find(taken, taken + kSlots, false) - taken);
  }
  bool CanStart() const { return known_.size() < kMostAlive; }
  size_t AnyOne() { return static_cast<size_t>(noise_.Below(static_cast<int64_t>(known_.size()))); }

  void End(size_t index) {
    known_.erase(known_.begin() + static_cast<ptrdiff_t>(index));
    ++counts_.ended;
  }

  void Start() {
    auto one = std::make_unique<Known>(Sequence(runtime_));
    const int64_t count = 1 + noise_.Below(noise_.Chance(.2) ? 400 : kMostPrompt);
    if (!Append(*one, count)) return;
    known_.push_back(std::move(one));
    ++counts_.started;
  }

  bool Append(Known& one, int64_t count) {
    for (int l = 0; l < kLayers; ++l) {
      const int64_t before = one.rows[l].tokens;
      one.rows[l].Add(kShape, noise_(count * kShape.kv_heads * kShape.dim_k),
                      noise_(count * kShape.kv_heads * kShape.dim_v));
      if (Try([&] { AppendRows(one.sequence, kShape, l, one.rows[l], before); })) continue;
      // As it was: layers that went through are taken back.
      one.sequence.Truncate(before);
      for (int back = 0; back <= l; ++back) one.rows[back].Truncate(kShape, before);
      return false;
    }
    return true;
  }

  void Truncate(Known& one) {
    const int64_t tokens = 1 + noise_.Below(one.rows[0].tokens);
    one.sequence.Truncate(tokens);
    for (Rows& rows : one.rows) rows.Truncate(kShape, tokens);
    ++counts_.truncated;
    if (noise_.Chance(.5)) Append(one, 1 + noise_.Below(500));
  }

  void Fork(size_t index) {
    auto fork = std::make_unique<Known>(known_[index]->sequence.Fork());
    std::copy_n(known_[index]->rows, kLayers, fork->rows);
    known_.push_back(std::move(fork));
    ++counts_.forked;
  }

  void Move(Known& one) {
    if (one.slot >= 0) {
      batch_.Clear(one.slot);
      one.slot = -1;
    }
    ++counts_.moved;
  }

  // What an engine does between steps.
  void Shuffle() {
    if (CanStart() && (known_.empty() || noise_.Chance(.08))) Start();
    if (known_.empty()) return;
    if (noise_.Chance(.005) || (!CanStart() && noise_.Chance(.02))) End(AnyOne());
    if (!known_.empty() && CanStart() && noise_.Chance(.01)) Fork(AnyOne());
    if (!known_.empty() && noise_.Chance(.008)) Truncate(*known_[AnyOne()]);
    if (!known_.empty() && noise_.Chance(.01)) Move(*known_[AnyOne()]);
    for (size_t i = 0; i < known_.size(); ++i) {
      if (known_[i]->rows[0].tokens >= kMostTokens) End(i--);
    }
    // Waiting ones take the free slots, from a random one on.
    for (size_t i = 0, from = known_.empty() ? 0 : AnyOne(); i < known_.size(); ++i) {
      Known& one = *known_[(from + i) % known_.size()];
      const int slot = FreeSlot();
      if (slot == kSlots) break;
      if (one.slot >= 0 || noise_.Chance(.3)) continue;
      batch_.Set(slot, one.sequence);
      one.slot = slot;
    }
  }

  // False if there was no room: then one sequence ends, so that there is some.
  bool Step() {
    if (!Try([&] { batch_.BeginStep(1, stream_.get()); })) {
      End(AnyOne());
      return false;
    }
    for (int l = 0; l < kLayers; ++l) {
      FillCall(calls_[l]);
      arrays_[l].Upload(calls_[l], stream_.get());
      for (const auto& one : known_) {
        if (one->slot >= 0) calls_[l].AddTo(one->rows[l], one->slot);
      }
    }
    if (!graph_) {
      graph_ = Capture(stream_.get(), [&] {
        for (int l = 0; l < kLayers; ++l) batch_.Attend(arrays_[l].Params(), stream_.get());
      });
    }
    CheckCuda(cudaGraphLaunch(graph_.get(), stream_.get()), "launching the graph");
    return true;
  }

  void CheckLengths() const {
    for (const auto& one : known_) {
      for (int l = 0; l < kLayers; ++l) {
        Expect(one->sequence.Length(l) == one->rows[l].tokens,
               "a sequence has another length than its copy");
      }
    }
  }

  void CheckAnswers() {
    CheckLengths();
    for (int l = 0; l < kLayers; ++l) {
      arrays_[l].Download(calls_[l], stream_.get());
      for (const auto& one : known_) {
        for (int i = 0; i < kCheckedHeads && one->slot >= 0; ++i) {
          oracle_.Check(calls_[l], one->slot, static_cast<int>(noise_.Below(kShape.q_heads)),
                        one->rows[l], step_);
        }
      }
    }
  }

  const vattn_options options_;
  Noise noise_;
  const Runtime runtime_;
  std::vector<std::unique_ptr<Known>> known_;
  Batch batch_;
  OwnedStream stream_;
  OwnedGraph graph_;
  std::vector<Call> calls_;
  std::vector<DeviceCall> arrays_;
  Counts counts_;
  SoakOracle oracle_{options_};
  int64_t step_ = 0;
};

// With what it did as text.
std::string RunSoak(int64_t steps, uint64_t seed, int32_t value_bits) {
  Soak soak(seed, value_bits);
  soak.Run(steps);
  soak.Finish();
  const Counts& c = soak.counts();
  const OracleCounts& o = soak.checks();
  const auto number = [](int64_t value) { return static_cast<long long>(value); };
  char text[512];
  std::snprintf(
      text, sizeof(text),
      "%lld started, %lld ended, %lld forked, %lld truncated, %lld moved, %lld times full; heads "
      "checked: %lld exact (worst %.2g of what is allowed), %lld dense, %lld verified, %lld of "
      "them failures (worst %.2g of epsilon)",
      number(c.started), number(c.ended), number(c.forked), number(c.truncated), number(c.moved),
      number(c.full), number(o.exact), o.worst_exact, number(o.dense), number(o.verified),
      number(o.failures), o.worst_verified);
  return text;
}

int Main(int64_t steps, uint64_t seed, int32_t value_bits) {
  const std::string missing = NoDevice();
  if (!missing.empty()) {
    std::fprintf(stderr, "skipped: no CUDA device: %s\n", missing.c_str());
    return 77;
  }
  const auto start = std::chrono::steady_clock::now();
  RunSoak(60, seed + 1, value_bits);  // what CUDA takes once and keeps
  const int64_t before = DeviceBytesUsed();
  const std::string done = RunSoak(steps, seed, value_bits);
  const int64_t left = DeviceBytesUsed() - before;
  Expect(left <= kMostLeft, "device bytes left behind: " + std::to_string(left));
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("cuda_soak ok: %lld steps, seed %llu, %.0f s; %s; %lld device bytes left\n",
              static_cast<long long>(steps), static_cast<unsigned long long>(seed), seconds.count(),
              done.c_str(), static_cast<long long>(left));
  return 0;
}

}  // namespace
}  // namespace vattn::test

int main(int argc, char** argv) {
  int64_t steps = 10000;
  uint64_t seed = 1;
  int32_t value_bits = 0;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--steps") == 0 && i + 1 < argc) {
      steps = std::strtoll(argv[++i], nullptr, 10);
    } else if (std::strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (std::strcmp(argv[i], "--value-bits") == 0 && i + 1 < argc) {
      value_bits = static_cast<int32_t>(std::strtol(argv[++i], nullptr, 10));
    } else {
      std::fprintf(stderr, "usage: cuda_soak [--steps N] [--seed S] [--value-bits B]\n");
      return 2;
    }
  }
  try {
    return vattn::test::Main(steps, seed, value_bits);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cuda_soak failed (--steps %lld --seed %llu --value-bits %d): %s\n",
                 static_cast<long long>(steps), static_cast<unsigned long long>(seed),
                 static_cast<int>(value_bits), error.what());
    return 1;
  }
}
