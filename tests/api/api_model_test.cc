// Random operations over several sequences in a small pool, against a model that keeps plain copies
// of every row. Outputs, lengths and counters must agree with it; no sequence may see, or save, a
// byte of another one.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <memory>
#include <string>

#include "tests/api/attention_model.h"
#include "tests/api/row_marks.h"

namespace vattn::test {
namespace {

constexpr int kLayers = 2, kSlots = 3, kMaxSequences = 6;
constexpr int kKvHeads[kLayers] = {2, 1};
constexpr int kDim = 32;
constexpr int64_t kMaxTokens = 1800;
constexpr int kWindow = 32;

Shape LayerShape(int layer) { return {4, kKvHeads[layer], kDim, kDim, false, VATTN_F32}; }

struct Known {
  explicit Known(Sequence&& made) : sequence(std::move(made)) {}

  Sequence sequence;
  Rows rows[kLayers];
  uint32_t author = 0;
  int slot = -1;
  std::string asleep;  // file it hibernates in, or empty
};

class World {
 public:
  World(uint64_t seed, int32_t policy, bool spill)
      : engine_(seed),
        folder_(std::filesystem::temp_directory_path() /
                ("api_model_test." + std::to_string(getpid()) + "." + std::to_string(seed))),
        disk_(folder_ / "disk"),
        options_(Options(policy, spill)),
        runtime_(options_),
        batch_(runtime_, kSlots) {}
  ~World() { std::filesystem::remove_all(folder_); }

  void Operate() {
    const int choice = Draw(100);
    if (known_.empty() || (choice < 6 && known_.size() < kMaxSequences)) return Create();
    Known& one = *known_[Draw(static_cast<int>(known_.size()))];
    if (!one.asleep.empty()) return choice < 60 ? Wake(one) : void();
    // A use would wake what was spilled, if there is room; here, so that only this may be refused.
    if (options_.spill == 1 && !Try([&] { one.sequence.Wake(); })) return;
    if (choice < 22) return Append(one);
    if (choice < 60) return Step();
    if (choice < 66) return Fork(one);
    if (choice < 72) return Truncate(one, Draw(static_cast<int>(one.rows[0].tokens) + 1));
    if (choice < 76) return Destroy(one);
    if (choice < 80) return Save(one);
    if (choice < 84) return Restore(one);
    if (choice < 87) return Hibernate(one);
    if (choice < 97) return Place(one);
    if (choice < 98) return void(Try([&] { one.sequence.BuildIndex(); }));
    Clear(Draw(kSlots));
  }

  // Lengths and counters.
  void Check() const {
    uint64_t tokens = 0;
    for (const auto& one : known_) {
      for (int layer = 0; layer < kLayers && one->asleep.empty(); ++layer) {
        ASSERT_EQ(one->sequence.Length(layer), one->rows[layer].tokens);
        tokens += static_cast<uint64_t>(one->rows[layer].tokens);
      }
    }
    const vattn_stats stats = runtime_.Stats();
    EXPECT_EQ(stats.sequences, known_.size());
    if (options_.spill == 0) {
      EXPECT_EQ(stats.tokens, tokens);
    }
    EXPECT_LE(stats.host_bytes_used, stats.host_bytes_limit);
    EXPECT_EQ(stats.full_refusals, refusals_);
  }

  void Finish() {
    while (!known_.empty()) Destroy(*known_.front());
    const vattn_stats stats = runtime_.Stats();
    EXPECT_EQ(stats.host_bytes_used, 0u);
    EXPECT_EQ(stats.sequences, 0u);
    EXPECT_EQ(stats.tokens, 0u);
    EXPECT_EQ(stats.heads_exact + stats.heads_dense + stats.heads_verified, answers_);
    EXPECT_EQ(stats.disk_bytes_used, 0u);
    EXPECT_EQ(stats.io_errors + stats.spill_failures + stats.files_refused, 0u);
    if (options_.spill == 1) {
      EXPECT_GT(stats.spills, 10u);
      EXPECT_EQ(std::distance(std::filesystem::directory_iterator(disk_), {}), 1);  // the lock
    } else {
      EXPECT_GT(refusals_, 5u);
    }
    EXPECT_GT(stats.blocks_copied, 5u);
    EXPECT_EQ(verified_ > 100, options_.policy == VATTN_POLICY_VERIFIED);
    EXPECT_LE(failures_, options_.delta * verified_);
  }

