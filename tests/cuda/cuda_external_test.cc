// Scores of the caller's on CUDA: host arrays as on the CPU backend, device arrays in calls and in
// replayed graphs, every dtype of scores, one and several query tokens.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "tests/cuda/cuda_calls.h"
#include "tests/cuda/cuda_twins.h"

namespace vattn::test {
namespace {

constexpr Shape kShape = {8, 2, 64, 64, false, VATTN_BF16};
constexpr int64_t kStride = 6000;

struct Case {
  const char* name;
  int32_t policy = VATTN_POLICY_VERIFIED;
  int32_t score_heads = 8;
  int32_t scores_dtype = VATTN_F32;
  int query_tokens = 1;
};

vattn_options CaseOptions(const Case& c) {
  vattn_options options = OptionsFor(kShape);
  options.index = VATTN_INDEX_EXTERNAL;
  options.policy = c.policy;
  options.epsilon = .2f;
  options.seed = 3;
  options.host_bytes = 64 << 20;
  return options;
}

// Queries so short that all tokens weigh about the same, as these scores say: a token that changes sides
// by rounding changes no verdict.
constexpr float kSigma = .3f;

// Scores [slots, query tokens, score_heads, kStride].
std::vector<std::byte> ScoresOf(const Case& c, int slots, std::mt19937_64& engine) {
  const int64_t count = int64_t{slots} * c.query_tokens * c.score_heads * kStride;
  return ToBytes(c.scores_dtype, Gaussian(engine, VATTN_F32, count, kSigma));
}

vattn_attend_params With(const Case& c, vattn_attend_params params, const void* scores) {
  params.scores = scores;
  params.scores_dtype = c.scores_dtype;
  params.score_heads = c.score_heads;
  params.scores_stride = kStride;
  return params;
}

class CudaExternalTest : public testing::TestWithParam<Case> {};

TEST_P(CudaExternalTest, AnswersAsTheCpuBackend) {
  SKIP_WITHOUT_DEVICE();
  const Case& c = GetParam();
  Twins twins(CaseOptions(c), {kShape}, {1300, -1, 5000, 200, 3000});
  twins.query_tokens = c.query_tokens;
  AnswerTally tally;
  for (int step = 0; step < 8; ++step) {
    SCOPED_TRACE("step " + std::to_string(step));
    auto [on_cpu, on_cuda] = twins.Calls(0, kSigma);
    const std::vector<std::byte> scores = ScoresOf(c, twins.slots(), twins.engine);
    twins.BeginStep();
    twins.cpu.batch.Attend(With(c, on_cpu.Params(), scores.data()));
    twins.cuda.batch.Attend(With(c, on_cuda.Params(), scores.data()));
    CompareAnswers(twins, on_cpu, on_cuda, tally);
    if (HasFailure()) return;
  }
  ExpectAlike(tally);
}

// One sequence, its batch and its scores on the device.
class Decoder {
 public:
  Decoder(const Case& c, bool captured)
      : case_(c),
        captured_(captured),
        runtime_(Options(c)),
        sequence_(runtime_, 9),
        batch_(runtime_, 1),
        stream_(MakeStream()),
        call_(kShape, 1, 0, VATTN_F32, c.query_tokens),
        arrays_(call_, c.query_tokens) {
    Rows rows;
    rows.AddGaussian(kShape, engine_, 3000);
    AppendRows(sequence_, kShape, 0, rows);
    batch_.Set(0, sequence_);
    const size_t bytes = ScoresOf(case_, 1, engine_).size();
    void* memory = nullptr;
    CheckCuda(cudaMalloc(&memory, bytes), "allocating scores");
    scores_.reset(static_cast<std::byte*>(memory));
  }
  ~Decoder() { cudaStreamSynchronize(stream_.get()); }

