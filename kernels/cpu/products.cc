#include "kernels/cpu/products.h"

#include <algorithm>
#include <cstring>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/products.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace vattn::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));
constexpr int kPanel = 16;  // columns of a product at a time
// Terms at a time: a panel of b and six rows of a stay in the first-level cache
constexpr int kDepth = 256;

// c [kRows][c_row] += a b, with a(i, k) at a[i * a_row + k * a_column] and b a panel [depth][16].
template <int kRows>
void AddPanel(const float* a, int64_t a_row, int64_t a_column, const float* b, int depth, float* c,
              int64_t c_row) {
  const D d;
  constexpr int kVectors = kPanel / kLanes < 2 ? 1 : 2;
  for (int part = 0; part < kPanel; part += kVectors * kLanes) {
    hn::Vec<D> sum[kRows][kVectors];
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v)
        sum[i][v] = hn::LoadU(d, c + i * c_row + part + v * kLanes);
    }
    for (int k = 0; k < depth; ++k) {
      hn::Vec<D> right[kVectors];
      for (int v = 0; v < kVectors; ++v) right[v] = hn::Load(d, b + k * kPanel + part + v * kLanes);
      for (int i = 0; i < kRows; ++i) {
        const auto left = hn::Set(d, a[i * a_row + k * a_column]);
        for (int v = 0; v < kVectors; ++v) sum[i][v] = hn::MulAdd(left, right[v], sum[i][v]);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v)
        hn::StoreU(sum[i][v], d, c + i * c_row + part + v * kLanes);
    }
  }
}

// c [m][n] += a b over `terms` terms; a(i, k) as above, b [terms][n], n a multiple of 16.
void AddProduct(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t m,
                int64_t n, int64_t terms, float* c) {
  constexpr int kRows = 6;
  alignas(64) float panel[kDepth * kPanel];
  for (int64_t k = 0; k < terms; k += kDepth) {
    const int depth = static_cast<int>(std::min<int64_t>(kDepth, terms - k));
    const float* left = a + k * a_column;
    for (int64_t j = 0; j < n; j += kPanel) {
      for (int t = 0; t < depth; ++t)
        std::memcpy(panel + t * kPanel, b + (k + t) * n + j, kPanel * sizeof(float));
      int64_t i = 0;
      for (; i + kRows <= m; i += kRows)
        AddPanel<kRows>(left + i * a_row, a_row, a_column, panel, depth, c + i * n + j, n);
      for (; i < m; ++i)
        AddPanel<1>(left + i * a_row, a_row, a_column, panel, depth, c + i * n + j, n);
    }
  }
}

// Width 0: not coded. All [dim].
void SquareLevels(const float* width, const float* inverse, const float* half, int64_t count,
                  int dim, float* x) {
  const D d;
  const auto one = hn::Set(d, 1.f), middle = hn::Set(d, .5f);
  for (int64_t i = 0; i < count; ++i, x += dim) {
    for (int j = 0; j < dim; j += kLanes) {
      const auto at = hn::LoadU(d, x + j), most = hn::LoadU(d, half + j);
      const auto floor = hn::Floor(hn::Mul(at, hn::LoadU(d, inverse + j)));
      const auto level = hn::Min(hn::Max(floor, hn::Neg(most)), hn::Sub(most, one));
      const auto r = hn::NegMulAdd(hn::Add(level, middle), hn::LoadU(d, width + j), at);
      hn::StoreU(hn::Mul(r, r), d, x + j);
    }
  }
}

void DotWeights(const float* rows, int64_t count, int dim, const float* weight, float* out) {
  const D d;
  for (int64_t i = 0; i < count; ++i, rows += dim) {
    auto sum = hn::Zero(d);
    for (int j = 0; j < dim; j += kLanes)
      sum = hn::MulAdd(hn::LoadU(d, weight + j), hn::LoadU(d, rows + j), sum);
    out[i] = hn::GetLane(hn::SumOfLanes(d, sum));
  }
}

}  // namespace vattn::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vattn::cpu {

HWY_EXPORT(AddProduct);
HWY_EXPORT(SquareLevels);
HWY_EXPORT(DotWeights);

void AddOuterProducts(const float* rows, int64_t count, int dim, float* sum) {
  HWY_DYNAMIC_DISPATCH(AddProduct)(rows, 1, dim, rows, dim, dim, count, sum);
}

void MapRows(const float* rows, int64_t count, int dim, const float* map, int columns, float* out) {
  std::fill(out, out + count * columns, 0.f);
  HWY_DYNAMIC_DISPATCH(AddProduct)(rows, dim, 1, map, count, columns, dim, out);
}

void AddWeightedRows(const float* weights, int queries, const float* rows, int64_t count, int dim,
                     float* sums) {
  HWY_DYNAMIC_DISPATCH(AddProduct)(weights, 1, queries, rows, queries, dim, count, sums);
}

void SquareResiduals(const CodeLayout& code, const float* step, int64_t count, int dim, float* x) {
  std::vector<float> width(dim, 0.f), inverse(dim, 0.f), half(dim, 1.f);
  for (int j = 0; j < code.dims(); ++j) {
    width[j] = step[j];
    inverse[j] = 1 / step[j];
    half[j] = j < code.dims8 ? 64 : j < code.dims8 + code.dims4 ? 8 : 2;
  }
  HWY_DYNAMIC_DISPATCH(SquareLevels)(width.data(), inverse.data(), half.data(), count, dim, x);
}

void WeighRows(const float* rows, int64_t count, int dim, const float* weight, float* out) {
  HWY_DYNAMIC_DISPATCH(DotWeights)(rows, count, dim, weight, out);
}

}  // namespace vattn::cpu
#endif
