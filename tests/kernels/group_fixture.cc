#include "tests/kernels/group_fixture.h"

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/cpu/attend.h"
#include "kernels/cpu/encode.h"
#include "kernels/cpu/scan.h"
#include "runtime/quantiles.h"

namespace vattn {
namespace {

// Bits of a float with so many mantissa bits and exponents from 1 - bias.
uint16_t NarrowBits(float value, int mantissa, int bias) {
  const int infinity = (2 * bias + 1) << mantissa;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return static_cast<uint16_t>(infinity | 1 << (mantissa - 1));
  if (std::isinf(value)) return static_cast<uint16_t>(sign | infinity);
  if (value == 0) return sign;
  int exponent;
  std::frexp(std::abs(static_cast<double>(value)), &exponent);
  exponent = std::max(exponent - 1, 1 - bias);
  const double units =
      std::nearbyint(std::ldexp(std::abs(static_cast<double>(value)), mantissa - exponent));
  const int bits = ((exponent + bias) << mantissa) + static_cast<int>(units) - (1 << mantissa);
  return static_cast<uint16_t>(sign | std::min(bits, infinity));
}

double DecodeNarrow(uint16_t bits, int mantissa, int bias) {
  const double sign = bits & 0x8000 ? -1 : 1;
  const int exponent = (bits & 0x7FFF) >> mantissa, fraction = bits & ((1 << mantissa) - 1);
  if (exponent == 2 * bias + 1) return fraction != 0 ? NAN : sign * INFINITY;
  const int hidden = exponent > 0 ? 1 << mantissa : 0;
  return sign * std::ldexp(hidden + fraction, std::max(exponent, 1) - bias - mantissa);
}

// The same from a table: references read every element of every row.
template <int kMantissa, int kBias>
double NarrowValue(uint16_t bits) {
  static const std::vector<double> values = [] {
    std::vector<double> all(1 << 16);
    for (int i = 0; i < 1 << 16; ++i)
      all[i] = DecodeNarrow(static_cast<uint16_t>(i), kMantissa, kBias);
    return all;
  }();
  return values[bits];
}

}  // namespace

uint16_t HalfBits(float value) { return NarrowBits(value, 10, 15); }
uint16_t BFloatBits(float value) { return NarrowBits(value, 7, 127); }
double HalfValue(uint16_t bits) { return NarrowValue<10, 15>(bits); }
double BFloatValue(uint16_t bits) { return NarrowValue<7, 127>(bits); }

double ReadElement(DType dtype, const void* at, int64_t index) {
  if (dtype == DType::kF32) return static_cast<const float*>(at)[index];
  const uint16_t bits = static_cast<const uint16_t*>(at)[index];
  return dtype == DType::kF16 ? HalfValue(bits) : BFloatValue(bits);
}

void WriteElement(DType dtype, void* at, int64_t index, float value) {
  if (dtype == DType::kF32) {
    static_cast<float*>(at)[index] = value;
  } else {
    static_cast<uint16_t*>(at)[index] = dtype == DType::kF16 ? HalfBits(value) : BFloatBits(value);
  }
}

std::vector<int64_t> SimdTargets() {
  hwy::SetSupportedTargetsForTest(0);
  const int64_t supported = hwy::SupportedTargets();
  std::vector<int64_t> targets = {0};
  for (const int64_t target : {HWY_SSE4, HWY_AVX2, HWY_AVX3}) {
    if ((supported & target) != 0) targets.push_back(target);
  }
  return targets;
}

void UseSimdTarget(int64_t target) {
  hwy::SetSupportedTargetsForTest(target);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

AlignedBytes AllocateAligned(size_t bytes) {
  AlignedBytes memory(static_cast<std::byte*>(::operator new (bytes, std::align_val_t{64})));
  std::memset(memory.get(), 0xA5, bytes);
  return memory;
}

GroupFixture::GroupFixture(const GroupShape& s, uint64_t seed, Promise p)
    : shape(s),
      promise(p),
      verdict(s.group_heads),
      lse(s.group_heads),
      error(s.group_heads),
      random_(seed),
      states_(s.group_heads) {
  storage.row = MakeRowLayout(s.dtype, s.dim_k, s.dim_v, s.shared_kv);
  storage.code = MakeIndexLayout(s.index, s.index_bytes, s.dim_k);
  storage.value_bits = s.value_bits;
  storage.value_code_bytes = ValueCodeBytes(s.value_bits, s.dim_v);
  storage.block = MakeBlockLayout(storage.row, storage.code.bytes(), storage.value_code_bytes);
  storage.scale = 1 / std::sqrt(static_cast<float>(s.dim_k));
  FillQuantiles(promise.bound, promise.delta, promise.max_looks, promise.pilot, quantile_);
  promise.quantile = quantile_;

  // Blocks lie in any order, one of them between any two not ours.
  const int64_t blocks = (s.tokens + kBlockTokens - 1) / kBlockTokens;
  for (int64_t b = 0; b < blocks; ++b) blocks_.push_back(static_cast<int32_t>(2 * b));
  std::shuffle(blocks_.begin(), blocks_.end(), random_);
  pool_ = AllocateAligned(2 * blocks * storage.block.bytes);
  storage.base = pool_.get();
  query_ = AllocateAligned(int64_t{s.group_heads} * s.dim_k * 4);
  out_ = AllocateAligned(int64_t{s.group_heads} * s.dim_v * 4);
  scratch_ = AllocateAligned(ScratchBytes(storage, promise, s.tokens, s.group_heads));

  group.blocks = blocks_.data();
  group.tokens = s.tokens;
  group.middle_begin = s.middle_begin;
  group.middle_end = s.middle_end;
  group.group_heads = s.group_heads;
  group.state = states_.data();
  group.key = MakeRandomKey(seed, 1, 0, 0);
  group.q = query_.get();
  group.out = out_.get();
  group.lse = lse.data();
  group.verdict = verdict.data();
  group.error = error.data();
  group.scratch = CarveScratch(storage, promise, s.tokens, s.group_heads, scratch_.get());

  // Keys around a mean whose variance falls over the dimensions; queries of unit variance.
  std::normal_distribution<float> normal;
  std::vector<double> spread(s.dim_k);
  double total = 0;
  for (int c = 0; c < s.dim_k; ++c) {
    spread[c] = std::exp(-c / (.25 * s.dim_k));
    total += spread[c] * spread[c];
  }
  const double scale = s.logit_spread * std::sqrt(s.dim_k / total);
  for (int64_t t = 0; t < s.tokens; ++t) {
    for (int c = 0; c < s.dim_k; ++c) {
      SetKey(t, c, static_cast<float>(scale * (spread[c] * normal(random_) + .1 * std::sin(c))));
    }
    if (s.shared_kv) continue;
    for (int j = 0; j < s.dim_v; ++j) SetValue(t, j, normal(random_) + .3f);
  }
  for (int g = 0; g < s.group_heads; ++g) {
    for (int c = 0; c < s.dim_k; ++c) SetQuery(g, c, normal(random_));
  }
}

std::byte* GroupFixture::Block(int64_t token) const {
  return storage.base + blocks_[token / kBlockTokens] * storage.block.bytes;
}

const std::byte* GroupFixture::Row(int64_t token) const {
  return Block(token) + token % kBlockTokens * storage.row.row_bytes;
}

double GroupFixture::Key(int64_t token, int c) const {
  return ReadElement(shape.dtype, Row(token), c);
}
double GroupFixture::Value(int64_t token, int j) const {
  return ReadElement(shape.dtype, Row(token) + storage.row.v_offset, j);
}
double GroupFixture::Query(int head, int c) const {
  return ReadElement(shape.dtype, query_.get(), int64_t{head} * shape.dim_k + c);
}

void GroupFixture::SetKey(int64_t token, int c, float value) {
  WriteElement(shape.dtype, const_cast<std::byte*>(Row(token)), c, value);
}
void GroupFixture::SetValue(int64_t token, int j, float value) {
  WriteElement(shape.dtype, const_cast<std::byte*>(Row(token)) + storage.row.v_offset, j, value);
}
void GroupFixture::SetQuery(int head, int c, float value) {
  WriteElement(shape.dtype, query_.get(), int64_t{head} * shape.dim_k + c, value);
}

double GroupFixture::Logit(int head, int64_t token) const {
  double sum = 0;
  for (int c = 0; c < shape.dim_k; ++c) sum += Query(head, c) * Key(token, c);
  return sum * storage.scale;
}

Attention GroupFixture::Attend(int head, const std::vector<int64_t>& tokens,
                               const std::vector<double>& log_weights) const {
  std::vector<double> logit, query(shape.dim_k);
  for (int c = 0; c < shape.dim_k; ++c) query[c] = Query(head, c) * storage.scale;
  for (size_t i = 0; i < tokens.size(); ++i) {
    double sum = log_weights.empty() ? 0 : log_weights[i];
    for (int c = 0; c < shape.dim_k; ++c) sum += query[c] * Key(tokens[i], c);
    logit.push_back(sum);
  }
  const double most = *std::max_element(logit.begin(), logit.end());
  Attention a{.out = std::vector<double>(shape.dim_v)};
  double mass = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const double e = std::exp(logit[i] - most);
    mass += e;
    for (int j = 0; j < shape.dim_v; ++j) {
      const double v = Value(tokens[i], j);
      a.out[j] += e * v;
      a.value_norm2 += e * v * v;
    }
  }
  for (double& x : a.out) x /= mass;
  a.value_norm2 /= mass;
  a.lse = std::log(mass) + most;
  return a;
}

Attention GroupFixture::AttendAll(int head) const {
  std::vector<int64_t> tokens(shape.tokens);
  for (int64_t t = 0; t < shape.tokens; ++t) tokens[t] = t;
  return Attend(head, tokens);
}

std::vector<double> GroupFixture::Output(int head) const {
  std::vector<double> out(shape.dim_v);
  for (int j = 0; j < shape.dim_v; ++j) {
    out[j] = ReadElement(static_cast<DType>(group.out_dtype), out_.get(),
                         int64_t{head} * shape.dim_v + j);
  }
  return out;
}

double GroupFixture::OutputError(int head, const Attention& exact) const {
  const std::vector<double> out = Output(head);
  double sum = 0;
  for (int j = 0; j < shape.dim_v; ++j) sum += (out[j] - exact.out[j]) * (out[j] - exact.out[j]);
  return std::sqrt(sum);
}

void GroupFixture::BuildIndex() {
  std::vector<float> keys, values, queries;
  for (int64_t t = shape.middle_begin; t < shape.middle_end; ++t) {
    for (int c = 0; c < shape.dim_k; ++c) keys.push_back(static_cast<float>(Key(t, c)));
    for (int j = 0; j < shape.dim_v; ++j) values.push_back(static_cast<float>(Value(t, j)));
  }
  for (int g = 0; g < shape.group_heads; ++g) {
    for (int c = 0; c < shape.dim_k; ++c)
      queries.push_back(static_cast<float>(Query(g, c)) * storage.scale);
  }
  QueryMoment moment(shape.dim_k);
  moment.Add(queries.data(), shape.group_heads, shape.group_heads);
  index = Index::Make(storage, keys.data(), values.data(), shape.middle_end - shape.middle_begin,
                      moment);
  group.index = index->tables();
  cpu::Encode({.storage = storage,
               .index = group.index,
               .blocks = group.blocks,
               .begin = shape.middle_begin,
               .end = shape.middle_end},
              {});
}

void GroupFixture::Scan(IndexKind kind) {
  cpu::ScaleQueries(storage, group);
  cpu::PrepareQueries(storage, kind, group);
  cpu::ScanEstimates(storage, kind, group, {});
}

void GroupFixture::ResetStates() { states_.assign(states_.size(), HeadState{}); }

int CodeLevel(const GroupFixture& f, int64_t token, int dim) {
  const CodeLayout& code = f.storage.code;
  int word, bits, in_word;
  if (dim < code.dims8) {
    word = dim / 4, bits = 8, in_word = dim % 4;
  } else if (dim < code.dims8 + code.dims4) {
    const int d = dim - code.dims8;
    word = code.dims8 / 4 + d / 8, bits = 4, in_word = d % 8;
  } else if (dim < code.dims8 + code.dims4 + code.dims2) {
    const int d = dim - code.dims8 - code.dims4;
    word = code.dims8 / 4 + code.dims4 / 8 + d / 16, bits = 2, in_word = d % 16;
  } else {
    const int d = dim - code.dims8 - code.dims4 - code.dims2;
    word = code.words() - code.dims1 / 32 + d / 32, bits = 1, in_word = d % 32;
  }
  const int64_t in = token % kBlockTokens, tile = in / kTileTokens, lane = in % kTileTokens;
  const std::byte* codes = f.Block(token) + f.storage.block.codes;
  const std::byte byte =
      codes[((tile * code.words() + word) * kTileTokens + lane) * 4 + in_word % 4];
  return std::to_integer<int>(byte) >> (in_word / 4 * bits) & ((1 << bits) - 1);
}

double CodePoint(const CodeLayout& code, int dim, int level) {
  const int half = dim < code.dims8                             ? 64
                   : dim < code.dims8 + code.dims4              ? 8
                   : dim < code.dims8 + code.dims4 + code.dims2 ? 2
                                                                : 1;
  return level + .5 - half;
}

int ValueLevel(const GroupFixture& f, int64_t token, int j) {
  const int bits = f.storage.value_bits, chunk = 128 / bits;
  const std::byte* codes = f.Block(token) + f.storage.block.value_codes +
                           token % kBlockTokens * f.storage.value_code_bytes;
  return std::to_integer<int>(codes[j / chunk * 16 + j % 16]) >> (j % chunk / 16 * bits) &
         ((1 << bits) - 1);
}

double DecodedValue(const GroupFixture& f, int64_t token, int j) {
  const int half = 1 << (f.storage.value_bits - 1);
  return f.group.index.value_mean[j] +
         (ValueLevel(f, token, j) + .5 - half) * f.group.index.value_step[j];
}

}  // namespace vattn
