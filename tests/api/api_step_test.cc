// Steps that are given up half way: everything is as before, on every backend.
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "tests/api/attention_model.h"
#include "tests/api/backend.h"

namespace vattn::test {
namespace {

constexpr int kLayers = 3, kSlots = 2;
const Shape kShape = {4, 2, 64, 64, false, VATTN_F32};

std::string CodeOf(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "OK";
}

// Two sequences in a batch, and the rows that they hold.
class World {
 public:
  World(const vattn_options& options, int64_t tokens, int64_t reserve)
      : runtime_(options), batch_(std::make_unique<Batch>(runtime_, kSlots)) {
    for (int s = 0; s < kSlots; ++s) {
      sequences_.emplace_back(runtime_, static_cast<uint64_t>(s) + 1, reserve);
      std::mt19937_64 engine(s);
      for (int layer = 0; layer < kLayers; ++layer) {
        rows_[s][layer].AddGaussian(kShape, engine, tokens + s, 2);
        AppendRows(sequences_[s], kShape, layer, rows_[s][layer]);
      }
      batch_->Set(s, sequences_[s]);
    }
  }

  // A step with these numbers, up to so many layers; a whole one counts.
  std::vector<Call> Step(uint64_t numbers, int layers = kLayers, int new_tokens = 1) {
    std::mt19937_64 engine(numbers);
    std::vector<Call> calls;
    batch_->BeginStep(new_tokens);
    for (int layer = 0; layer < layers; ++layer) {
      calls.emplace_back(kShape, kSlots, layer);
      calls.back().Fill(engine, new_tokens, 2);
      batch_->Attend(calls.back().Params());
    }
    for (int s = 0; s < kSlots && layers == kLayers && new_tokens == 1; ++s) {
      for (int layer = 0; layer < kLayers; ++layer) calls[layer].AddTo(rows_[s][layer], s);
    }
    return calls;
  }
  void ForgetStep() {
    for (auto& layers : rows_) {
      for (Rows& rows : layers) rows.Truncate(kShape, rows.tokens - 1);
    }
  }
  void ExpectLengths() const {
    for (int s = 0; s < kSlots; ++s) {
      for (int layer = 0; layer < kLayers; ++layer) {
        EXPECT_EQ(sequences_[s].Length(layer), rows_[s][layer].tokens)
            << "slot " << s << ", layer " << layer;
      }
    }
  }

