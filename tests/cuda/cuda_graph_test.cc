// Captured steps: a graph that holds the attention of one step answers every later one with the
// bits that calls give, and the same work gives the same bits each time, whatever order the hot set
// is filled in.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "tests/cuda/cuda_calls.h"

namespace vattn::test {
namespace {

constexpr int kLayers = 2;
// Through the first sampled length (1216) and borders of blocks (256), codes (64) and of working
// memory (4096 tokens) within 200 steps; one slot is empty.
const std::vector<int64_t> kLengths = {1100, 1500, -1, 2990, 4000, 30};

Shape LayerShape(int layer) { return {8, layer == 0 ? 2 : 1, 64, 64, false, VATTN_BF16}; }

// What a decoder is asked for beside the defaults.
struct Setting {
  float hot_share = .05f;
  int32_t value_bits = 0, policy = VATTN_POLICY_VERIFIED, index = VATTN_INDEX_BALANCED;
  int query_tokens = 1;
};

vattn_options MakeOptions(const Setting& setting) {
  static const int32_t kHeads[kLayers] = {2, 1};
  vattn_options options = OptionsFor(LayerShape(0));
  options.backend = VATTN_BACKEND_CUDA;
  options.num_layers = kLayers;
  options.layer_kv_heads = kHeads;
  options.policy = setting.policy;
  options.index = setting.index;
  options.epsilon = .2f;
  options.hot_share = setting.hot_share;
  options.value_bits = setting.value_bits;
  options.host_bytes = 64 << 20;
  return options;
}

// All that a step answers and that is promised to be the same.
struct Answers {
  explicit Answers(const Call& call)
      : out(call.out),
        lse(call.lse),
        error(call.error),
        verdict(call.verdict),
        selected(call.selected),
        looks(call.looks),
        middle(call.middle) {}
  bool operator==(const Answers&) const = default;

  std::vector<std::byte> out;
  std::vector<float> lse, error;
  std::vector<int32_t> verdict, selected, looks;
  std::vector<int64_t> middle;
};

// Sequences in a batch, decoded step by step on a stream of their own.
class Decoder {
 public:
  // captured: from the second step on one graph answers, from the first one with warm = false.
  Decoder(const Setting& setting, bool captured, bool warm = true)
      : captured_(captured),
        warm_(warm),
        query_tokens_(setting.query_tokens),
        runtime_(MakeOptions(setting)),
        batch_(runtime_, static_cast<int32_t>(kLengths.size())),
        stream_(MakeStream()) {
    for (size_t s = 0; s < kLengths.size(); ++s) {
      sequences_.emplace_back(runtime_, 10 + s);
      if (kLengths[s] < 0) continue;
      Append(static_cast<int>(s), kLengths[s]);
      batch_.Set(static_cast<int32_t>(s), sequences_[s]);
    }
    for (int l = 0; l < kLayers; ++l) {
      calls_.emplace_back(LayerShape(l), static_cast<int>(kLengths.size()), l, VATTN_F32,
                          query_tokens_);
      calls_[l].Fill(engine_, query_tokens_, 2);
      arrays_.emplace_back(calls_[l], query_tokens_);
    }
  }
  ~Decoder() { cudaStreamSynchronize(stream_.get()); }

  void Append(int slot, int64_t count) {
    for (int l = 0; l < kLayers; ++l) {
      Rows rows;
      rows.AddGaussian(LayerShape(l), engine_, count);
      AppendRows(sequences_[slot], LayerShape(l), l, rows);
    }
  }
  void Truncate(int slot, int64_t tokens) { sequences_[slot].Truncate(tokens); }
  // A fork with random numbers of its own takes the place of the sequence.
  void ReplaceByFork(int slot) {
    Sequence fork = sequences_[slot].Fork(77 + static_cast<uint64_t>(slot));
    batch_.Clear(slot);
    sequences_[slot] = std::move(fork);
    batch_.Set(slot, sequences_[slot]);
  }
  void Clear() {
    for (size_t s = 0; s < kLengths.size(); ++s) batch_.Clear(static_cast<int32_t>(s));
  }
  int64_t Length(int slot) const { return sequences_[slot].Length(0); }

