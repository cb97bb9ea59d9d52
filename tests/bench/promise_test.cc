// P(|o' - o| > epsilon * ref) <= delta for heads flagged VERIFIED, on hostile inputs. A test fails
// when the promise is refuted: when the Clopper-Pearson lower bound, at confidence 1 - 1e-6, on the
// share of calls that are flagged VERIFIED and off by more than epsilon lies above delta. Falling
// back always would keep the promise, so every input also has a least share of heads to be
// verified.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "api/vattn.h"
#include "bench/cli/handles.h"
#include "bench/cli/statistics.h"
#include "bench/trace/hostile_inputs.h"

namespace vattn::test {
namespace {

constexpr double kAlarm = 1e-6;
constexpr int kSlots = 32;    // forks attended at a time
constexpr int kTrials = 640;  // of one input and cell
constexpr int kDriftTrials = 256;
constexpr int kSettling = 6;  // steps before the trials of a settled controller

struct Cell {
  const char* name;
  float epsilon, delta;
  int32_t norm, value_bits = 0;
};
constexpr Cell kDefault = {".1 .1 value", .1f, .1f, VATTN_NORM_VALUE};
constexpr Cell kCells[] = {kDefault,
                           {".2 .02 value", .2f, .02f, VATTN_NORM_VALUE},
                           {".1 .1 output", .1f, .1f, VATTN_NORM_OUTPUT},
                           {".1 .1 coded", .1f, .1f, VATTN_NORM_VALUE, 2}};

// What became of one query head.
struct Tally {
  int64_t trials = 0, verified = 0, failures = 0;  // failures: verified, and off by over epsilon
  double selected = 0;                             // sum of shares of the middle

  double Verified() const { return static_cast<double>(verified) / trials; }
  // Lower bound on P(verified, and off by over epsilon).
  double Lower() const {
    return 1 - bench::ClopperPearsonUpper(trials - failures, trials, 1 - kAlarm);
  }
};

void Print(const char* input, const char* cell, const char* when,
           const std::vector<Tally>& tallies) {
  std::printf("%-28s %-12s %-8s", input, cell, when);
  for (const Tally& t : tallies) {
    std::printf("  verified %.3f  failures %3d of %d  selected %.3f", t.Verified(),
                static_cast<int>(t.failures), static_cast<int>(t.trials), t.selected / t.trials);
  }
  std::printf("\n");
}

// One context, from which every trial forks a sequence with random numbers of its own.
class Context {
 public:
  Context(const HostileInput& input, const Cell& cell) : input_(input), cell_(cell) {
    vattn_options options;
    vattn_options_init(&options, sizeof(options));
    options.num_q_heads = kHeads;
    options.num_kv_heads = 1;
    options.head_dim_k = options.head_dim_v = kDim;
    options.dtype = VATTN_F32;
    options.index_bytes = 16;
    options.epsilon = cell.epsilon;
    options.delta = cell.delta;
    options.norm = cell.norm;
    options.value_bits = cell.value_bits;
    options.on_unverified = VATTN_ON_UNVERIFIED_BEST_EFFORT;
    options.hot_share = 0;
    options.seed = 2024;
    options.host_bytes = bench::HostBytes(options, kTokens, 1);
    runtime_ = bench::CreateRuntime(options);
    sequence_ = bench::CreateSequence(runtime_.get(), 1);
    vattn_append_params append;
    vattn_append_params_init(&append, sizeof(append));
    append.num_tokens = kTokens;
    append.num_queries = kCalibration;
    append.k = input.keys.data();
    append.v = input.values.data();
    append.q = input.calibration.data();
    bench::Check(vattn_append(sequence_.get(), &append), "vattn_append");
    bench::Check(vattn_sequence_build_index(sequence_.get()), "vattn_sequence_build_index");
  }

  // Lets the controller settle on calibration queries.
  void Settle() {
    std::vector<float> out(kHeads * kDim);
    bench::Batch batch = bench::CreateBatch(runtime_.get(), 1);
    bench::Check(vattn_batch_set(batch.get(), 0, sequence_.get()), "vattn_batch_set");
    vattn_attend_params attend;
    vattn_attend_params_init(&attend, sizeof(attend));
    attend.out_dtype = VATTN_F32;
    attend.out = out.data();
    for (int step = 0; step < kSettling; ++step) {
      attend.q = &input_.calibration[step * kHeads * kDim];
      bench::Check(vattn_batch_begin_step(batch.get(), 0, nullptr), "vattn_batch_begin_step");
      bench::Check(vattn_attend(batch.get(), &attend, nullptr), "vattn_attend");
    }
  }

