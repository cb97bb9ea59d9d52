// The CUDA backend against the CPU backend: the same options, ids, rows and queries on both give
// the same draws, verdicts, outputs and saved bytes (tests/cuda/cuda_twins.h says how nearly).
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <string>

#include "kernels/params.h"
#include "memory/snapshot.h"
#include "tests/cuda/cuda_calls.h"
#include "tests/cuda/cuda_twins.h"

namespace vattn::test {
namespace {

constexpr float kEpsilon = .2f;
// Around the edges of the sets, of blocks and of exact_below; -1: an empty slot.
const std::vector<int64_t> kLengths = {0,    1,    15,   -1,   16,    17, 1151,
                                       1152, 1153, 1215, 4097, 20000, -1};

struct Case {
  const char* name;
  Shape shape;
  float query_sigma = 1;  // logits of isotropic keys: no more than codes of 32 bytes can tell apart
  int steps = 20;
  int32_t value_bits = 0;
  int32_t index = VATTN_INDEX_BALANCED, index_bytes = 32;
};

void CompareSteps(Twins& twins, float query_sigma, int steps) {
  AnswerTally tally;
  for (int step = 0; step < steps; ++step) {
    SCOPED_TRACE("step " + std::to_string(step));
    auto [on_cpu, on_cuda] = twins.Calls(0, query_sigma);
    twins.BeginStep();
    twins.cpu.batch.Attend(on_cpu.Params());
    twins.cuda.batch.Attend(on_cuda.Params());
    CompareAnswers(twins, on_cpu, on_cuda, tally);
    if (testing::Test::HasFailure()) return;
  }
  ExpectAlike(tally);
}

// Keys about a mean of their own, which tables learnt from others misrepresent.
Rows MovedRows(const Shape& shape, std::mt19937_64& engine, int64_t count) {
  Rows rows = Twins::GaussianRows(shape, engine, count);
  const std::vector<float> mean =
      Gaussian(engine, shape.dtype, int64_t{shape.kv_heads} * shape.dim_k, 1);
  for (size_t i = 0; i < rows.k.size(); ++i) {
    rows.k[i] = Round(shape.dtype, rows.k[i] + mean[i % mean.size()]);
  }
  return rows;
}

// Payloads of a saved sequence, and the types of its records (runtime/files/sequence_file.h).
struct Saved {
  explicit Saved(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    uint64_t header[3] = {};
    file.read(reinterpret_cast<char*>(header), sizeof(header));
    const auto reader = SnapshotReader::Open(path.string(), /*layout=*/header[2], {});
    EXPECT_TRUE(reader.ok()) << reader.status();
    if (!reader.ok()) return;
    for (size_t i = 0; i < (*reader)->records().size(); ++i) {
      types.push_back((*reader)->records()[i].type);
      payloads.emplace_back((*reader)->records()[i].bytes);
      EXPECT_TRUE((*reader)->Read(i, payloads.back()).ok());
    }
  }

