// A group of query heads over a fake host pool, and plain float64 definitions to hold operations
// to.
#ifndef VATTN_TESTS_KERNELS_GROUP_FIXTURE_H_
#define VATTN_TESTS_KERNELS_GROUP_FIXTURE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "kernels/params.h"
#include "runtime/index/index.h"

namespace vattn {

// Scalar conversions: round to nearest even, NaN stays NaN, overflow becomes infinity.
uint16_t HalfBits(float value);
uint16_t BFloatBits(float value);
double HalfValue(uint16_t bits);
double BFloatValue(uint16_t bits);
double ReadElement(DType dtype, const void* at, int64_t index);
void WriteElement(DType dtype, void* at, int64_t index, float value);

// SIMD instruction sets that the kernels were built for and this machine has; 0 stands for the
// library's own choice. UseSimdTarget stays in force until the next call.
std::vector<int64_t> SimdTargets();
void UseSimdTarget(int64_t target);

struct AlignedFree {
  void operator()(std::byte* p) const { ::operator delete (p, std::align_val_t{64}); }
};
using AlignedBytes = std::unique_ptr<std::byte[], AlignedFree>;
AlignedBytes AllocateAligned(size_t bytes);  // filled with 0xA5

struct GroupShape {
  DType dtype = DType::kF32;
  int dim_k = 64, dim_v = 64;
  bool shared_kv = false;
  int group_heads = 4;
  int64_t tokens = 1500;
  int64_t middle_begin = 16, middle_end = 1344;
  int index_bytes = 32;
  int value_bits = 0;
  double logit_spread = 2;  // standard deviation of the logits
  IndexKind index = IndexKind::kBalanced;
};

// Dimensions of keys and values that models use, the last one an MLA row.
struct Dims {
  int k, v;
  bool shared_kv;
};
inline constexpr Dims kDims[] = {{64, 64, false},   {80, 80, false},   {96, 96, false},
                                 {128, 128, false}, {192, 128, false}, {192, 192, false},
                                 {256, 256, false}, {576, 512, true}};
inline constexpr int kGroupSizes[] = {1, 3, 4, 6, 8, 16};

struct Attention {
  std::vector<double> out;
  double lse = 0;
  double value_norm2 = 0;  // mean of |v|^2 under attention
};

struct GroupFixture {
  explicit GroupFixture(const GroupShape& shape, uint64_t seed = 1, Promise promise = {});
  GroupFixture(const GroupFixture&) = delete;
  GroupFixture& operator=(const GroupFixture&) = delete;

  std::byte* Block(int64_t token) const;
  const std::byte* Row(int64_t token) const;
  double Key(int64_t token, int c) const;
  double Value(int64_t token, int j) const;
  double Query(int head, int c) const;  // unscaled
  void SetKey(int64_t token, int c, float value);
  void SetValue(int64_t token, int j, float value);
  void SetQuery(int head, int c, float value);
  double Logit(int head, int64_t token) const;
  // Attention of one head over the listed tokens, with log weights unless empty.
  Attention Attend(int head, const std::vector<int64_t>& tokens,
                   const std::vector<double>& log_weights = {}) const;
  Attention AttendAll(int head) const;
  // |out_head - o| and |o| of the group's result.
  double OutputError(int head, const Attention& exact) const;
  std::vector<double> Output(int head) const;

  // Calibrates on the middle and writes its codes. Keys and values must not change after it.
  void BuildIndex();
  // Scaled and prepared queries and estimates: what a draw starts from.
  void Scan(IndexKind kind = IndexKind::kBalanced);
  // Controller states as before the first step.
  void ResetStates();

  GroupShape shape;
  Storage storage;
  Promise promise;
  Group group;
  std::shared_ptr<const Index> index;
  std::vector<Verdict> verdict;
  std::vector<float> lse, error;

 private:
  std::mt19937_64 random_;
  AlignedBytes pool_, scratch_, query_, out_;
  std::vector<int32_t> blocks_;
  std::vector<HeadState> states_;
  float quantile_[kMaxLooks][kQuantileBins + 1];
};

// The level of code dimension `dim` of a token, read as kernels/geometry.h says.
int CodeLevel(const GroupFixture& fixture, int64_t token, int dim);
int ValueLevel(const GroupFixture& fixture, int64_t token, int j);
// What a level stands for, in steps.
double CodePoint(const CodeLayout& code, int dim, int level);
// v^ of a token.
double DecodedValue(const GroupFixture& fixture, int64_t token, int j);

}  // namespace vattn

#endif  // VATTN_TESTS_KERNELS_GROUP_FIXTURE_H_