  // Forks `trials` sequences and takes each through one step a query ([kHeads][kDim]).
  // [steps][kHeads]: of one step, the trials are independent.
  std::vector<std::vector<Tally>> Run(const std::vector<std::vector<float>>& queries, int trials) {
    std::vector<std::vector<Tally>> tallies(queries.size(), std::vector<Tally>(kHeads));
    std::vector<Exact> exact;
    for (const std::vector<float>& query : queries) exact.push_back(ExactAttention(input_, query));
    std::vector<float> q(kSlots * kHeads * kDim), out(kSlots * kHeads * kDim);
    std::vector<int32_t> verdict(kSlots * kHeads), selected(kSlots);
    vattn_attend_params attend;
    vattn_attend_params_init(&attend, sizeof(attend));
    attend.out_dtype = VATTN_F32;
    attend.q = q.data();
    attend.out = out.data();
    attend.verdict = verdict.data();
    attend.selected = selected.data();
    for (int done = 0; done < trials; done += kSlots) {
      std::vector<bench::Sequence> forks(kSlots);
      bench::Batch batch = bench::CreateBatch(runtime_.get(), kSlots);
      for (int slot = 0; slot < kSlots; ++slot) {
        vattn_sequence* fork = nullptr;
        bench::Check(vattn_sequence_fork(sequence_.get(), 1000 + done + slot, &fork),
                     "vattn_sequence_fork");
        forks[slot].reset(fork);
        bench::Check(vattn_batch_set(batch.get(), slot, fork), "vattn_batch_set");
      }
      for (size_t step = 0; step < queries.size(); ++step) {
        for (int slot = 0; slot < kSlots; ++slot) {
          std::copy(queries[step].begin(), queries[step].end(), &q[slot * kHeads * kDim]);
        }
        bench::Check(vattn_batch_begin_step(batch.get(), 0, nullptr), "vattn_batch_begin_step");
        bench::Check(vattn_attend(batch.get(), &attend, nullptr), "vattn_attend");
        for (int i = 0; i < kSlots * kHeads; ++i) {
          Tally& tally = tallies[step][i % kHeads];
          const double error = Error(exact[step], i % kHeads, &out[i * kDim]);
          const bool verified = verdict[i] == VATTN_VERDICT_VERIFIED;
          ++tally.trials;
          tally.selected += static_cast<double>(selected[i / kHeads]) / (kMiddleEnd - kMiddleBegin);
          tally.verified += verified;
          tally.failures += verified && !(error <= cell_.epsilon);
        }
      }
    }
    return tallies;
  }

 private:
  // |o' - o| / ref.
  double Error(const Exact& exact, int64_t head, const float* out) const {
    double distance2 = 0, norm2 = 0;
    for (int64_t d = 0; d < kDim; ++d) {
      const double o = exact.out[head * kDim + d];
      distance2 += (out[d] - o) * (out[d] - o);
      norm2 += o * o;
    }
    double ref = std::sqrt(norm2);
    if (cell_.norm == VATTN_NORM_VALUE) ref = std::max(ref, .5 * exact.value_scale[head]);
    return std::sqrt(distance2) / ref;
  }

  const HostileInput& input_;
  const Cell cell_;
  bench::Runtime runtime_;
  bench::Sequence sequence_;
};

// Tallies of a first step, then of a step of a settled controller.
std::vector<std::vector<Tally>> BothSteps(const HostileInput& input, const Cell& cell) {
  Context context(input, cell);
  std::vector<std::vector<Tally>> both = context.Run({input.query}, kTrials);
  context.Settle();
  both.push_back(context.Run({input.query}, kTrials)[0]);
  Print(input.name.c_str(), cell.name, "first", both[0]);
  Print(input.name.c_str(), cell.name, "settled", both[1]);
  return both;
}

TEST(PromiseTest, HostileInputs) {
  for (const HostileInput& input : HostileInputs()) {
    for (const Cell& cell : kCells) {
      SCOPED_TRACE(input.name + ", " + cell.name);
      const std::vector<std::vector<Tally>> both = BothSteps(input, cell);
      for (int settled = 0; settled < 2; ++settled) {
        for (const Tally& tally : both[settled]) {
          EXPECT_LE(tally.Lower(), cell.delta)
              << tally.failures << " failures, settled: " << settled;
          if (cell.norm == VATTN_NORM_OUTPUT) continue;  // exact answers near 0 may take every row
          double least = settled ? input.least_settled : input.least_first;
          if (cell.value_bits > 0) least = std::min(least, input.least_coded);
          EXPECT_GE(tally.Verified(), least) << "settled: " << settled;
        }
      }
    }
  }
}

// Queries that drift from the input's towards its calibration queries.
std::vector<std::vector<float>> DriftingQueries(const HostileInput& input, int steps) {
  std::vector<std::vector<float>> queries(steps, input.query);
  for (int step = 0; step < steps; ++step) {
    for (int64_t i = 0; i < kHeads * kDim; ++i) {
      queries[step][i] += .02f * static_cast<float>(step) * (input.calibration[i] - input.query[i]);
    }
  }
  return queries;
}

// Permanent random numbers: after some steps, an answer depends on the numbers that earlier steps
// used.
TEST(PromiseTest, ConsecutiveStepsOnPermanentNumbers) {
  constexpr int kSteps = 10;
  for (const HostileInput& input : HostileInputs()) {
    const double least = std::min(input.least_first, input.least_settled) < .95 ? 0 : .75;
    Context context(input, kDefault);
    const std::vector<std::vector<Tally>> steps =
        context.Run(DriftingQueries(input, kSteps), kDriftTrials);
    for (int step = 0; step < kSteps; ++step) {
      SCOPED_TRACE(input.name + ", step " + std::to_string(step));
      for (const Tally& tally : steps[step]) {
        EXPECT_LE(tally.Lower(), kDefault.delta) << tally.failures << " failures";
        EXPECT_GE(tally.Verified(), least);
      }
    }
    Print(input.name.c_str(), kDefault.name, "step 9", steps[kSteps - 1]);
  }
}

}  // namespace
}  // namespace vattn::test