 private:
  vattn_options Options(int32_t policy, bool spill) const {
    std::filesystem::create_directory(folder_);
    vattn_options options = OptionsFor(LayerShape(0));
    options.num_layers = kLayers;
    options.layer_kv_heads = kKvHeads;
    options.policy = policy;
    options.window = kWindow;
    options.exact_below = 64;
    options.max_selected_share = 1;
    options.epsilon = .2f;
    options.host_bytes =
        4 << 20;  // about 50 blocks: seven sequences of full length need three times that
    if (spill) {
      options.spill = 1;
      options.disk_path = disk_.c_str();
    }
    return options;
  }

  int Draw(int end) { return static_cast<int>(engine_() % static_cast<uint64_t>(end)); }
  std::string NewFile() { return folder_ / std::to_string(files_++); }

  // Runs a call that may be refused because the pool is full, and then must say so in full; true if
  // done.
  template <class F>
  bool Try(F&& call) {
    const vattn_stats before = runtime_.Stats();
    try {
      call();
      return true;
    } catch (const Error& error) {
      ++refusals_;
      EXPECT_EQ(error.code(), VATTN_FULL) << error.what();
      long long need = 0, block = 0, free = 0;
      const char* text = std::strstr(error.what(), "need ");
      EXPECT_TRUE(text != nullptr && std::sscanf(text, "need %lld blocks of %lld bytes, %lld of",
                                                 &need, &block, &free) == 3)
          << error.what();
      EXPECT_GT(need, free);
      EXPECT_NE(std::strstr(error.what(), "limit"), nullptr) << error.what();
      EXPECT_NE(std::strstr(error.what(), "host_bytes"), nullptr) << error.what();
      EXPECT_LE(free * block, static_cast<long long>(before.host_bytes_limit)) << error.what();
      return false;
    }
  }

  Known& Enter(Sequence&& sequence) {
    known_.push_back(std::make_unique<Known>(std::move(sequence)));
    known_.back()->author = ++authors_;
    return *known_.back();
  }

  void Create() {
    const int64_t reserve = Draw(4) == 0 ? Draw(600) : 0;
    std::unique_ptr<Sequence> made;
    if (Try([&] { made = std::make_unique<Sequence>(runtime_, 0, reserve); }))
      Enter(std::move(*made));
  }

  void Append(Known& one) {
    const int64_t before = one.rows[0].tokens, room = kMaxTokens - before;
    if (room < 1) return;
    const int64_t count =
        1 + Draw(static_cast<int>(std::min<int64_t>(room, Draw(2) == 0 ? 10 : 900)));
    for (int layer = 0; layer < kLayers; ++layer) {
      const Shape shape = LayerShape(layer);
      const std::vector<float> k = Gaussian(engine_, VATTN_F32, count * shape.kv_heads * kDim, 1);
      std::vector<float> v = Gaussian(engine_, VATTN_F32, count * shape.kv_heads * kDim, 1);
      MarkRows(one.author, kDim, v);
      vattn_append_params params = Init<vattn_append_params>();
      params.layer = layer;
      params.num_tokens = count;
      params.k = k.data();
      params.v = v.data();
      if (!Try([&] { one.sequence.Append(params); })) return Truncate(one, before);
      one.rows[layer].Add(shape, k, v);
    }
  }