  Call Step(int64_t stride = kStride) {
    const std::vector<std::byte> scores = ScoresOf(case_, 1, engine_);
    batch_.BeginStep(case_.query_tokens, stream_.get());
    call_.Fill(engine_, case_.query_tokens, kSigma);
    arrays_.Upload(call_, stream_.get());
    CheckCuda(cudaMemcpyAsync(scores_.get(), scores.data(), scores.size(), cudaMemcpyHostToDevice,
                              stream_.get()),
              "copying scores");
    const auto attend = [&] {
      vattn_attend_params params = With(case_, arrays_.Params(), scores_.get());
      params.scores_stride = stride;
      batch_.Attend(params, stream_.get());
    };
    if (captured_) {
      if (!graph_) graph_ = Capture(stream_.get(), attend);
      CheckCuda(cudaGraphLaunch(graph_.get(), stream_.get()), "launching a graph");
    } else {
      attend();
    }
    arrays_.Download(call_, stream_.get());
    return call_;
  }

 private:
  static vattn_options Options(const Case& c) {
    vattn_options options = CaseOptions(c);
    options.backend = VATTN_BACKEND_CUDA;
    return options;
  }
  struct Free {
    void operator()(std::byte* memory) const { cudaFree(memory); }
  };

  const Case case_;
  const bool captured_;
  const Runtime runtime_;
  Sequence sequence_;
  Batch batch_;
  OwnedStream stream_;
  OwnedGraph graph_;
  std::mt19937_64 engine_{21};
  Call call_;
  DeviceCall arrays_;
  std::unique_ptr<std::byte, Free> scores_;
};

TEST_P(CudaExternalTest, ReplayedStepsGiveTheBitsOfCalls) {
  SKIP_WITHOUT_DEVICE();
  Decoder called(GetParam(), false), replayed(GetParam(), true);
  int64_t sparse = 0;
  for (int step = 0; step < 150; ++step) {
    const Call a = called.Step(), b = replayed.Step();
    ASSERT_TRUE(a.out == b.out && a.verdict == b.verdict && a.selected == b.selected &&
                a.error == b.error)
        << "step " << step;
    for (const int32_t verdict : a.verdict)
      sparse += verdict == VATTN_VERDICT_VERIFIED || verdict == VATTN_VERDICT_BEST_EFFORT;
  }
  EXPECT_GT(sparse, 150);
}

INSTANTIATE_TEST_SUITE_P(
    Cases, CudaExternalTest,
    testing::Values(Case{"verified"}, Case{"verified_by_group", VATTN_POLICY_VERIFIED, 2},
                    Case{"verified_f16", VATTN_POLICY_VERIFIED, 8, VATTN_F16},
                    Case{"verified_bf16_tokens", VATTN_POLICY_VERIFIED, 2, VATTN_BF16, 4},
                    Case{"topk", VATTN_POLICY_TOPK},
                    Case{"topk_bf16_tokens", VATTN_POLICY_TOPK, 8, VATTN_BF16, 3},
                    Case{"topk_uniform", VATTN_POLICY_TOPK_UNIFORM, 2, VATTN_F16}),
    [](const auto& info) { return std::string(info.param.name); });

// A graph that is replayed when the middle has outgrown the array of scores reads nothing behind its
// rows, and verifies nothing.
TEST(CudaExternalGraphTest, ScoresThatAreNotThereLeaveHeadsUnverified) {
  SKIP_WITHOUT_DEVICE();
  Decoder decoder(Case{"verified"}, true);
  constexpr int64_t kEnd = 2880;  // of the middle in the first step
  int verified = 0, dense = 0;
  for (int step = 0; step < 80; ++step) {
    const Call call = decoder.Step(kEnd);
    const bool there = call.middle[0] + 16 <= kEnd;
    for (const int32_t verdict : call.verdict) {
      verified += there && verdict == VATTN_VERDICT_VERIFIED;
      dense += !there;
      if (!there) {
        EXPECT_EQ(verdict, VATTN_VERDICT_DENSE) << "step " << step;
      }
    }
  }
  EXPECT_GT(verified, 0);
  EXPECT_GT(dense, 0);
}

}  // namespace
}  // namespace vattn::test