  std::vector<uint32_t> types;
  std::vector<std::vector<std::byte>> payloads;
};

// Rows and codes to the bit; tables but for the controller states that lie between two of their
// parts.
void CompareSaved(const Twins& twins, int slot, const std::filesystem::path& folder) {
  const std::filesystem::path on_cpu = folder / "cpu", on_cuda = folder / "cuda";
  twins.cpu.sequences[slot].Save(on_cpu);
  twins.cuda.sequences[slot].Save(on_cuda);
  const Saved a(on_cpu), b(on_cuda);
  ASSERT_EQ(a.types, b.types);
  constexpr uint32_t kGroup = 3, kBlock = 4;
  constexpr size_t kHead = 4 * sizeof(int64_t);
  const Shape& shape = twins.shape(0);
  const size_t states = static_cast<size_t>(shape.q_heads / shape.kv_heads) * sizeof(HeadState);
  int compared = 0;
  for (size_t i = 0; i < a.types.size(); ++i) {
    ASSERT_EQ(a.payloads[i].size(), b.payloads[i].size()) << "record " << i;
    // The first byte from `from` on, before `to`, in which the payloads differ; `to` if there is
    // none.
    const auto differ = [&](size_t from, size_t to) {
      while (from < to && a.payloads[i][from] == b.payloads[i][from]) ++from;
      return from;
    };
    const size_t all = a.payloads[i].size();
    if (a.types[i] == kGroup) {
      ASSERT_GE(all, kHead + states);
      EXPECT_EQ(differ(0, kHead), kHead) << "record " << i;
      EXPECT_EQ(differ(kHead + states, all), all) << "record " << i << ": index";
    } else {
      EXPECT_EQ(differ(0, all), all) << "record " << i << (a.types[i] == kBlock ? ": block" : "");
      compared += a.types[i] == kBlock;
    }
  }
  EXPECT_GE(compared, shape.kv_heads);
}

// Each backend goes on from the other's file.
void CompareRestored(const Twins& twins, const std::filesystem::path& folder, Call on_cpu) {
  Call on_cuda = on_cpu;
  const Sequence from_cuda = Sequence::Restore(twins.cpu.runtime, folder / "cuda");
  const Sequence from_cpu = Sequence::Restore(twins.cuda.runtime, folder / "cpu");
  Batch a(twins.cpu.runtime, 1), b(twins.cuda.runtime, 1);
  a.Set(0, from_cuda);
  b.Set(0, from_cpu);
  a.BeginStep(1);
  b.BeginStep(1);
  a.Attend(on_cpu.Params());
  b.Attend(on_cuda.Params());
  EXPECT_EQ(on_cpu.middle, on_cuda.middle);
  EXPECT_GT(on_cpu.middle[0], 1024);
  const double rms = std::sqrt(on_cpu.shape.dim_v);
  for (int h = 0; h < on_cpu.shape.q_heads; ++h) {
    const std::vector<float> mine = on_cpu.Out(0, h);
    EXPECT_LE(Norm(mine, on_cuda.Out(0, h)), 4 * double{kEpsilon} * std::max(Norm(mine), .5 * rms));
    EXPECT_EQ(on_cpu.verdict[h], on_cuda.verdict[h]);
  }
}

class CudaParityTest : public testing::TestWithParam<Case> {
 protected:
  CudaParityTest()
      : folder_(std::filesystem::temp_directory_path() /
                ("cuda_parity_test." + std::to_string(getpid()))) {
    std::filesystem::create_directory(folder_);
  }
  ~CudaParityTest() override { std::filesystem::remove_all(folder_); }