  std::vector<Answers> Step() { return StepOf(query_tokens_); }
  // A step that is begun for another number of tokens than its calls are made for.
  std::vector<Answers> StepOf(int new_tokens) {
    batch_.BeginStep(new_tokens, stream_.get());
    for (int l = 0; l < kLayers; ++l) {
      calls_[l].Fill(engine_, query_tokens_, 2);
      arrays_[l].Upload(calls_[l], stream_.get());
    }
    const auto attend = [&] {
      for (int l = 0; l < kLayers; ++l) batch_.Attend(arrays_[l].Params(), stream_.get());
    };
    if (captured_ && (steps_ > 0 || !warm_)) {
      if (!graph_) graph_ = Capture(stream_.get(), attend);
      CheckCuda(cudaGraphLaunch(graph_.get(), stream_.get()), "launching a graph");
    } else {
      attend();
    }
    ++steps_;
    std::vector<Answers> answers;
    for (int l = 0; l < kLayers; ++l) {
      arrays_[l].Download(calls_[l], stream_.get());
      answers.emplace_back(calls_[l]);
    }
    return answers;
  }

 private:
  const bool captured_, warm_;
  const int query_tokens_;
  const Runtime runtime_;
  std::vector<Sequence> sequences_;
  Batch batch_;
  OwnedStream stream_;
  OwnedGraph graph_;
  std::mt19937_64 engine_{21};
  std::vector<Call> calls_;
  std::vector<DeviceCall> arrays_;
  int steps_ = 0;
};

// Heads that left rows out.
int64_t CountSparse(const std::vector<Answers>& answers) {
  int64_t count = 0;
  for (const Answers& one : answers) {
    count += std::count_if(one.verdict.begin(), one.verdict.end(), [](int32_t verdict) {
      return verdict == VATTN_VERDICT_VERIFIED || verdict == VATTN_VERDICT_BEST_EFFORT;
    });
  }
  return count;
}

// The same steps with both, and changes of sequences between them.
void ExpectSameBits(Decoder& a, Decoder& b) {
  int64_t sparse = 0;
  const auto steps = [&](int count, const char* when) {
    for (int step = 0; step < count; ++step) {
      const std::vector<Answers> mine = a.Step(), theirs = b.Step();
      for (int l = 0; l < kLayers; ++l) {
        ASSERT_TRUE(mine[l] == theirs[l]) << when << ", step " << step << ", layer " << l;
      }
      sparse += CountSparse(mine);
    }
  };
  steps(200, "growing");
  if (testing::Test::HasFailure()) return;
  EXPECT_EQ(a.Length(4), 4200);
  for (Decoder* one : {&a, &b}) {
    one->Truncate(0, 1250);  // into a block, where steps wrote other rows before
    one->Append(0, 333);
    one->Truncate(3, 1024);  // below what is sampled, and onto a border
    one->Append(3, 2000);
    one->Truncate(5, 3);
  }
  steps(70, "after truncate and append");
  if (testing::Test::HasFailure()) return;
  for (Decoder* one : {&a, &b}) {
    one->ReplaceByFork(1);
    one->ReplaceByFork(4);
    one->Append(5, 1400);
  }
  steps(70, "after forks");
  EXPECT_GT(sparse, 1000);
}

// First, while no kernel has run in this process: captured before anything else was launched.
TEST(CudaGraphTest, AFirstStepCanBeCaptured) {
  SKIP_WITHOUT_DEVICE();
  Decoder captured({}, true, /*warm=*/false), called({}, false);
  for (int step = 0; step < 3; ++step) {
    const std::vector<Answers> a = captured.Step(), b = called.Step();
    for (int l = 0; l < kLayers; ++l) ASSERT_TRUE(a[l] == b[l]) << "step " << step;
  }
}

TEST(CudaGraphTest, ReplayedStepsGiveTheBitsOfCalls) {
  SKIP_WITHOUT_DEVICE();
  Decoder called({}, false), replayed({}, true);
  ExpectSameBits(called, replayed);
}

TEST(CudaGraphTest, ReplayedStepsGiveTheBitsOfCallsWithValueCodes) {
  SKIP_WITHOUT_DEVICE();
  for (const int32_t bits : {2, 4}) {
    SCOPED_TRACE("value_bits " + std::to_string(bits));
    Decoder called({.value_bits = bits}, false), replayed({.value_bits = bits}, true);
    ExpectSameBits(called, replayed);
  }
}

TEST(CudaGraphTest, SoItIsWithEveryPolicyAndIndex) {
  SKIP_WITHOUT_DEVICE();
  constexpr Setting kSettings[] = {
      {.policy = VATTN_POLICY_TOPK},
      {.policy = VATTN_POLICY_TOPK_UNIFORM},
      {.policy = VATTN_POLICY_TOPK, .index = VATTN_INDEX_EXACT},
      {.value_bits = 2, .policy = VATTN_POLICY_TOPK_UNIFORM, .index = VATTN_INDEX_EXACT},
      {.index = VATTN_INDEX_EXACT},
      {.value_bits = 4, .index = VATTN_INDEX_EXACT}};
  for (Setting setting : kSettings) {
    SCOPED_TRACE("policy " + std::to_string(setting.policy) + ", index " +
                 std::to_string(setting.index));
    Decoder called(setting, false);
    setting.hot_share = .004f;  // where rows come from changes nothing
    Decoder replayed(setting, true);
    ExpectSameBits(called, replayed);
  }
}

// A hot set so small that it is overwritten all the time.
TEST(CudaGraphTest, TheSameWorkGivesTheSameBits) {
  SKIP_WITHOUT_DEVICE();
  Decoder first({.hot_share = .004f}, true), second({.hot_share = .004f}, true);
  ExpectSameBits(first, second);
}

// A replay with nobody in the batch leaves the answers of the last step where they are.
TEST(CudaGraphTest, AnEmptyBatchWritesNothing) {
  SKIP_WITHOUT_DEVICE();
  Decoder decoder({}, true);
  for (int step = 0; step < 10; ++step) decoder.Step();
  const std::vector<Answers> last = decoder.Step();
  decoder.Clear();
  for (int step = 0; step < 6; ++step) {
    const std::vector<Answers> after = decoder.Step();
    for (int l = 0; l < kLayers; ++l) ASSERT_TRUE(after[l] == last[l]) << "step " << step;
  }
}

TEST(CudaGraphTest, ReplayedStepsOfSeveralTokensGiveTheBitsOfCalls) {
  SKIP_WITHOUT_DEVICE();
  for (const int32_t policy : {VATTN_POLICY_VERIFIED, VATTN_POLICY_TOPK, VATTN_POLICY_DENSE}) {
    const Setting setting{.policy = policy, .query_tokens = 4};
    Decoder called(setting, false), replayed(setting, true);
    for (int step = 0; step < 40; ++step) {
      const std::vector<Answers> a = called.Step(), b = replayed.Step();
      for (int l = 0; l < kLayers; ++l) ASSERT_TRUE(a[l] == b[l]) << policy << " step " << step;
    }
  }
}

// A graph that was captured for another number of tokens than the step was begun for answers
// nothing, and reads and writes nothing that is not there.
TEST(CudaGraphTest, AGraphOfAnotherNumberOfTokensAnswersNothing) {
  SKIP_WITHOUT_DEVICE();
  for (const int tokens : {1, 4}) {
    Decoder decoder({.query_tokens = tokens}, true);
    for (int step = 0; step < 3; ++step) decoder.Step();
    const std::vector<Answers> last = decoder.Step(), after = decoder.StepOf(5 - tokens);
    for (int l = 0; l < kLayers; ++l) ASSERT_TRUE(after[l] == last[l]) << tokens;
  }
}

// Where rows come from changes nothing: no hot set, a small one, one that holds all.
TEST(CudaGraphTest, TheHotSetChangesNoBit) {
  SKIP_WITHOUT_DEVICE();
  for (const float share : {.004f, 1.f}) {
    SCOPED_TRACE("hot_share " + std::to_string(share));
    Decoder without({.hot_share = 0}, false), with({.hot_share = share}, false);
    ExpectSameBits(without, with);
  }
}

}  // namespace
}  // namespace vattn::test
