// The backend as llama.cpp meets it: loaded from its file, asked for FLASH_ATTN_EXT over a cache that grows, is
// cut, shifted, overwritten and shared; every answer is compared with attention in float64.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "ggml.h"
#include "tests/llama_cpp/cache.h"

namespace vattn::llama_cpp {
namespace {

constexpr double kEpsilon = 0.1, kDelta = 0.1;
constexpr double kExact = 2e-3;   // of fp16 rows and queries
constexpr double kByGgml = 3e-2;  // ggml adds values up in fp16

using BackendPtr = std::unique_ptr<ggml_backend, decltype(&ggml_backend_free)>;

// A context's backend, with these settings.
BackendPtr Make(const char* settings = "1", const char* min_tokens = "1600") {
  setenv("GGML_VATTN", settings, 1);
  setenv("GGML_VATTN_MIN_TOKENS", min_tokens, 1);
  BackendPtr backend(ggml_backend_init_by_name("VATTN", nullptr), ggml_backend_free);
  return backend;
}

int64_t Padded(int64_t cells) { return (cells + 255) / 256 * 256; }

// One sequence in a cache.
class Text {
 public:
  Text(ggml_backend_t backend, Cache& cache, int64_t begin = 0)
      : backend_(backend), cache_(cache), begin_(begin), end_(begin) {}

  // Adds tokens in one call.
  Answer Add(int64_t tokens) {
    cache_.Fill(end_, end_ + tokens, 0);
    end_ += tokens;
    return Attend(backend_, cache_, {RunMask(begin_, end_, tokens, Padded(end_))});
  }
  void Prompt(int64_t tokens) {
    for (; tokens > 0; tokens -= 512) Add(std::min<int64_t>(tokens, 512));
  }
  void Cut(int64_t tokens) { end_ -= tokens; }
  // Takes steps of `tokens` tokens; share of heads whose error is over epsilon.
  double Steps(int64_t steps, int64_t tokens = 1) {
    double misses = 0;
    for (int64_t i = 0; i < steps; ++i) misses += Add(tokens).Misses(kEpsilon);
    return misses / static_cast<double>(steps);
  }
  int64_t end() const { return end_; }

