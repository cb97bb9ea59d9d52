#include "kernels/cpu/prefill.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cpu/products.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/workers.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/prefill.cc"
// Highway's order, which is not the alphabet's.
// clang-format off
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
#include <hwy/contrib/math/math-inl.h>
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace vattn::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));

// Logits s [keys][queries] of one more block of keys become weights relative to the largest logit
// of each query so far. most and mass [queries] are brought up to date; factor [queries] is what
// sums of before are to be multiplied with. queries is a multiple of 16.
void Weigh(float* s, int keys, int queries, float* most, float* mass, float* factor) {
  const D d;
  for (int q = 0; q < queries; q += kLanes) {
    const auto before = hn::LoadU(d, most + q);
    auto now = before;
    for (int k = 0; k < keys; ++k) now = hn::Max(hn::LoadU(d, s + k * queries + q), now);
    auto sum = hn::Zero(d);
    for (int k = 0; k < keys; ++k) {
      float* const at = s + k * queries + q;
      const auto e = hn::Exp(d, hn::Sub(hn::LoadU(d, at), now));
      hn::StoreU(e, d, at);
      sum = hn::Add(sum, e);
    }
    const auto fade = hn::Exp(d, hn::Sub(before, now));
    hn::StoreU(now, d, most + q);
    hn::StoreU(fade, d, factor + q);
    hn::StoreU(hn::MulAdd(hn::LoadU(d, mass + q), fade, sum), d, mass + q);
  }
}

}  // namespace vattn::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vattn::cpu {

HWY_EXPORT(Weigh);

namespace {

constexpr int kTileQueries = 128;  // query heads of a KV head and a tile of tokens, about
constexpr int kQueryUnit = 16;     // products take columns in this many

// Query tokens [begin, end) of the call for one KV head, and their sums. A query is a query head of
// a token; those of a token follow each other, and zeros fill the tile up to a multiple of 16.
class Tile {
 public:
  Tile(const PrefillParams& p, int kv_head, int64_t begin, int64_t end)
      : p_(p),
        kv_head_(kv_head),
        begin_(begin),
        end_(end),
        used_(static_cast<int>(end - begin) * p.group_heads),
        queries_((used_ + kQueryUnit - 1) / kQueryUnit * kQueryUnit),
        dim_k_(p.storage.row.dim_k),
        dim_v_(p.storage.row.dim_v),
        query_(static_cast<size_t>(dim_k_) * queries_, 0.f),
        keys_(static_cast<size_t>(kBlockTokens) * dim_k_),
        values_(static_cast<size_t>(kBlockTokens) * dim_v_),
        weights_(static_cast<size_t>(kBlockTokens) * queries_),
        sums_(static_cast<size_t>(queries_) * dim_v_, 0.f),
        // Finite, so that a query may see no key of a block.
        most_(queries_, std::numeric_limits<float>::lowest()),
        mass_(queries_, 0.f),
        factor_(queries_) {
    LoadQueries();
  }

  void Attend() {
    const int64_t all = p_.first + end_;
    for (int64_t token = 0; token < all; token += kBlockTokens) {
      AddBlock(token, static_cast<int>(std::min<int64_t>(kBlockTokens, all - token)));
    }
    for (int i = 0; i < used_; ++i) Write(i);
  }

 private:
  int64_t TokenOf(int i) const { return begin_ + i / p_.group_heads; }
  int64_t HeadOf(int i) const { return int64_t{kv_head_} * p_.group_heads + i % p_.group_heads; }

  // query_ [dim_k][queries], scaled.
  void LoadQueries() {
    float one[kMaxDim];
    const int element = ElementBytes(p_.storage.row.dtype);
    for (int i = 0; i < used_; ++i) {
      const uint8_t* const row =
          static_cast<const uint8_t*>(p_.q) +
          (TokenOf(i) * p_.q_token_stride + HeadOf(i) * p_.q_head_stride) * element;
      LoadRows(
          {.rows = &row, .count = 1, .offset = 0, .dim = dim_k_, .dtype = p_.storage.row.dtype},
          one);
      for (int c = 0; c < dim_k_; ++c)
        query_[static_cast<size_t>(c) * queries_ + i] = one[c] * p_.storage.scale;
    }
  }

  // The `count` tokens from `token` on, at most 256.
  void AddBlock(int64_t token, int count) {
    const Storage& s = p_.storage;
    const uint8_t* rows[kBlockTokens];
    for (int t = 0; t < count; ++t) {
      rows[t] =
          reinterpret_cast<const uint8_t*>(RowAt(s, p_.blocks[kv_head_], kv_head_, token + t));
    }
    LoadRows({.rows = rows, .count = count, .offset = 0, .dim = dim_k_, .dtype = s.row.dtype},
             keys_.data());
    LoadRows({.rows = rows,
              .count = count,
              .offset = s.row.v_offset,
              .dim = dim_v_,
              .dtype = s.row.dtype},
             values_.data());
    MapRows(keys_.data(), count, dim_k_, query_.data(), queries_, weights_.data());
    HideLaterTokens(token, count);
    HWY_DYNAMIC_DISPATCH(Weigh)
    (weights_.data(), count, queries_, most_.data(), mass_.data(), factor_.data());
    for (int i = 0; i < used_; ++i) {
      if (factor_[i] == 1) continue;
      for (int c = 0; c < dim_v_; ++c) sums_[static_cast<size_t>(i) * dim_v_ + c] *= factor_[i];
    }
    AddWeightedRows(weights_.data(), queries_, values_.data(), count, dim_v_, sums_.data());
  }

  // A query token does not see what comes after it.
  void HideLaterTokens(int64_t token, int count) {
    for (int64_t t = std::max(token, p_.first + begin_ + 1); t < token + count; ++t) {
      const int64_t hidden = std::min<int64_t>(used_, (t - p_.first - begin_) * p_.group_heads);
      float* const row = weights_.data() + (t - token) * queries_;
      std::fill(row, row + hidden, -std::numeric_limits<float>::infinity());
    }
  }

  void Write(int i) {
    float* const sum = sums_.data() + static_cast<size_t>(i) * dim_v_;
    for (int c = 0; c < dim_v_; ++c) sum[c] /= mass_[i];
    const DType dtype = static_cast<DType>(p_.out_dtype);
    const int64_t place = TokenOf(i) * p_.q_heads + HeadOf(i);
    StoreRow(sum, dim_v_, dtype,
             static_cast<uint8_t*>(p_.out) + place * dim_v_ * ElementBytes(dtype));
    if (p_.lse != nullptr) p_.lse[place] = most_[i] + std::log(mass_[i]);
  }

  const PrefillParams& p_;
  const int kv_head_;
  const int64_t begin_, end_;
  const int used_, queries_, dim_k_, dim_v_;
  std::vector<float> query_, keys_, values_, weights_;
  std::vector<float> sums_;  // [queries][dim_v] of weight times value
  std::vector<float> most_, mass_, factor_;
};

}  // namespace

void Prefill(const PrefillParams& p, Workers* workers) {
  const int64_t tokens = std::max(1, kTileQueries / p.group_heads);
  const int64_t tiles = (p.count + tokens - 1) / tokens;
  // The last tiles first: they see the most keys.
  ParallelFor(workers, tiles * p.kv_heads, [&](int64_t i) {
    const int64_t begin = (tiles - 1 - i / p.kv_heads) * tokens;
    Tile(p, static_cast<int>(i % p.kv_heads), begin, std::min(p.count, begin + tokens)).Attend();
  });
}

}  // namespace vattn::cpu
#endif
