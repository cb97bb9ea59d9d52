// A device that is lost in the middle of decoding: calls say so, nothing hangs, sequences are saved
// from the host's copy, and everything can be destroyed. One test: the process has no device
// afterwards.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <string>

#include "tests/cuda/cuda_calls.h"
#include "tests/cuda/cuda_trap.h"

namespace vattn::test {
namespace {

constexpr unsigned kMostSeconds = 30;  // SIGALRM ends the process then
constexpr int64_t kPrompt = 3000;
constexpr int kSteps = 80;  // so that steps, too, have coded tokens
const Shape kShape = {8, 2, 64, 64, false, VATTN_BF16};

vattn_options MakeOptions(int32_t backend) {
  vattn_options options = OptionsFor(kShape);
  options.backend = backend;
  options.epsilon = .2f;
  return options;
}

// The code and text of a call that must fail because of the device.
void ExpectLost(vattn_code code, const char* call) {
  EXPECT_TRUE(code == VATTN_DEVICE_LOST || code == VATTN_DEVICE_ERROR)
      << call << " gave " << vattn_code_name(code) << ": " << vattn_last_error();
  EXPECT_NE(std::string(vattn_last_error()).find("device"), std::string::npos)
      << vattn_last_error();
}

// Restored on the CPU, the sequence answers from the rows of every step that had ended.
void ExpectRestores(const std::string& path, const Rows& rows, std::mt19937_64& engine,
                    int32_t policy) {
  vattn_options options = MakeOptions(VATTN_BACKEND_CPU);
  options.policy = policy;
  const Runtime runtime(options);
  Sequence sequence = Sequence::Restore(runtime, path);
  EXPECT_GE(sequence.Length(0), rows.tokens);
  sequence.Truncate(rows.tokens);  // the step in which the device was lost does not count
  Batch batch(runtime, 1);
  batch.Set(0, sequence);
  Call call(kShape, 1, 0);
  call.Fill(engine, 0, 2);
  batch.BeginStep(0);
  batch.Attend(call.Params());
  if (policy == VATTN_POLICY_DENSE) return ExpectExact(call, 0, rows);
  EXPECT_GT(call.middle[0], 2500);
  for (int h = 0; h < kShape.q_heads; ++h) {
    const Answer answer = Attend(kShape, rows, h / 4, call.Query(0, h));
    EXPECT_LE(Distance(answer, call.Out(0, h).data()),
              2 * double{options.epsilon} * std::max(answer.norm, .5 * answer.rms_value));
    EXPECT_NE(call.verdict[h], VATTN_VERDICT_BEST_EFFORT);
  }
}

TEST(CudaLostTest, CallsSaySoAndSequencesAreSaved) {
  SKIP_WITHOUT_DEVICE();
  alarm(kMostSeconds);
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("cuda_lost_test." + std::to_string(getpid()));
  std::filesystem::create_directory(folder);
  std::mt19937_64 engine(3);
  Rows rows;
  rows.AddGaussian(kShape, engine, kPrompt);
  {
    const Runtime runtime(MakeOptions(VATTN_BACKEND_CUDA));
    Sequence sequence(runtime);
    AppendRows(sequence, kShape, 0, rows);
    Batch batch(runtime, 1);
    batch.Set(0, sequence);
    Call call(kShape, 1, 0);
    for (int step = 0; step < kSteps; ++step) {
      call.Fill(engine, 1, 2);
      batch.BeginStep(1);
      batch.Attend(call.Params());
      call.AddTo(rows, 0);
    }
    EXPECT_EQ(std::count(call.verdict.begin(), call.verdict.end(), -7), 0);
    batch.BeginStep(1);
    const OwnedStream stream = MakeStream();
    EXPECT_NE(TrapDevice(stream.get()), cudaSuccess);

    const vattn_attend_params params = call.Params();
    ExpectLost(vattn_attend(batch.get(), &params, nullptr), "vattn_attend");
    ExpectLost(vattn_attend(batch.get(), &params, nullptr), "vattn_attend again");
    ExpectLost(vattn_batch_begin_step(batch.get(), 1, nullptr), "vattn_batch_begin_step");
    ExpectLost(vattn_sequence_truncate(sequence.get(), 10), "vattn_sequence_truncate");
    vattn_sequence* fork = nullptr;
    ExpectLost(vattn_sequence_fork(sequence.get(), 0, &fork), "vattn_sequence_fork");
    EXPECT_EQ(fork, nullptr);
    EXPECT_EQ(sequence.Length(0), rows.tokens + 1);
    vattn_stats stats;
    EXPECT_EQ(vattn_runtime_stats(runtime.get(), &stats, sizeof(stats)), VATTN_OK);
    EXPECT_EQ(stats.sequences, 1u);
    sequence.Save(folder / "saved");
    vattn_runtime* another = nullptr;
    const vattn_options options = MakeOptions(VATTN_BACKEND_CUDA);
    EXPECT_NE(vattn_runtime_create(&options, &another), VATTN_OK);
    EXPECT_EQ(another, nullptr);
  }
  ExpectRestores(folder / "saved", rows, engine, VATTN_POLICY_DENSE);
  ExpectRestores(folder / "saved", rows, engine, VATTN_POLICY_VERIFIED);
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace vattn::test