 private:
  ggml_backend_t backend_;
  Cache& cache_;
  const int64_t begin_;
  int64_t end_;
};

TEST(FlashAttentionTest, GrowsByTokens) {
  const BackendPtr b = Make();
  Cache cache({}, 1);
  Text text(b.get(), cache);
  for (int i = 0; i < 6; ++i) EXPECT_LT(text.Add(500).worst(), kByGgml);
  EXPECT_LE(text.Steps(150), kDelta);
  EXPECT_EQ(Counter(b.get(), "verified_calls"), 150u);
  EXPECT_EQ(Counter(b.get(), "tables_learnt"), 1u);
  EXPECT_EQ(Counter(b.get(), "cells_recoded"), 0u);
  EXPECT_LT(Counter(b.get(), "rows_selected"), Counter(b.get(), "rows_middle") * 6 / 10);
}

TEST(FlashAttentionTest, ShortRunsAreExact) {
  const BackendPtr b = Make();
  Cache cache({}, 2);
  Text text(b.get(), cache);
  for (const int64_t tokens : {1, 7, 1, 100, 1, 16, 1, 1}) {
    EXPECT_LT(text.Add(tokens).worst(), kByGgml) << tokens;
  }
  EXPECT_EQ(Counter(b.get(), "verified_calls"), 0u);
}

TEST(FlashAttentionTest, WithoutAPromptQueriesAreGatheredFirst) {
  const BackendPtr b = Make();
  Cache cache({}, 3);
  cache.Fill(0, 3000, 0);  // a state that was loaded
  for (int64_t end = 3000; end < 3032; ++end) {
    cache.Fill(end);
    const Answer a = Attend(b.get(), cache, {RunMask(0, end + 1, 1, 3072)});
    EXPECT_LT(a.worst(), end < 3031 ? kByGgml : 3 * kEpsilon);
  }
  EXPECT_EQ(Counter(b.get(), "verified_calls"), 1u);
}

TEST(FlashAttentionTest, SeveralQueryTokens) {
  const BackendPtr b = Make();
  Cache cache({}, 4);
  Text text(b.get(), cache);
  text.Prompt(3000);
  EXPECT_LE(text.Steps(40, 4), kDelta);
  EXPECT_LE(text.Steps(10, 16), kDelta);
  EXPECT_EQ(Counter(b.get(), "verified_calls"), 50u);
}

TEST(FlashAttentionTest, RejectedTokensAreWrittenAgain) {
  const BackendPtr b = Make();
  Cache cache({}, 5);
  Text text(b.get(), cache);
  text.Prompt(3000);
  double misses = 0;
  for (int i = 0; i < 60; ++i) {
    misses += text.Add(5).Misses(kEpsilon);
    text.Cut(i % 6);
  }
  EXPECT_LE(misses / 60, kDelta);
  EXPECT_EQ(Counter(b.get(), "verified_calls"), 60u);
  EXPECT_EQ(Counter(b.get(), "cells_recoded"), 0u);  // none had left the window
}

TEST(FlashAttentionTest, ACutTextGoesOnWithOtherTokens) {
  const BackendPtr b = Make();
  Cache cache({}, 6);
  Text text(b.get(), cache);
  text.Prompt(4000);
  text.Steps(20);
  text.Cut(1500);
  text.Prompt(1200);  // through calls that are not verified
  EXPECT_LE(text.Steps(40), kDelta);
  text.Cut(700);
  EXPECT_LE(text.Steps(40), kDelta);  // steps alone
  EXPECT_EQ(Counter(b.get(), "verified_calls"), 100u);
}

TEST(FlashAttentionTest, KeysThatChangeWithoutACallAreCodedAgain) {
  const BackendPtr b = Make();
  Cache cache({}, 7);
  Text text(b.get(), cache);
  text.Prompt(4000);
  text.Steps(4);
  // A few neighbours, in plain growth.
  cache.Fill(1000, 1020, 0);
  EXPECT_LE(text.Steps(20), kDelta);
  EXPECT_EQ(Counter(b.get(), "cells_recoded"), 20u);
  // One cell is found within sixteen calls, or at once when the run has not grown as it should.
  cache.Fill(2001);
  text.Steps(16);
  EXPECT_EQ(Counter(b.get(), "cells_recoded"), 21u);
  cache.Fill(2002);
  text.Cut(1);
  text.Add(1);
  EXPECT_EQ(Counter(b.get(), "cells_recoded"), 22u);
  EXPECT_EQ(Counter(b.get(), "codes_dropped"), 0u);
}

TEST(FlashAttentionTest, AContextShiftIsSeen) {
  const BackendPtr b = Make();
  Cache cache({}, 8);
  Text text(b.get(), cache);
  text.Prompt(4000);
  text.Steps(4);
  cache.Shift(256, 4000, 1.0);
  EXPECT_LE(text.Steps(40), kDelta);
  EXPECT_EQ(Counter(b.get(), "codes_dropped"), 1u);
  EXPECT_EQ(Counter(b.get(), "tables_learnt"), 2u);
  EXPECT_EQ(Counter(b.get(), "verified_calls"), 44u);
}

TEST(FlashAttentionTest, AnotherStateInTheSameCells) {
  const BackendPtr b = Make();
  Cache cache({}, 9);
  Text text(b.get(), cache);
  text.Prompt(4000);
  text.Steps(4);
  cache.Fill(0, text.end(), 0);
  EXPECT_LE(text.Steps(40), kDelta);
  EXPECT_EQ(Counter(b.get(), "codes_dropped"), 1u);
}

TEST(FlashAttentionTest, MasksWithHolesAreLeftToGgml) {
  const BackendPtr b = Make();
  Cache cache({}, 10);
  Text text(b.get(), cache);
  text.Prompt(4000);
  text.Steps(4);
  Mask mask = RunMask(0, text.end(), 1, 4096);
  mask[0][1234] = false;
  cache.Spoil(1234);  // what is hidden is not read
  EXPECT_LT(Attend(b.get(), cache, {mask}).worst(), kByGgml);
  mask[0][77] = false;
  EXPECT_LT(Attend(b.get(), cache, {mask}).worst(), kByGgml);
  EXPECT_EQ(Counter(b.get(), "ggml_masks"), 2u);
  // The hole is filled, and the run is whole again.
  cache.Fill(1234), cache.Fill(77);
  EXPECT_LE(text.Steps(20), kDelta);
  EXPECT_EQ(Counter(b.get(), "cells_recoded"), 2u);
}

TEST(FlashAttentionTest, CellsBehindTheRunAreNotRead) {
  const BackendPtr b = Make();
  Cache cache({}, 11);
  Text text(b.get(), cache);
  text.Prompt(3000);
  for (int64_t cell = 3000; cell < 4096; ++cell) cache.Spoil(cell);
  EXPECT_LE(text.Steps(40), kDelta);
  EXPECT_LT(text.Add(100).worst(), kByGgml);
  EXPECT_EQ(Counter(b.get(), "ggml_failures"), 0u);
}

TEST(FlashAttentionTest, ASlidingWindowIsLeftToGgml) {
  const BackendPtr b = Make();
  Cache cache({}, 12);
  cache.Fill(0, 4000, 0);
  for (int64_t end = 3000; end < 3060; ++end)
    EXPECT_LT(Attend(b.get(), cache, {RunMask(end - 2000, end, 1, 3072)}).worst(), kByGgml);
  EXPECT_EQ(Counter(b.get(), "ggml_masks"), 60u);
}

TEST(FlashAttentionTest, SequencesOneBehindTheOther) {
  const BackendPtr b = Make();
  Cache cache({}, 13);
  Text first(b.get(), cache), second(b.get(), cache, 3100);
  first.Prompt(3000);
  EXPECT_LE(first.Steps(20), kDelta);
  second.Prompt(3000);
  EXPECT_LE(second.Steps(20), kDelta);
  EXPECT_LE(first.Steps(20), kDelta);
  EXPECT_EQ(Counter(b.get(), "tables_learnt"), 2u);
  EXPECT_EQ(Counter(b.get(), "verified_calls"), 60u);
  EXPECT_LT(Counter(b.get(), "cells_coded"), 6200u);  // each once
  // Both in one call.
  Mask both = RunMask(0, first.end(), 1, Padded(second.end()));
  both.push_back(RunMask(3100, second.end(), 1, Padded(second.end()))[0]);
  EXPECT_LT(Attend(b.get(), cache, {both}).worst(), kByGgml);
  EXPECT_EQ(Counter(b.get(), "ggml_masks"), 1u);
}

TEST(FlashAttentionTest, CellsOfASequenceThatIsGoneServeTheNext) {
  const BackendPtr b = Make();
  Cache cache({}, 14);
  Text first(b.get(), cache), second(b.get(), cache, 2000);
  first.Prompt(4000);
  first.Steps(20);
  first.Cut(2020);
  second.Prompt(3000);
  EXPECT_LE(second.Steps(20), kDelta);
  second.Cut(3000);
  first.Prompt(2500);
  EXPECT_LE(first.Steps(20), kDelta);
}

TEST(FlashAttentionTest, StreamsAreApart) {
  const BackendPtr b = Make();
  Cache cache({.cells = 4096, .streams = 2}, 15);
  cache.Fill(0, 4096, 0), cache.Fill(0, 4096, 1);
  double misses = 0;
  for (int64_t i = 0; i < 80; ++i) {
    Mask second = RunMask(0, 2500 + i, 1, 3072);
    if (i == 50) second[0][3] = false;  // one stream by ggml, the other not
    const Answer a = Attend(b.get(), cache, {RunMask(0, 3000 - 1 + i, 1, 3072), second});
    if (i >= 31) misses += a.Misses(kEpsilon);
  }
  EXPECT_LE(misses / 49, kDelta);
  EXPECT_EQ(Counter(b.get(), "verified_calls"), 97u);
  EXPECT_EQ(Counter(b.get(), "ggml_masks"), 1u);
}

TEST(FlashAttentionTest, AnswersThatAreNotFiniteAreGgmls) {
  const BackendPtr b = Make();
  Cache cache({}, 16);
  Text text(b.get(), cache);
  text.Prompt(3000);
  text.Steps(3);
  cache.Spoil(500);
  text.Add(1);
  EXPECT_GE(Counter(b.get(), "ggml_failures"), 1u);
  cache.Fill(500);
  EXPECT_LE(text.Steps(20), kDelta);
}

TEST(FlashAttentionTest, QueriesThatAreTooLargeAreGgmls) {
  const BackendPtr b = Make();
  Cache cache({}, 18);
  Text text(b.get(), cache);
  text.Prompt(3000);
  for (const int64_t tokens : {1, 40}) {
    std::vector<float> queries = cache.Queries(tokens);
    queries[5] = 1e5f;
    Attend(b.get(), cache, {RunMask(0, 3000, tokens, 3072)}, 1, &queries);
  }
  EXPECT_EQ(Counter(b.get(), "ggml_failures"), 2u);
}

// Two layers that read one cache, as in models that share KV, with other numbers of query heads.
TEST(FlashAttentionTest, LayersThatShareACacheAreApart) {
  const BackendPtr b = Make();
  Cache cache({}, 19);
  Text text(b.get(), cache);
  text.Prompt(3000);
  text.Steps(3);
  cache.set_q_heads(8);
  for (int64_t end = 3000; end < 3040; ++end)
    EXPECT_LT(Attend(b.get(), cache, {RunMask(0, end, 1, 3072)}).worst(), 5 * kEpsilon);
  EXPECT_EQ(Counter(b.get(), "tables_learnt"), 2u);
}

TEST(FlashAttentionTest, OptionsCount) {
  Cache cache({}, 17);
  uint64_t rows[2] = {};
  for (const int i : {0, 1}) {
    const BackendPtr b = Make(i == 0 ? R"({"epsilon": 0.2})" : R"({"epsilon": 0.05})");
    Text text(b.get(), cache);
    text.Prompt(4000);
    text.Steps(20);
    rows[i] = Counter(b.get(), "rows_selected");
  }
  EXPECT_LT(rows[0], rows[1]);
  const BackendPtr dense = Make(R"({"policy": "dense"})");
  Text text(dense.get(), cache);
  text.Prompt(3000);
  for (int i = 0; i < 40; ++i) EXPECT_LT(text.Add(1).worst(), kExact);
  EXPECT_EQ(Counter(dense.get(), "dense_calls"), 40u);
}

// ggml sums values up in fp16 in a step of one token, which tells on long runs.
TEST(FlashAttentionTest, ErrorsOfBoth) {
  const BackendPtr dense = Make(R"({"policy": "dense"})");
  const BackendPtr ggml(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr),
                        ggml_backend_free);
  Cache cache({.q_heads = 12, .kv_heads = 2, .dim = 128, .cells = 32768}, 1);
  cache.Fill(0, 32768, 0);
  for (const int64_t cells : {4096, 16384, 32768}) {
    const double ours = Attend(dense.get(), cache, {RunMask(0, cells, 1, cells)}).Mean(),
                 theirs = Attend(ggml.get(), cache, {RunMask(0, cells, 1, cells)}).Mean();
    std::printf("%lld cells: mean error %.1e by vattn with policy dense, %.1e by ggml\n",
                static_cast<long long>(cells), ours, theirs);
    EXPECT_LT(ours, 1e-3);
  }
}

TEST(FlashAttentionTest, WrongOptionsAreRefused) {
  EXPECT_EQ(Make(R"({"epsilom": 0.2})"), nullptr);
  EXPECT_EQ(Make(R"({"policy": "topk"})"), nullptr);
  EXPECT_EQ(Make(R"({"profile": "file"})"), nullptr);
  EXPECT_EQ(Make("yes"), nullptr);
  EXPECT_EQ(Make("1", "many"), nullptr);
  EXPECT_EQ(Make("1", "0"), nullptr);
  EXPECT_NE(Make(), nullptr);
}

TEST(FlashAttentionTest, HiddenUnlessAsked) {
  ggml_backend_reg_t reg = ggml_backend_reg_by_name("VATTN");
  for (const char* value : {"", "0"}) {
    setenv("GGML_VATTN", value, 1);
    EXPECT_EQ(ggml_backend_reg_dev_count(reg), 0u);
  }
  unsetenv("GGML_VATTN");
  EXPECT_EQ(ggml_backend_reg_dev_count(reg), 0u);
  setenv("GGML_VATTN", "1", 1);
  EXPECT_EQ(ggml_backend_reg_dev_count(reg), 1u);
}

// What is not served is declined when a graph is built, so that ggml's CPU backend has it.
TEST(FlashAttentionTest, DeclinesOtherKinds) {
  const BackendPtr b = Make();
  struct Kind {
    const char* name;
    ggml_type type = GGML_TYPE_F16;
    int64_t dim = 64;
    float bias = 0, softcap = 0;
    bool sinks = false, masked = true, stored = true, expected = false;
  };
  const Kind kinds[] = {{.name = "plain", .expected = true},
                        {.name = "softcap", .softcap = 30},
                        {.name = "ALiBi", .bias = 8},
                        {.name = "sinks", .sinks = true},
                        {.name = "quantised", .type = GGML_TYPE_Q8_0},
                        {.name = "fp32", .type = GGML_TYPE_F32},
                        {.name = "no mask", .masked = false},
                        {.name = "odd head dimension", .dim = 40},
                        {.name = "no cache", .stored = false}};
  for (const Kind& kind : kinds) {
    const std::unique_ptr<ggml_context, decltype(&ggml_free)> context(
        ggml_init({.mem_size = 1 << 20, .mem_buffer = nullptr, .no_alloc = true}), ggml_free);
    ggml_context* const g = context.get();
    const auto rows = [&] {
      ggml_tensor* t = ggml_new_tensor_3d(g, kind.type, kind.dim, 2, 512);
      if (!kind.stored) t = ggml_dup(g, t);
      return ggml_permute(g, t, 0, 2, 1, 3);
    };
    ggml_tensor* const q =
        ggml_permute(g, ggml_new_tensor_3d(g, GGML_TYPE_F32, kind.dim, 8, 1), 0, 2, 1, 3);
    ggml_tensor* const mask = kind.masked ? ggml_new_tensor_2d(g, GGML_TYPE_F16, 512, 1) : nullptr;
    ggml_tensor* const k = rows();
    ggml_tensor* const op =
        ggml_flash_attn_ext(g, q, k, rows(), mask, 0.125f, kind.bias, kind.softcap);
    if (kind.sinks) ggml_flash_attn_ext_add_sinks(op, ggml_new_tensor_1d(g, GGML_TYPE_F32, 8));
    EXPECT_EQ(ggml_backend_supports_op(b.get(), op), kind.expected) << kind.name;
    EXPECT_FALSE(ggml_backend_supports_op(b.get(), ggml_cont(g, q)));
  }
}

}  // namespace
}  // namespace vattn::llama_cpp

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  setenv("GGML_VATTN", "1", 1);
  ggml_backend_load_all_from_path(VATTN_LLAMA_CPP_BIN);
  if (ggml_backend_load(VATTN_GGML_BACKEND) == nullptr) return 1;
  return RUN_ALL_TESTS();
}
