#include "kernels/cpu/rows.h"

#include <utility>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rows.cc"
#include <hwy/foreach_target.h>
#include <hwy/cache_control.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace vattn::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));
constexpr int kPrefetchRows = 8;  // rows ahead; selected rows are far apart in memory

template <DType kType>
HWY_INLINE V Load(const uint8_t* at, int element) {
  const D d;
  if constexpr (kType == DType::kF32) {
    return hn::LoadU(d, reinterpret_cast<const float*>(at) + element);
  } else if constexpr (kType == DType::kF16) {
    const hn::Rebind<hwy::float16_t, D> half;
    return hn::PromoteTo(d, hn::LoadU(half, reinterpret_cast<const hwy::float16_t*>(at) + element));
  } else {
    const hn::Rebind<hwy::bfloat16_t, D> half;
    return hn::PromoteTo(d, hn::LoadU(half, reinterpret_cast<const hwy::bfloat16_t*>(at) + element));
  }
}

template <class F>
HWY_INLINE void WithDType(DType dtype, F&& f) {
  if (dtype == DType::kBF16) {
    f(std::integral_constant<DType, DType::kBF16>());
  } else if (dtype == DType::kF16) {
    f(std::integral_constant<DType, DType::kF16>());
  } else {
    f(std::integral_constant<DType, DType::kF32>());
  }
}

HWY_INLINE void PrefetchRow(const RowList& list, int i) {
  if (i >= list.listed) return;
  for (int b = 0; b < list.prefetch_bytes; b += 64) hwy::Prefetch(list.rows[i] + b);
}

// Lane sums of kCount vectors, halved in length once for each doubling of the count: with kLanes
// vectors, lane i is the sum of vector i. Recursion, so that all of them stay in registers.
template <int kCount>
HWY_INLINE V LaneSums(const V* acc) {
  if constexpr (kCount == 1) {
    return acc[0];
  } else {
    const D d;
    const V lo = LaneSums<kCount / 2>(acc), hi = LaneSums<kCount / 2>(acc + kCount / 2);
    return hn::Add(hn::ConcatEven(d, hi, lo), hn::ConcatOdd(d, hi, lo));
  }
}

// kHeads heads by kLanes / kHeads rows at a time: kLanes sums fill one vector.
template <DType kType, int kHeads>
void DotHeads(const RowList& list, const float* queries, float* out, int64_t ld) {
  const D d;
  constexpr int kRows = kLanes / kHeads;
  alignas(64) float sums[kLanes];
  for (int first = 0; first < list.count; first += kRows) {
    const int rows = list.count - first < kRows ? list.count - first : kRows;
    const uint8_t* at[kRows];
    for (int r = 0; r < kRows; ++r) {
      at[r] = list.rows[first + (r < rows ? r : 0)] + list.offset;
      PrefetchRow(list, first + r + kPrefetchRows);
    }
    V acc[kLanes];
    for (int i = 0; i < kLanes; ++i) acc[i] = hn::Zero(d);
    for (int c = 0; c < list.dim; c += kLanes) {
      V row[kRows];
      for (int r = 0; r < kRows; ++r) row[r] = Load<kType>(at[r], c);
      for (int g = 0; g < kHeads; ++g) {
        const V q = hn::LoadU(d, queries + g * list.dim + c);
        for (int r = 0; r < kRows; ++r) acc[g * kRows + r] = hn::MulAdd(row[r], q, acc[g * kRows + r]);
      }
    }
    hn::Store(LaneSums<kLanes>(acc), d, sums);
    for (int g = 0; g < kHeads; ++g) {
      for (int r = 0; r < rows; ++r) out[g * ld + first + r] = sums[g * kRows + r];
    }
  }
}