  const std::filesystem::path folder_;
};

vattn_options OptionsOf(const Case& c) {
  vattn_options options = OptionsFor(c.shape);
  options.epsilon = kEpsilon;
  options.seed = 7;
  options.value_bits = c.value_bits;
  options.index = c.index;
  options.index_bytes = c.index_bytes;
  options.host_bytes = uint64_t{512} << 20;
  return options;
}

// Indices of so many sequences have several segments, as many on both, and as many outliers.
void CompareGrowth(const Twins& twins, uint64_t sequences) {
  const vattn_stats on_cpu = twins.cpu.runtime.Stats(), on_cuda = twins.cuda.runtime.Stats();
  EXPECT_EQ(on_cpu.segments_learnt, on_cuda.segments_learnt);
  EXPECT_EQ(on_cpu.index_floods, on_cuda.index_floods);
  EXPECT_EQ(on_cpu.outliers, on_cuda.outliers);
  const bool grows = twins.options().index == VATTN_INDEX_BALANCED;
  EXPECT_GE(on_cpu.segments_learnt, (grows ? 3 : 1) * sequences);
}

TEST_P(CudaParityTest, AnswersAsTheCpu) {
  SKIP_WITHOUT_DEVICE();
  const Case& c = GetParam();
  Twins twins(OptionsOf(c), {c.shape}, kLengths);
  Lists lists(c.shape, twins.slots(), 20000 + 64);
  CompareSelect(twins, c.query_sigma, lists);
  CompareSteps(twins, c.query_sigma, c.steps);
  CompareSelected(twins, lists, c.query_sigma, true);
  CompareSelected(twins, lists, c.query_sigma, false);
  if (HasFailure()) return;
  for (int s = 0; s < twins.slots(); ++s) {
    SCOPED_TRACE("saved slot " + std::to_string(s));
    if (twins.Filled(s)) CompareSaved(twins, s, folder_);
  }
  Call call(c.shape, 1, 0);
  call.Fill(twins.engine, 1, c.query_sigma);
  CompareRestored(twins, folder_, call);
}

// Sequences that grow by rows unlike those before, in prompts and in steps: their indices have
// several segments, some of them learnt from the queries of steps.
TEST_P(CudaParityTest, GrowsAsTheCpu) {
  SKIP_WITHOUT_DEVICE();
  const Case& c = GetParam();
  constexpr int64_t kGrowth = 1800;
  Twins twins(OptionsOf(c), {c.shape}, {0, 500, -1, 1300, 4000});
  twins.BuildIndices();
  for (int part = 0; part < 2; ++part) {
    twins.Append(kGrowth, MovedRows);
    twins.BuildIndices();
  }
  Lists lists(c.shape, twins.slots(), 4000 + 3 * kGrowth + 64);
  CompareSelect(twins, c.query_sigma, lists);
  CompareSteps(twins, c.query_sigma, c.steps);
  if (HasFailure()) return;
  twins.Append(kGrowth, MovedRows);
  CompareSteps(twins, c.query_sigma, c.steps / 2);
  CompareSelected(twins, lists, c.query_sigma, true);
  // The queries of an open step are the CPU's alone until it has passed
  CompareSteps(twins, c.query_sigma, 1);
  CompareGrowth(twins, 3);
  if (HasFailure()) return;
  for (int s = 0; s < twins.slots(); ++s) {
    SCOPED_TRACE("saved slot " + std::to_string(s));
    if (twins.Filled(s)) CompareSaved(twins, s, folder_);
  }
  Call call(c.shape, 1, 0);
  call.Fill(twins.engine, 1, c.query_sigma);
  CompareRestored(twins, folder_, call);
}

// Several query tokens in a step draw, answer and leave behind the same; then one again. Each number of
// tokens has sequences of its own: once a group is read otherwise on one side, its controller goes on
// from there, and its draws are not alike any more.
TEST_P(CudaParityTest, AnswersSeveralTokensAsTheCpu) {
  SKIP_WITHOUT_DEVICE();
  const Case& c = GetParam();
  const int group = c.shape.q_heads / c.shape.kv_heads;
  for (const int tokens : {2, 16, 5}) {
    if (tokens * group > 128) continue;
    SCOPED_TRACE(std::to_string(tokens) + " tokens");
    Twins twins(OptionsOf(c), {c.shape}, {0, 1, -1, 1150, 1215, 6000});
    Lists lists(c.shape, twins.slots(), 8000);
    twins.query_tokens = tokens;
    CompareSelect(twins, c.query_sigma, lists);
    CompareSteps(twins, c.query_sigma, std::min(c.steps, 6));
    CompareSelected(twins, lists, c.query_sigma, true);
    CompareSelected(twins, lists, c.query_sigma, false);
    twins.query_tokens = 1;
    CompareSteps(twins, c.query_sigma, 2);
    if (HasFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, CudaParityTest,
    testing::Values(
        Case{"d64_g1_f32", {2, 2, 64, 64, false, VATTN_F32}},
        Case{"d64_g16_bf16", {32, 2, 64, 64, false, VATTN_BF16}},
        Case{"d80_g2_f16", {4, 2, 80, 80, false, VATTN_F16}},
        Case{"d96_g4_bf16", {8, 2, 96, 96, false, VATTN_BF16}},
        Case{"d96_g6_f32", {12, 2, 96, 96, false, VATTN_F32}},
        Case{"d128_g6_bf16", {12, 2, 128, 128, false, VATTN_BF16}},
        Case{"d128_g8_f16", {16, 2, 128, 128, false, VATTN_F16}},
        Case{"d128_g4_f32", {8, 2, 128, 128, false, VATTN_F32}},
        Case{"coarse_d128_g4_bf16", {8, 2, 128, 128, false, VATTN_BF16}, 6},
        Case{"d192_128_g16_bf16", {16, 1, 192, 128, false, VATTN_BF16}, .5f},
        Case{"d192_g2_f16", {4, 2, 192, 192, false, VATTN_F16}, .5f},
        Case{"d256_g1_bf16", {2, 2, 256, 256, false, VATTN_BF16}, .5f},
        Case{"d256_g4_f32", {4, 1, 256, 256, false, VATTN_F32}, .5f},
        Case{"mla_g16_bf16", {16, 1, 576, 512, true, VATTN_BF16}, .5f, 8},
        Case{"mla_g8_f16", {8, 1, 576, 512, true, VATTN_F16}, .5f, 8},
        Case{"mla_g128_bf16", {128, 1, 576, 512, true, VATTN_BF16}, .5f, 4},
        Case{"values2_d64_g1_f32", {2, 2, 64, 64, false, VATTN_F32}, 1, 20, 2},
        Case{"values4_d64_g4_bf16", {8, 2, 64, 64, false, VATTN_BF16}, 1, 20, 4},
        Case{"values2_d80_g2_f16", {4, 2, 80, 80, false, VATTN_F16}, 1, 20, 2},
        Case{"values4_d80_g6_f32", {12, 2, 80, 80, false, VATTN_F32}, 1, 20, 4},
        Case{"values2_d128_g4_bf16", {8, 2, 128, 128, false, VATTN_BF16}, 1, 20, 2},
        Case{"values4_d128_g8_f16", {16, 2, 128, 128, false, VATTN_F16}, 1, 20, 4},
        Case{"values2_d192_g16_bf16", {16, 1, 192, 192, false, VATTN_BF16}, .5f, 20, 2},
        Case{"values4_d192_128_g9_bf16", {9, 1, 192, 128, false, VATTN_BF16}, .5f, 20, 4},
        Case{"values2_d256_g12_f32", {12, 1, 256, 256, false, VATTN_F32}, .5f, 20, 2},
        Case{"values2_mla_g16_bf16", {16, 1, 576, 512, true, VATTN_BF16}, .5f, 8, 2},
        Case{"values4_mla_g128_f16", {128, 1, 576, 512, true, VATTN_F16}, .5f, 4, 4},
        Case{"sign32_d128_g4_bf16",
             {8, 2, 128, 128, false, VATTN_BF16},
             1,
             8,
             0,
             VATTN_INDEX_SIGN,
             32},
        Case{"sign16_d64_g1_f32", {2, 2, 64, 64, false, VATTN_F32}, 1, 8, 0, VATTN_INDEX_SIGN, 16},
        Case{"sign4_d96_g9_f16", {9, 1, 96, 96, false, VATTN_F16}, 1, 4, 0, VATTN_INDEX_SIGN, 4},
        Case{"hadamard2_d128_g4_bf16",
             {8, 2, 128, 128, false, VATTN_BF16},
             2,
             20,
             0,
             VATTN_INDEX_HADAMARD2},
        Case{"hadamard2_d80_g2_f16",
             {4, 2, 80, 80, false, VATTN_F16},
             2,
             20,
             0,
             VATTN_INDEX_HADAMARD2}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(CudaLayersTest, LayersMayDifferAndBeLeftOut) {
  SKIP_WITHOUT_DEVICE();
  const int32_t heads[] = {2, 0, 1, 4};
  std::vector<Shape> layers(4, {4, 0, 64, 64, false, VATTN_BF16});
  for (int l = 0; l < 4; ++l) layers[l].kv_heads = heads[l];
  vattn_options options = OptionsFor({4, 2, 64, 64, false, VATTN_BF16});
  options.num_layers = 4;
  options.layer_kv_heads = heads;
  options.epsilon = kEpsilon;
  Twins twins(options, layers, {1300, -1, 5000, 200});
  AnswerTally tally;
  for (int step = 0; step < 10; ++step) {
    twins.BeginStep();
    for (const int layer : {3, 0, 2}) {
      SCOPED_TRACE("layer " + std::to_string(layer));
      auto [on_cpu, on_cuda] = twins.Calls(layer, 2);
      twins.cpu.batch.Attend(on_cpu.Params());
      twins.cuda.batch.Attend(on_cuda.Params());
      CompareAnswers(twins, on_cpu, on_cuda, tally);
    }
  }
  ExpectAlike(tally);
}

TEST(CudaLayersTest, TheExactIndexDrawsTheSame) {
  SKIP_WITHOUT_DEVICE();
  const Shape shape = {8, 2, 64, 64, false, VATTN_BF16};
  vattn_options options = OptionsFor(shape);
  options.index = VATTN_INDEX_EXACT;
  options.epsilon = kEpsilon;
  Twins twins(options, {shape}, kLengths);
  Lists lists(shape, twins.slots(), 20000 + 64);
  CompareSelect(twins, 2, lists);
  CompareSteps(twins, 2, 10);
}

// The policy that reads everything, and out_dtypes, agree to rounding.
TEST(CudaLayersTest, DenseAgreesToRounding) {
  SKIP_WITHOUT_DEVICE();
  const Shape shape = {12, 2, 128, 128, false, VATTN_BF16};
  vattn_options options = OptionsFor(shape);
  options.policy = VATTN_POLICY_DENSE;
  Twins twins(options, {shape}, {0, 700, -1, 5000});
  for (const int32_t out_dtype : {VATTN_F32, VATTN_F16, VATTN_BF16}) {
    auto [on_cpu, on_cuda] = twins.Calls(0, 2, out_dtype);
    twins.BeginStep();
    twins.cpu.batch.Attend(on_cpu.Params());
    twins.cuda.batch.Attend(on_cuda.Params());
    EXPECT_EQ(on_cpu.verdict, on_cuda.verdict);
    for (int s = 0; s < twins.slots(); ++s) {
      for (int h = 0; h < shape.q_heads && twins.Filled(s); ++h) {
        const std::vector<float> mine = on_cpu.Out(s, h);
        const double rounding = out_dtype == VATTN_F32 ? 0 : out_dtype == VATTN_F16 ? 1e-3 : 8e-3;
        EXPECT_LE(Norm(mine, on_cuda.Out(s, h)),
                  4e-5 * std::sqrt(shape.dim_v) + rounding * Norm(mine));
      }
    }
  }
}

}  // namespace
}  // namespace vattn::test