  // One step of everything in the batch.
  void Step() {
    bool any = false;
    const int new_tokens = Draw(5) > 0;
    for (const auto& one : known_) {
      if (one->slot < 0) continue;
      any = true;
      if (one->rows[0].tokens + new_tokens < 1 || one->rows[0].tokens >= kMaxTokens)
        Clear(one->slot);
    }
    if (!any || !Try([&] { batch_.BeginStep(new_tokens); })) return;
    for (int layer : {1, 0}) {
      Call call(LayerShape(layer), kSlots, layer);
      call.Fill(engine_, new_tokens);
      for (const auto& one : known_) {
        if (one->slot < 0 || new_tokens == 0) continue;
        const int64_t size = int64_t{kKvHeads[layer]} * kDim;
        std::vector<float> v(call.v_new.begin() + one->slot * size,
                             call.v_new.begin() + (one->slot + 1) * size);
        MarkRows(one->author, kDim, v);
        std::copy(v.begin(), v.end(), call.v_new.begin() + one->slot * size);
      }
      batch_.Attend(call.Params());
      for (const auto& one : known_) {
        if (one->slot < 0) continue;
        if (new_tokens > 0) call.AddTo(one->rows[layer], one->slot);
        CheckAnswer(call, one->slot, one->rows[layer]);
      }
    }
  }

  void CheckAnswer(const Call& call, int slot, const Rows& rows) {
    const int group = 4 / call.shape.kv_heads;
    for (int h = 0; h < 4; ++h) {
      const Answer answer = Attend(call.shape, rows, h / group, call.Query(slot, h));
      const double distance = Distance(answer, call.Out(slot, h).data());
      const int32_t verdict = call.verdict[slot * 4 + h];
      ++answers_;
      if (verdict == VATTN_VERDICT_VERIFIED) {
        ++verified_;
        failures_ += distance > options_.epsilon * std::max(answer.norm, .5 * answer.rms_value);
        EXPECT_LE(distance, 2 * options_.epsilon * answer.rms_value);
      } else {
        EXPECT_TRUE(verdict == VATTN_VERDICT_EXACT || verdict == VATTN_VERDICT_DENSE);
        EXPECT_LE(distance, Tolerance(answer, VATTN_F32)) << rows.tokens << " tokens";
      }
    }
  }

  void Fork(const Known& one) {
    if (known_.size() >= kMaxSequences) return;
    std::unique_ptr<Sequence> made;
    if (!Try([&] { made = std::make_unique<Sequence>(one.sequence.Fork()); })) return;
    Known& copy = Enter(std::move(*made));
    std::copy(std::begin(one.rows), std::end(one.rows), copy.rows);
  }

  void Truncate(Known& one, int64_t tokens) {
    if (!Try([&] { one.sequence.Truncate(tokens); })) return;
    for (int layer = 0; layer < kLayers; ++layer)
      one.rows[layer].Truncate(LayerShape(layer), tokens);
  }

  void Destroy(const Known& one) {
    known_.erase(
        std::find_if(known_.begin(), known_.end(), [&](const auto& k) { return k.get() == &one; }));
  }

  // The file holds each row's mark exactly once, and no other.
  static void CheckFile(const Known& one, const std::string& path) {
    MarkCounts expected;
    for (const Rows& rows : one.rows) CountMarks(rows.v, expected);
    EXPECT_EQ(CountMarksOfFile(path), expected);
  }

  void Save(const Known& one) {
    const std::string path = NewFile();
    one.sequence.Save(path);
    CheckFile(one, path);
    std::filesystem::remove(path);
  }

