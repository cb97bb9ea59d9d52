// Sequences whose every operation is run while memory is refused.
#ifndef VATTN_TESTS_API_MEMORY_FAULT_FIXTURE_H_
#define VATTN_TESTS_API_MEMORY_FAULT_FIXTURE_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tests/api/attention_model.h"
#include "tests/api/owned_prefix.h"
#include "tests/api/refused_memory.h"

namespace vattn::test {

inline constexpr int kLayers = 2, kSlots = 2;
inline constexpr int64_t kPrompt = 400;
inline const Shape kShape = {4, 2, 16, 16, false, VATTN_F32};
inline std::filesystem::path MakeFolder() {
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("memory_fault_test." + std::to_string(getpid()));
  std::filesystem::create_directory(folder);
  return folder;
}

inline vattn_options MakeOptions(const char* disk_path) {
  vattn_options options = OptionsFor(kShape);
  options.backend = VATTN_BACKEND_CPU;
  options.num_layers = kLayers;
  options.window = 32;
  options.exact_below = 64;
  options.epsilon = .2f;
  options.hot_share = .2f;
  options.host_bytes = 16 << 20;
  options.disk_path = disk_path;
  options.spill = 1;
  options.io_block_bytes = 1 << 16;
  return options;
}

// Inputs of all calls, made once.
struct Inputs {
  Inputs() {
    std::mt19937_64 engine(1);
    prompt.AddGaussian(kShape, engine, kPrompt);
    more.AddGaussian(kShape, engine, 200);
    queries = Gaussian(engine, VATTN_F32, 16 * kShape.q_heads * kShape.dim_k, 1);
    for (int i = 0; i < 8; ++i) {
      calls.emplace_back(kShape, kSlots, i % kLayers);
      calls.back().Fill(engine, i / kLayers > 0 ? 1 : 0, 2);
    }
  }
  Rows prompt, more;
  std::vector<float> queries;
  std::vector<Call> calls;
};

template <class T>
void Add(std::string& text, const std::vector<T>& values) {
  text.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

class MemoryFaultTest : public testing::Test {
 protected:
  MemoryFaultTest()
      : folder_(MakeFolder()),
        path_(folder_ / "file"),
        runtime_(MakeOptions((folder_ / "disk").c_str())) {}
  ~MemoryFaultTest() override { std::filesystem::remove_all(folder_); }

  vattn_append_params AppendParams(const Rows& rows, int layer, bool with_queries) const {
    vattn_append_params params = Init<vattn_append_params>();
    params.layer = layer;
    params.num_tokens = rows.tokens;
    params.k = rows.k.data();
    params.v = rows.v.data();
    params.q = inputs_.queries.data();
    params.num_queries = with_queries ? 16 : 0;
    return params;
  }

  std::unique_ptr<Sequence> MakeSequence(uint64_t id = 7, int64_t tokens = kPrompt) const {
    auto made = std::make_unique<Sequence>(runtime_, id);
    for (int layer = 0; layer < kLayers && tokens > 0; ++layer) {
      made->Append(AppendParams(inputs_.prompt, layer, true));
    }
    return made;
  }

  // What a sequence answers in two steps, and its length after each: rows, codes, tables,
  // controller states and random numbers are all in it.
  std::string Answers(const Sequence& sequence) {
    std::string text;
    Batch batch(runtime_, kSlots);
    batch.Set(1, sequence);
    for (int step = 0; step < 2; ++step) {
      batch.BeginStep(step > 0 ? 1 : 0);
      for (int layer = 0; layer < kLayers; ++layer) {
        Call& call = inputs_.calls[static_cast<size_t>(step * kLayers + layer)];
        batch.Attend(call.Params());
        Add(text, call.Out(1, 3));
        Add(text, call.lse), Add(text, call.error), Add(text, call.verdict);
        Add(text, call.selected), Add(text, call.fetched), Add(text, call.looks);
        Add(text, std::vector<int64_t>{sequence.Length(layer)});
      }
    }
    return text;
  }

  static int64_t OpenDescriptors() {
    const std::filesystem::directory_iterator descriptors("/proc/self/fd");
    return std::distance(begin(descriptors), end(descriptors));
  }

  // make() before, result() after each run of call().
  void EveryFailingAllocation(const std::function<void()>& make,
                              const std::function<vattn_code()>& call,
                              const std::function<std::string()>& result, int64_t least) {
    make();
    ASSERT_EQ(call(), VATTN_OK) << vattn_last_error();
    const std::string expected = result();
    const int64_t descriptors = OpenDescriptors();
    for (const bool for_ever : {false, true}) {
      int64_t refusals = 0;
      for (int64_t n = 1;; ++n) {
        SCOPED_TRACE(testing::Message() << "allocation " << n << (for_ever ? " and after" : ""));
        make();
        memory_faults = {.armed = true, .for_ever = for_ever, .fail_at = n};
        const vattn_code code = call();
        memory_faults.armed = false;
        if (code != VATTN_OK) {
          ++refusals;
          EXPECT_EQ(code, VATTN_OUT_OF_MEMORY) << vattn_last_error();
          EXPECT_NE(std::string(vattn_last_error()).find("memory"), std::string::npos)
              << vattn_last_error();
          const vattn_code again = call();
          EXPECT_EQ(again, VATTN_OK) << vattn_last_error();
          if (again != VATTN_OK) return;
        }
        EXPECT_TRUE(result() == expected);
        EXPECT_EQ(OpenDescriptors(), descriptors);
        if (HasFailure()) return;
        if (memory_faults.failed == 0) break;
      }
      EXPECT_GE(refusals, least);
    }
  }

  void TearDown() override {
    sequence_.reset();
    hog_.reset();
    handle_.reset();
    batch_.reset();
    const vattn_stats stats = runtime_.Stats();
    EXPECT_EQ(stats.host_bytes_used, 0u);
    EXPECT_EQ(stats.sequences, 0u);
    EXPECT_EQ(stats.tokens, 0u);
    const Sequence all(runtime_, 0,
                       static_cast<int64_t>(stats.host_bytes_limit / block_bytes_ / 4) * 256);
  }

  // Hands a new sequence over to handle_.
  vattn_code Keep(vattn_code code, vattn_sequence*& made) {
    EXPECT_EQ(made != nullptr, code == VATTN_OK);
    handle_.reset(made);
    return code;
  }

  const std::filesystem::path folder_;
  const std::string path_;
  Inputs inputs_;
  Runtime runtime_;
  const uint64_t block_bytes_ = [this] {
    const Sequence one(runtime_, 0, 1);
    return runtime_.Stats().host_bytes_used / 4;
  }();
  std::unique_ptr<Sequence> sequence_, hog_;
  std::unique_ptr<vattn_sequence, Destroyer<vattn_sequence, vattn_sequence_destroy>> handle_;
  std::unique_ptr<Batch> batch_;
};

}  // namespace vattn::test

#endif  // VATTN_TESTS_API_MEMORY_FAULT_FIXTURE_H_