  Runtime runtime_;
  std::vector<Sequence> sequences_;
  std::unique_ptr<Batch> batch_;
  Rows rows_[kSlots][kLayers];
};

vattn_options SampledOptions() {
  vattn_options options = OptionsFor(kShape);
  options.num_layers = kLayers;
  options.window = 64;
  options.exact_below = 128;
  options.refresh = 4;
  options.host_bytes = 64 << 20;
  return options;
}

// Beside a twin that never gave a step up: on the CPU its answers are equal to the bit, across the
// edges of blocks (256) and of codes (64), with and without a reservation.
TEST(ApiStepTest, AbandonedStepsLeaveNoTrace) {
  for (const int64_t reserve : {0, 700}) {
    SCOPED_TRACE("reserve " + std::to_string(reserve));
    const vattn_options options = SampledOptions();
    World world(options, 500, reserve), twin(options, 500, reserve);
    for (uint64_t step = 0; step < 24; ++step) {
      SCOPED_TRACE("step " + std::to_string(step));
      const uint64_t used = world.runtime_.Stats().host_bytes_used;
      for (int layers = 0; layers <= kLayers; ++layers) {
        world.Step(1000 + step * 10 + static_cast<uint64_t>(layers), layers);
        if (layers == kLayers) world.ForgetStep();
        world.batch_->Abandon();
        world.batch_->Abandon();  // no step is open
        world.ExpectLengths();
        EXPECT_EQ(world.runtime_.Stats().host_bytes_used, used);
      }
      world.Step(7, 1, 0);  // without a token, too
      world.batch_->Abandon();
      const std::vector<Call> got = world.Step(step), want = twin.Step(step);
      for (int layer = 0; layer < kLayers && !OnCuda(); ++layer) {
        EXPECT_EQ(got[layer].out, want[layer].out) << "layer " << layer;
        EXPECT_EQ(got[layer].error, want[layer].error) << "layer " << layer;
        EXPECT_EQ(got[layer].selected, want[layer].selected) << "layer " << layer;
      }
      world.ExpectLengths();
    }
    EXPECT_EQ(world.runtime_.Stats().host_bytes_used, twin.runtime_.Stats().host_bytes_used);
    EXPECT_EQ(world.runtime_.Stats().host_bytes_reserved,
              twin.runtime_.Stats().host_bytes_reserved);
  }
}

// What follows an abandoned step is exact attention over what was there before: steps, appends,
// forks.
TEST(ApiStepTest, AnswersAfterwardsAreExact) {
  vattn_options options = SampledOptions();
  options.policy = VATTN_POLICY_DENSE;
  World world(options, 511, 0);
  for (uint64_t step = 0; step < 6; ++step) {
    world.Step(100 + step, static_cast<int>(step) % kLayers);
    world.batch_->Abandon();
    EXPECT_NE(CodeOf([&] {
                world.batch_->Attend(Call(kShape, kSlots, 0).Params());
              }).find("no step is open"),
              std::string::npos);
    std::mt19937_64 engine(step);
    for (int layer = 0; layer < kLayers; ++layer) {
      const int64_t before = world.rows_[0][layer].tokens;
      world.rows_[0][layer].AddGaussian(kShape, engine, 3, 2);
      AppendRows(world.sequences_[0], kShape, layer, world.rows_[0][layer], before);
    }
    const Sequence fork = world.sequences_[1].Fork();
    EXPECT_EQ(fork.Length(2), world.rows_[1][2].tokens);
    const std::vector<Call> calls = world.Step(step);
    for (int s = 0; s < kSlots; ++s) {
      for (int layer = 0; layer < kLayers; ++layer)
        ExpectExact(calls[layer], s, world.rows_[s][layer]);
    }
  }
}

// A sequence that leaves in the middle of a step has no half token, however it leaves. (On CUDA,
// where a step counts from its begin, it keeps the whole one.)
TEST(ApiStepTest, LeavingGivesTheStepUp) {
  if (OnCuda()) GTEST_SKIP() << "steps count from their begin";
  World world(SampledOptions(), 512, 600);
  const uint64_t used = world.runtime_.Stats().host_bytes_used;
  world.Step(1, 2);
  world.batch_->Clear(0);
  EXPECT_EQ(world.sequences_[0].Length(0), 512);
  EXPECT_EQ(world.sequences_[1].Length(0), 514);  // goes on
  world.batch_.reset();
  world.ExpectLengths();
  EXPECT_EQ(world.runtime_.Stats().host_bytes_used, used);
  world.batch_ = std::make_unique<Batch>(world.runtime_, kSlots);
  for (int s = 0; s < kSlots; ++s) world.batch_->Set(s, world.sequences_[s]);
  world.Step(2);
  world.ExpectLengths();
  world.Step(3, 1);
  world.sequences_.pop_back();  // destroyed in the middle of the step
  world.batch_->Abandon();
  EXPECT_EQ(world.sequences_[0].Length(0), 513);
  // After its last layer a step is whole: who leaves then keeps the token.
  world.batch_->BeginStep(1);
  std::mt19937_64 engine(4);
  for (int layer = 0; layer < kLayers; ++layer) {
    Call call(kShape, kSlots, layer);
    call.Fill(engine, 1);
    world.batch_->Attend(call.Params());
  }
  world.batch_->Clear(0);
  EXPECT_EQ(world.sequences_[0].Length(2), 514);
}

// In the middle of a step a sequence is not read, copied or changed by other calls.
TEST(ApiStepTest, HalfATokenIsNeverSeen) {
  if (OnCuda()) GTEST_SKIP() << "a replayed graph attends without a call";
  World world(SampledOptions(), 300, 0);
  world.Step(1, 1);
  Sequence& sequence = world.sequences_[0];
  const std::string half =
      "INVALID_ARGUMENT: the batch has an open step that has yet to attend layer 1";
  const auto expect_refused = [&](const char* what, const std::function<void()>& call) {
    EXPECT_EQ(CodeOf(call).substr(0, half.size()), half) << what;
    EXPECT_NE(CodeOf(call).find("vattn_batch_abandon"), std::string::npos) << what;
  };
  const std::string path = testing::TempDir() + "api_step_test.never";
  expect_refused("append", [&] { AppendRows(sequence, kShape, 0, world.rows_[0][0], 200); });
  expect_refused("truncate", [&] { sequence.Truncate(100); });
  expect_refused("fork", [&] { sequence.Fork(); });
  expect_refused("save", [&] { sequence.Save(path); });
  expect_refused("build index", [&] { sequence.BuildIndex(); });
  expect_refused("set", [&] { world.batch_->Set(1, Sequence(world.runtime_)); });
  EXPECT_NE(CodeOf([&] {
              world.batch_->BeginStep(1);
            }).find("layer 1 was not attended in the step before"),
            std::string::npos);
  world.batch_->Abandon();
  EXPECT_EQ(CodeOf([&] { sequence.Fork(); }), "OK");
  // A step without a token has no half ones.
  world.Step(1, 1, 0);
  EXPECT_EQ(CodeOf([&] { sequence.Fork(); }), "OK");
}

// All of a full pool is reserved, and forks share the token's block: the reservation holds what the
// step drew from it all the same, and can be used to its end.
TEST(ApiStepTest, ReservationsAreKept) {
  vattn_options options = SampledOptions();
  options.host_bytes = 48 * World(options, 512, 600).runtime_.Stats().host_bytes_used / 36;
  World world(options, 512, 600);
  for (uint64_t round = 0; round < 3; ++round) {
    world.Step(round);
    const Sequence fork = world.sequences_[0].Fork();
    world.batch_->Abandon();
    world.ForgetStep();
    world.ExpectLengths();
  }
  for (uint64_t step = 0; step < 80; ++step) {
    world.Step(step, static_cast<int>(step % kLayers));
    world.batch_->Abandon();
    world.Step(step);
  }
  world.ExpectLengths();
  EXPECT_EQ(world.runtime_.Stats().full_refusals, 0u);
}

}  // namespace
}  // namespace vattn::test
