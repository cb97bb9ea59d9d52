// Several threads, each with sequences and a batch of its own, on one runtime. What each gets is
// what it gets alone, bit for bit. Says most under ThreadSanitizer.
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/api/attention_model.h"

namespace vattn::test {
namespace {

constexpr int kThreads = 4, kRounds = 3, kSteps = 4, kLayers = 2, kSlots = 2;
constexpr int64_t kPrompt = 700, kMore = 150;
const Shape kShape = {4, 2, 32, 32, false, VATTN_F32};

vattn_options MakeOptions(int32_t workers) {
  vattn_options options = OptionsFor(kShape);
  options.num_layers = kLayers;
  options.num_threads = workers;
  options.window = 32;
  options.exact_below = 64;
  options.epsilon = .2f;
  options.refresh = 4;
  options.host_bytes = 64 << 20;  // room for all: what is refused would depend on the others
  return options;
}

void Append(Sequence& sequence, std::mt19937_64& engine, int64_t count) {
  for (int layer = 0; layer < kLayers; ++layer) {
    Rows rows;
    rows.AddGaussian(kShape, engine, count);
    AppendRows(sequence, kShape, layer, rows);
  }
}

// Everything that one thread was answered.
class Log {
 public:
  template <class T>
  void Add(const std::vector<T>& values) {
    const char* bytes = reinterpret_cast<const char*>(values.data());
    bytes_.insert(bytes_.end(), bytes, bytes + values.size() * sizeof(T));
  }
  void Add(const Call& call) {
    Add(call.out), Add(call.lse), Add(call.error);
    Add(call.verdict), Add(call.selected), Add(call.fetched), Add(call.looks);
    for (const int32_t verdict : call.verdict) verified_ += verdict == VATTN_VERDICT_VERIFIED;
  }
  const std::vector<char>& bytes() const { return bytes_; }
  int verified() const { return verified_; }

 private:
  std::vector<char> bytes_;
  int verified_ = 0;
};

// Decodes with both sequences in one batch.
void Decode(const Runtime& runtime, Sequence& one, Sequence& two, std::mt19937_64& engine,
            Log& log) {
  Batch batch(runtime, kSlots);
  batch.Set(0, one);
  batch.Set(1, two);
  for (int step = 0; step < kSteps; ++step) {
    batch.BeginStep(1);
    for (int layer = 0; layer < kLayers; ++layer) {
      Call call(kShape, kSlots, layer);
      call.Fill(engine, 1, 2);
      batch.Attend(call.Params());
      log.Add(call);
    }
  }
}

// The work of one thread. `shared` is its fork of a prompt that other threads have forks of, too.
// Random numbers depend on ids, so every sequence is given one.
Log Work(const Runtime& runtime, int thread, Sequence shared) {
  std::mt19937_64 engine(static_cast<uint64_t>(thread) + 1);
  uint64_t id = static_cast<uint64_t>(thread + 1) * 1000;
  Log log;
  for (int round = 0; round < kRounds; ++round) {
    Sequence own(runtime, ++id, round == 1 ? kPrompt : 0);
    Append(own, engine, kPrompt);
    Decode(runtime, own, shared, engine, log);
    Sequence fork = own.Fork(++id);
    Append(fork, engine, kMore);  // both write to a tail that they share
    own.Truncate(kPrompt - 100);
    Append(own, engine, kMore);
    Decode(runtime, own, fork, engine, log);
    shared.Truncate(kPrompt - 50 * round);
    vattn_sequence* refused = nullptr;
    vattn_sequence_options too_long = Init<vattn_sequence_options>();
    too_long.reserve_tokens = 1000000 + thread;
    EXPECT_EQ(vattn_sequence_create(runtime.get(), &too_long, &refused), VATTN_FULL);
    EXPECT_NE(std::strstr(vattn_last_error(), "host_bytes"), nullptr) << vattn_last_error();
    EXPECT_EQ(vattn_sequence_truncate(own.get(), -thread - 1), VATTN_INVALID_ARGUMENT);
    EXPECT_EQ(vattn_last_error(),
              "tokens is " + std::to_string(-thread - 1) + ", must be 0 to 2147483648");
  }
  return log;
}

std::vector<Sequence> Forks(const Runtime& runtime) {
  std::mt19937_64 engine(77);
  Sequence prompt(runtime, 1);
  Append(prompt, engine, kPrompt);
  std::vector<Sequence> forks;
  for (int thread = 0; thread < kThreads; ++thread) {
    forks.push_back(prompt.Fork(static_cast<uint64_t>(thread) + 2));
  }
  return forks;
}

void ExpectAnswersAsIfAlone(int32_t workers) {
  std::vector<Log> alone(kThreads), together(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    const Runtime runtime(MakeOptions(1));
    alone[t] = Work(runtime, t, std::move(Forks(runtime)[static_cast<size_t>(t)]));
    EXPECT_GT(alone[t].verified(), 100);
  }

  const Runtime runtime(MakeOptions(workers));
  std::vector<Sequence> forks = Forks(runtime);
  std::atomic<bool> done{false};
  std::thread reader([&] {
    uint64_t steps = 0;
    while (!done) {
      const vattn_stats stats = runtime.Stats();
      EXPECT_GE(stats.steps, steps);
      EXPECT_LE(stats.host_bytes_used, stats.host_bytes_limit);
      steps = stats.steps;
      EXPECT_NE(PrometheusText(runtime).find("vattn_steps"), std::string::npos);
    }
  });
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] { together[t] = Work(runtime, t, std::move(forks[t])); });
  }
  for (std::thread& thread : threads) thread.join();
  done = true;
  reader.join();

  for (int t = 0; t < kThreads; ++t)
    EXPECT_EQ(together[t].bytes(), alone[t].bytes()) << "thread " << t;
  const vattn_stats stats = runtime.Stats();
  EXPECT_EQ(stats.steps, uint64_t{kThreads} * kRounds * 2 * kSteps * kLayers * kSlots);
  EXPECT_EQ(stats.full_refusals, uint64_t{kThreads} * kRounds);
  EXPECT_EQ(stats.host_bytes_used, 0u);
  EXPECT_EQ(stats.sequences, 0u);
  EXPECT_EQ(stats.tokens, 0u);
  EXPECT_EQ(stats.table_bytes, 0u);
}

TEST(ApiThreadsTest, WithoutWorkers) { ExpectAnswersAsIfAlone(1); }

TEST(ApiThreadsTest, WithWorkers) { ExpectAnswersAsIfAlone(2); }

}  // namespace
}  // namespace vattn::test