void DotRows(const RowList& list, const float* queries, int heads, float* out, int64_t ld) {
  WithDType(list.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    int g = 0;
    for (; g + 4 <= heads; g += 4) DotHeads<kType, 4>(list, queries + g * list.dim, out + g * ld, ld);
    if (g + 2 <= heads) {
      DotHeads<kType, 2>(list, queries + g * list.dim, out + g * ld, ld);
      g += 2;
    }
    if (g < heads) DotHeads<kType, 1>(list, queries + g * list.dim, out + g * ld, ld);
  });
}

template <DType kType, int kHeads, int kVectors>
void AddChunk(const RowList& list, int c, const float* weights, int64_t ld, float* sum,
              int64_t sum_ld) {
  const D d;
  V acc[kHeads][kVectors];
  for (int g = 0; g < kHeads; ++g) {
    for (int v = 0; v < kVectors; ++v) acc[g][v] = hn::LoadU(d, sum + g * sum_ld + c + v * kLanes);
  }
  for (int i = 0; i < list.count; ++i) {
    const uint8_t* at = list.rows[i] + list.offset;
    V row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = Load<kType>(at, c + v * kLanes);
    for (int g = 0; g < kHeads; ++g) {
      const V w = hn::Set(d, weights[g * ld + i]);
      for (int v = 0; v < kVectors; ++v) acc[g][v] = hn::MulAdd(row[v], w, acc[g][v]);
    }
  }
  for (int g = 0; g < kHeads; ++g) {
    for (int v = 0; v < kVectors; ++v) hn::StoreU(acc[g][v], d, sum + g * sum_ld + c + v * kLanes);
  }
}

template <DType kType, int kHeads>
void AddHeads(const RowList& list, const float* weights, int64_t ld, float* sum, int64_t sum_ld) {
  int c = 0;
  for (; c + 4 * kLanes <= list.dim; c += 4 * kLanes) AddChunk<kType, kHeads, 4>(list, c, weights, ld, sum, sum_ld);
  for (; c < list.dim; c += kLanes) AddChunk<kType, kHeads, 1>(list, c, weights, ld, sum, sum_ld);
}

void AddRows(const RowList& list, const float* weights, int64_t ld, int heads, float* sum,
             int64_t sum_ld) {
  WithDType(list.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    int g = 0;
    for (; g + 4 <= heads; g += 4) AddHeads<kType, 4>(list, weights + g * ld, ld, sum + g * sum_ld, sum_ld);
    if (g + 2 <= heads) {
      AddHeads<kType, 2>(list, weights + g * ld, ld, sum + g * sum_ld, sum_ld);
      g += 2;
    }
    if (g < heads) AddHeads<kType, 1>(list, weights + g * ld, ld, sum + g * sum_ld, sum_ld);
  });
}

// acc[i] = lane-wise sum of the squares of row i, four rows at a time.
template <DType kType>
HWY_INLINE void SquareFour(const uint8_t* const* at, int dim, V* acc) {
  const D d;
  V a0 = hn::Zero(d), a1 = a0, a2 = a0, a3 = a0;
  for (int c = 0; c < dim; c += kLanes) {
    const V x0 = Load<kType>(at[0], c), x1 = Load<kType>(at[1], c);
    const V x2 = Load<kType>(at[2], c), x3 = Load<kType>(at[3], c);
    a0 = hn::MulAdd(x0, x0, a0);
    a1 = hn::MulAdd(x1, x1, a1);
    a2 = hn::MulAdd(x2, x2, a2);
    a3 = hn::MulAdd(x3, x3, a3);
  }
  acc[0] = a0, acc[1] = a1, acc[2] = a2, acc[3] = a3;
}

void NormRows(const RowList& list, float* out) {
  WithDType(list.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    const D d;
    alignas(64) float sums[kLanes];
    for (int first = 0; first < list.count; first += kLanes) {
      const int rows = list.count - first < kLanes ? list.count - first : kLanes;
      V acc[kLanes];
      for (int r = 0; r < kLanes; r += 4) {
        const uint8_t* at[4];
        for (int k = 0; k < 4; ++k) at[k] = list.rows[first + (r + k < rows ? r + k : 0)] + list.offset;
        SquareFour<kType>(at, list.dim, acc + r);
      }
      hn::Store(LaneSums<kLanes>(acc), d, sums);
      for (int r = 0; r < rows; ++r) out[first + r] = sums[r];
    }
  });
}

