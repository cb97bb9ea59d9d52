// Contexts that grow after their index was built: by steps, by chunks, after forks, cuts and files.
// Keys drift as those of real text under a rotary embedding do: their mean moves far, and what
// varies is not what varied at first.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <filesystem>
#include <string>

#include "tests/api/attention_model.h"
#include "tests/api/backend.h"

namespace vattn::test {
namespace {

constexpr Shape kShape{
    .q_heads = 4, .kv_heads = 2, .dim_k = 64, .dim_v = 64, .shared_kv = false, .dtype = VATTN_F32};
constexpr int kHot = 12;  // dimensions that scores come from

// Text: keys and queries whose scores come from kHot dimensions, and which drift in the others.
class Text {
 public:
  void AddTo(Rows& rows, int64_t count) {
    std::vector<float> k =
        Gaussian(engine_, VATTN_F32, count * kShape.kv_heads * kShape.dim_k, 0.3f);
    for (int64_t t = 0; t < count; ++t, ++token_) {
      for (int h = 0; h < kShape.kv_heads; ++h) {
        float* key = &k[static_cast<size_t>((t * kShape.kv_heads + h) * kShape.dim_k)];
        for (int c = 0; c < kHot; ++c) key[c] *= 8;
        for (int c = kHot; c < kShape.dim_k; ++c) {
          key[c] +=
              6 * static_cast<float>(std::sin(static_cast<double>(token_) / (1000. + 150 * c) + c));
        }
      }
    }
    rows.Add(kShape, k, Gaussian(engine_, VATTN_F32, count * kShape.kv_heads * kShape.dim_v, 1));
  }
  void FillQueries(Call& call) {
    call.q = Gaussian(engine_, VATTN_F32, int64_t{kShape.q_heads} * kShape.dim_k, 0.15f);
    for (size_t i = 0; i < call.q.size(); ++i) {
      if (i % kShape.dim_k < kHot) call.q[i] *= 12;
    }
  }

 private:
  std::mt19937_64 engine_{11};
  int64_t token_ = 0;
};

vattn_options Options() {
  vattn_options options = OptionsFor(kShape);
  options.refresh = 1;
  options.host_bytes = uint64_t{512} << 20;
  return options;
}

struct Seen {
  int64_t selected = 0, middle = 0;
  int verified = 0, dense = 0, off = 0;
  double share() const { return static_cast<double>(selected) / static_cast<double>(middle); }
};

// A sequence in a batch, and what it must answer.
struct Conversation {
  explicit Conversation(const Runtime& runtime, uint64_t id = 1)
      : runtime(runtime), sequence(runtime, id), batch(runtime, 1) {
    batch.Set(0, sequence);
  }
  Conversation(const Runtime& runtime, Sequence with, Rows of, Text text)
      : runtime(runtime),
        text(text),
        rows(std::move(of)),
        sequence(std::move(with)),
        batch(runtime, 1) {
    batch.Set(0, sequence);
  }

  void Append(int64_t count) {
    const int64_t from = rows.tokens;
    text.AddTo(rows, count);
    AppendRows(sequence, kShape, 0, rows, from);
  }
  // A step with a new token; checked if `seen`.
  void Step(Seen* seen = nullptr) {
    Call call(kShape, 1, 0);
    text.FillQueries(call);
    Rows one;
    text.AddTo(one, 1);
    call.k_new = one.k, call.v_new = one.v;
    batch.BeginStep(1);
    batch.Attend(call.Params());
    rows.Add(kShape, one.k, one.v);
    if (seen == nullptr) return;
    for (int h = 0; h < kShape.kv_heads; ++h) {
      seen->selected += call.selected[h];
      seen->middle += call.middle[h];
    }
    for (int h = 0; h < kShape.q_heads; ++h) {
      const Answer answer =
          Attend(kShape, rows, h * kShape.kv_heads / kShape.q_heads, call.Query(0, h));
      const double error =
          Distance(answer, call.Out(0, h).data()) / std::max(answer.norm, .5 * answer.rms_value);
      seen->verified += call.verdict[h] == VATTN_VERDICT_VERIFIED;
      seen->dense += call.verdict[h] == VATTN_VERDICT_DENSE;
      seen->off += error > .1;
    }
  }
  Seen Judge(int steps = 12) {
    Seen seen;
    for (int i = 0; i < steps; ++i) Step(&seen);
    return seen;
  }