  // A restored sequence and its original answer the same step with the same bits.
  void Restore(Known& one) {
    if (known_.size() >= kMaxSequences || one.rows[0].tokens == 0 ||
        one.rows[0].tokens >= kMaxTokens)
      return;
    const std::string path = NewFile();
    one.sequence.Save(path);
    std::unique_ptr<Sequence> made;
    const bool done =
        Try([&] { made = std::make_unique<Sequence>(Sequence::Restore(runtime_, path)); });
    std::filesystem::remove(path);
    if (!done) return;
    Known& copy = Enter(std::move(*made));
    std::copy(std::begin(one.rows), std::end(one.rows), copy.rows);
    if (one.slot >= 0) Clear(one.slot);
    Batch both(runtime_, 2);
    const auto begin = [&] {
      both.Set(0, one.sequence);
      both.Set(1, copy.sequence);
      both.BeginStep(1);
    };
    if (!Try(begin)) return;
    for (int layer = 0; layer < kLayers; ++layer) {
      Call call(LayerShape(layer), 2, layer);
      call.Fill(engine_, 1);
      MarkRows(one.author, kDim, call.v_new);
      for (std::vector<float>* same : {&call.q, &call.k_new, &call.v_new}) {
        std::copy_n(same->begin(), same->size() / 2,
                    same->begin() + static_cast<ptrdiff_t>(same->size() / 2));
      }
      both.Attend(call.Params());
      EXPECT_TRUE(std::equal(call.out.begin(),
                             call.out.begin() + static_cast<ptrdiff_t>(call.out.size() / 2),
                             call.out.begin() + static_cast<ptrdiff_t>(call.out.size() / 2)));
      call.AddTo(one.rows[layer], 0);
      call.AddTo(copy.rows[layer], 1);
      CheckAnswer(call, 1, copy.rows[layer]);
      answers_ += 4;
    }
  }

  void Hibernate(Known& one) {
    if (one.slot >= 0) Clear(one.slot);
    const std::string path = NewFile();
    one.sequence.Hibernate(path);
    one.asleep = path;
    CheckFile(one, path);
  }

  void Wake(Known& one) {
    if (!Try([&] { one.sequence.Wake(); })) return;
    std::filesystem::remove(one.asleep);
    one.asleep.clear();
  }

  void Place(Known& one) {
    if (one.slot >= 0 || one.rows[0].tokens == 0) return;
    const int slot = Draw(kSlots);
    for (const auto& other : known_) {
      if (other->slot == slot) other->slot = -1;
    }
    batch_.Set(slot, one.sequence);
    one.slot = slot;
  }

  void Clear(int slot) {
    batch_.Clear(slot);
    for (const auto& one : known_) {
      if (one->slot == slot) one->slot = -1;
    }
  }

  std::mt19937_64 engine_;
  const std::filesystem::path folder_;
  const std::string disk_;
  const vattn_options options_;
  const Runtime runtime_;
  std::vector<std::unique_ptr<Known>> known_;
  Batch batch_;
  uint32_t authors_ = 0;
  int files_ = 0, verified_ = 0, failures_ = 0;
  uint64_t refusals_ = 0, answers_ = 0;
};

void RunWorld(uint64_t seed, int32_t policy, int operations, bool spill = false) {
  World world(seed, policy, spill);
  for (int i = 0; i < operations; ++i) {
    SCOPED_TRACE("seed " + std::to_string(seed) + " operation " + std::to_string(i));
    world.Operate();
    world.Check();
    if (testing::Test::HasFailure()) return;
  }
  world.Finish();
}

TEST(ApiModelTest, DenseAgreesWithTheModel) {
  for (uint64_t seed = 1; seed <= 3; ++seed) RunWorld(seed, VATTN_POLICY_DENSE, 600);
}

// Sequences that no batch holds go to the disk and come back as they are used.
TEST(ApiModelTest, SpillingAgreesWithTheModel) {
  for (uint64_t seed = 201; seed <= 202; ++seed) RunWorld(seed, VATTN_POLICY_DENSE, 600, true);
}

TEST(ApiModelTest, VerifiedAgreesWithTheModel) {
  for (uint64_t seed = 101; seed <= 104; ++seed) RunWorld(seed, VATTN_POLICY_VERIFIED, 600);
}

}  // namespace
}  // namespace vattn::test