void DotPairs(const RowList& list, const float* other, float* out) {
  WithDType(list.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    const D d;
    for (int i = 0; i < list.count; ++i) {
      V acc = hn::Zero(d);
      for (int c = 0; c < list.dim; c += kLanes) {
        acc = hn::MulAdd(Load<kType>(list.rows[i] + list.offset, c), hn::LoadU(d, other + i * list.dim + c), acc);
      }
      out[i] = hn::GetLane(hn::SumOfLanes(d, acc));
    }
  });
}

void LoadRows(const RowList& list, float* out) {
  WithDType(list.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    const D d;
    for (int i = 0; i < list.count; ++i) {
      for (int c = 0; c < list.dim; c += kLanes) {
        hn::StoreU(Load<kType>(list.rows[i] + list.offset, c), d, out + i * list.dim + c);
      }
    }
  });
}

void StoreRow(const float* values, int count, DType dtype, void* out) {
  const D d;
  if (dtype == DType::kF32) {
    for (int c = 0; c < count; c += kLanes) hn::StoreU(hn::LoadU(d, values + c), d, static_cast<float*>(out) + c);
  } else if (dtype == DType::kF16) {
    const hn::Rebind<hwy::float16_t, D> half;
    for (int c = 0; c < count; c += kLanes) {
      hn::StoreU(hn::DemoteTo(half, hn::LoadU(d, values + c)), half, static_cast<hwy::float16_t*>(out) + c);
    }
  } else {  // round to nearest even, by integer arithmetic: the same on every target
    const hn::RebindToUnsigned<D> du;
    const hn::Rebind<uint16_t, D> narrow;
    for (int c = 0; c < count; c += kLanes) {
      const V x = hn::LoadU(d, values + c);
      const auto bits = hn::BitCast(du, x);
      const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
      const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7FFFu))));
      const auto kept = hn::IfThenElse(hn::RebindMask(du, hn::Eq(x, x)), rounded,
                                       hn::Set(du, 0x7FC0u));
      hn::StoreU(hn::DemoteTo(narrow, hn::BitCast(hn::RebindToSigned<D>(), kept)), narrow,
                 static_cast<uint16_t*>(out) + c);
    }
  }
}

const char* SimdTarget() { return hwy::TargetName(HWY_TARGET); }

}  // namespace vattn::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace vattn::cpu {

HWY_EXPORT(DotRows);
HWY_EXPORT(AddRows);
HWY_EXPORT(NormRows);
HWY_EXPORT(DotPairs);
HWY_EXPORT(LoadRows);
HWY_EXPORT(StoreRow);
HWY_EXPORT(SimdTarget);

void DotRows(const RowList& list, const float* queries, int heads, float* out, int64_t ld) {
  HWY_DYNAMIC_DISPATCH(DotRows)(list, queries, heads, out, ld);
}
void AddRows(const RowList& list, const float* weights, int64_t ld, int heads, float* sum,
             int64_t sum_ld) {
  HWY_DYNAMIC_DISPATCH(AddRows)(list, weights, ld, heads, sum, sum_ld);
}
void NormRows(const RowList& list, float* out) { HWY_DYNAMIC_DISPATCH(NormRows)(list, out); }
void DotPairs(const RowList& list, const float* other, float* out) {
  HWY_DYNAMIC_DISPATCH(DotPairs)(list, other, out);
}
void LoadRows(const RowList& list, float* out) { HWY_DYNAMIC_DISPATCH(LoadRows)(list, out); }
void StoreRow(const float* values, int count, DType dtype, void* out) {
  HWY_DYNAMIC_DISPATCH(StoreRow)(values, count, dtype, out);
}
const char* SimdTarget() { return HWY_DYNAMIC_DISPATCH(SimdTarget)(); }

}  // namespace vattn::cpu
#endif