  const Runtime& runtime;
  Text text;
  Rows rows;
  Sequence sequence;
  Batch batch;
};

// A sequence of the same text, appended whole.
Seen AtOnce(const Runtime& runtime, int64_t tokens) {
  Conversation whole(runtime, 99);
  whole.Append(tokens);
  return whole.Judge();
}

void ExpectAsGood(const Seen& grown, const Seen& whole) {
  EXPECT_EQ(grown.dense, 0);
  EXPECT_LE(grown.off, grown.verified / 10);
  EXPECT_LE(grown.share(), 1.3 * whole.share() + .005);
  EXPECT_LT(grown.share(), .3);
}

TEST(ApiGrowthTest, TokensOneByOne) {
  const Runtime runtime(Options());
  Conversation grown(runtime);
  grown.Append(1400);
  for (int i = 0; i < 5000; ++i) grown.Step();
  ExpectAsGood(grown.Judge(), AtOnce(runtime, 6400));
  const vattn_stats stats = runtime.Stats();
  EXPECT_GE(stats.segments_learnt, 4u);
  EXPECT_GT(stats.segments_recoded, 2u);
  // Of 2 KV heads with 12,800 tokens in all, some of them coded several times.
  EXPECT_LT(stats.outliers, 500u);
}

TEST(ApiGrowthTest, ChunksWithStepsBetween) {
  const Runtime runtime(Options());
  Conversation grown(runtime);
  for (int64_t chunk : {1400, 300, 700, 1500, 40, 2000, 460}) {
    grown.Append(chunk);
    for (int i = 0; i < 3; ++i) grown.Step();
  }
  ExpectAsGood(grown.Judge(), AtOnce(runtime, 6400));
}

TEST(ApiGrowthTest, ForksKeepWhatTheyShareAndGrowApart) {
  const Runtime runtime(Options());
  Conversation first(runtime);
  first.Append(3000);
  for (int i = 0; i < 600; ++i) first.Step();
  const uint64_t copied = runtime.Stats().blocks_copied;
  Conversation second(runtime, first.sequence.Fork(2), first.rows, first.text);
  first.Append(1500);
  second.Append(2500);
  ExpectAsGood(first.Judge(), AtOnce(runtime, 5100));
  ExpectAsGood(second.Judge(), AtOnce(runtime, 6100));
  // Of each KV head the last block, which both write on, is copied once, or twice if both did
  // before the other let go.
  EXPECT_LE(runtime.Stats().blocks_copied - copied, 2u * kShape.kv_heads);
}

// Every turn takes a segment, since it shares the tokens before it. There are not enough for all
// turns; what the others cost is counted, and a long text still gets tables of its own.
TEST(ApiGrowthTest, ForksOfForksRunOutOfSegmentsAndSaySo) {
  const Runtime runtime(Options());
  std::deque<Conversation> turns;
  turns.emplace_back(runtime).Append(1400);
  turns.back().Step();
  constexpr int kTurns = 60, kRoom = 47;  // beside the first segment
  for (int i = 0; i < kTurns; ++i) {
    turns.emplace_back(runtime, turns.back().sequence.Fork(2 + i), turns.back().rows,
                       turns.back().text);
    turns.back().Append(256);
    turns.back().Step();
    EXPECT_EQ(runtime.Stats().segments_refused > 0, i >= kRoom) << i;
  }
  const vattn_stats before = runtime.Stats();
  EXPECT_EQ(before.segments_refused, kTurns - kRoom);
  turns.back().Append(6000);
  const Seen seen = turns.back().Judge();
  const vattn_stats after = runtime.Stats();
  EXPECT_EQ(after.segments_refused, before.segments_refused);
  EXPECT_EQ(after.segments_learnt, before.segments_learnt + 1);
  EXPECT_LE(seen.off, seen.verified / 10);
  EXPECT_EQ(seen.dense, 0);
  EXPECT_LT(seen.share(), .3);
}

TEST(ApiGrowthTest, AfterACutOtherTextFollows) {
  const Runtime runtime(Options());
  Conversation grown(runtime);
  grown.Append(5000);
  grown.Step();
  grown.sequence.Truncate(2100);
  grown.rows.Truncate(kShape, 2100);
  grown.Append(4000);
  const Seen seen = grown.Judge();
  EXPECT_EQ(seen.dense, 0);
  EXPECT_LE(seen.off, seen.verified / 10);
  EXPECT_LT(seen.share(), .3);
}

TEST(ApiGrowthTest, FilesKeepEverySegment) {
  const Runtime runtime(Options());
  const std::string path = std::filesystem::temp_directory_path() /
                           ("vattn_api_growth_test." + std::to_string(getpid()));
  Conversation grown(runtime);
  grown.Append(1400);
  for (int i = 0; i < 3000; ++i) grown.Step();
  grown.sequence.Save(path);
  Conversation restored(runtime, Sequence::Restore(runtime, path), grown.rows, grown.text);
  std::filesystem::remove(path);
  for (int i = 0; i < 400; ++i) {
    Seen a, b;
    grown.Step(i % 100 == 99 ? &a : nullptr);
    restored.Step(i % 100 == 99 ? &b : nullptr);
    EXPECT_EQ(a.selected, b.selected) << "step " << i;
  }
}

}  // namespace
}  // namespace vattn::test
