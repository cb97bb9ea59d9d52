#include "kernels/cpu/rows.h"

#include <algorithm>
#include <utility>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/rows.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace vattn::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;
constexpr int kLanes = static_cast<int>(hn::MaxLanes(D()));

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
    return hn::PromoteTo(d,
                         hn::LoadU(half, reinterpret_cast<const hwy::bfloat16_t*>(at) + element));
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

// Fetches the rows that come next, a part with each row that is worked on.
class Soon {
 public:
  static constexpr int kBytes = 128;  // at a time; rows are multiples of it

  // passes: how many times the rows of the list are walked over
  Soon(const RowList& list, int passes)
      : row_(list.soon), end_(list.soon + list.soon_count), bytes_(list.soon_bytes) {
    const int parts = list.soon_count * (list.soon_bytes / kBytes), walks = passes * list.count;
    each_ = walks > 0 ? (parts + walks - 1) / walks : 0;
  }
  // With every row, or with every `rows` of them.
  HWY_INLINE void Fetch(int rows = 1) {
    for (int i = 0; i < rows * each_ && row_ != end_; ++i) {
      FetchSoon(*row_ + at_);
      FetchSoon(*row_ + at_ + 64);
      at_ += kBytes;
      if (at_ >= bytes_) at_ = 0, ++row_;
    }
  }

 private:
  const uint8_t* const* row_;
  const uint8_t* const* end_;
  int bytes_, at_ = 0, each_ = 0;
};

// Sums of kCount vectors over each kCount-th of their lanes: with kLanes vectors, lane i is the sum
// of vector i. Each level of the recursion halves, first inside blocks of 4 lanes, then across
// them.
template <int kCount>
HWY_INLINE V LaneSums(const V* acc) {
  const D d;
  const hn::RepartitionToWide<D> wide;
  if constexpr (kCount == 1) {
    return acc[0];
  } else {
    const V lo = LaneSums<kCount / 2>(acc), hi = LaneSums<kCount / 2>(acc + kCount / 2);
    if constexpr (kCount == 2) {
      return hn::Add(hn::InterleaveLower(d, lo, hi), hn::InterleaveUpper(d, lo, hi));
    } else if constexpr (kCount == 4) {
      const auto a = hn::BitCast(wide, lo), b = hn::BitCast(wide, hi);
      return hn::Add(hn::BitCast(d, hn::InterleaveLower(wide, a, b)),
                     hn::BitCast(d, hn::InterleaveUpper(wide, a, b)));
    } else if constexpr (kCount == kLanes) {
      return hn::Add(hn::ConcatLowerLower(d, hi, lo), hn::ConcatUpperUpper(d, hi, lo));
    } else {
      return hn::Add(hn::OddEvenBlocks(hi, lo), hn::SwapAdjacentBlocks(hn::OddEvenBlocks(lo, hi)));
    }
  }
}

// Rows and queries as fp32, a vector of each at a time.
template <DType kType>
struct Widened {
  using Query = float;
  static constexpr int kStep = kLanes;  // elements at a time
  HWY_INLINE static V Row(const uint8_t* at, int element) { return Load<kType>(at, element); }
  HWY_INLINE static V LoadQuery(const float* q) { return hn::LoadU(D(), q); }
  HWY_INLINE static V Multiply(V row, V q, V acc) { return hn::MulAdd(row, q, acc); }
};

#if HWY_TARGET == HWY_AVX3
// bf16 rows and bf16 queries, two elements a lane, by AVX512_BF16, which this Highway's targets do
// not let the compiler use.
struct Pairs {
  using Query = uint16_t;
  static constexpr int kStep = 2 * kLanes;
  HWY_INLINE static V Row(const uint8_t* at, int element) {
    return V{_mm512_loadu_ps(at + 2 * element)};
  }
  HWY_INLINE static V LoadQuery(const uint16_t* q) { return V{_mm512_loadu_ps(q)}; }
  HWY_INLINE static V Multiply(V row, V q, V acc) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc.raw) : "v"(row.raw), "v"(q.raw));
    return acc;
  }
};
#endif

// kHeads heads by kLanes / kHeads rows at a time: kLanes sums fill one vector. list.dim is a
// multiple of Form::kStep.
template <class Form, int kHeads>
void DotHeads(const RowList& list, const typename Form::Query* queries, Soon& soon, float* out,
              int64_t ld) {
  const D d;
  constexpr int kRows = kLanes / kHeads;
  alignas(64) float sums[kLanes];
  for (int first = 0; first < list.count; first += kRows) {
    const int rows = list.count - first < kRows ? list.count - first : kRows;
    const uint8_t* at[kRows];
    for (int r = 0; r < kRows; ++r) {
      at[r] = list.rows[first + (r < rows ? r : 0)] + list.offset;
    }
    soon.Fetch(kRows);
    V acc[kLanes];
    for (int i = 0; i < kLanes; ++i) acc[i] = hn::Zero(d);
    for (int c = 0; c < list.dim; c += Form::kStep) {
      V row[kRows];
      for (int r = 0; r < kRows; ++r) row[r] = Form::Row(at[r], c);
      for (int g = 0; g < kHeads; ++g) {
        const V q = Form::LoadQuery(queries + g * list.dim + c);
        for (int r = 0; r < kRows; ++r)
          acc[g * kRows + r] = Form::Multiply(row[r], q, acc[g * kRows + r]);
      }
    }
    hn::Store(LaneSums<kLanes>(acc), d, sums);
    for (int g = 0; g < kHeads; ++g) {
      for (int r = 0; r < rows; ++r) out[g * ld + first + r] = sums[g * kRows + r];
    }
  }
}

template <class Form>
void DotForm(const RowList& list, const typename Form::Query* queries, int heads, float* out,
             int64_t ld) {
  Soon soon(list, heads / 4 + (heads % 4 + 1) / 2);
  int g = 0;
  for (; g + 4 <= heads; g += 4)
    DotHeads<Form, 4>(list, queries + g * list.dim, soon, out + g * ld, ld);
  if (g + 2 <= heads) {
    DotHeads<Form, 2>(list, queries + g * list.dim, soon, out + g * ld, ld);
    g += 2;
  }
  if (g < heads) DotHeads<Form, 1>(list, queries + g * list.dim, soon, out + g * ld, ld);
}

#if HWY_TARGET == HWY_AVX3
bool HasBf16() {
  static const bool has = __builtin_cpu_supports("avx512bf16") != 0;
  return has;
}

// queries / unit as bf16 into narrow; false if that loses anything.
bool NarrowQueries(const float* queries, int count, float unit, uint16_t* narrow) {
  const D d;
  const hn::RebindToUnsigned<D> du;
  const hn::Rebind<uint16_t, D> half;
  const V inverse = hn::Set(d, 1 / unit), scale = hn::Set(d, unit);
  auto same = hn::Eq(scale, scale);
  for (int c = 0; c < count; c += kLanes) {
    const V q = hn::LoadU(d, queries + c);
    // To the nearest: a query that is what it should be lies within rounding of it.
    const auto bits = hn::And(hn::Add(hn::BitCast(du, hn::Mul(q, inverse)), hn::Set(du, 0x8000u)),
                              hn::Set(du, 0xFFFF0000u));
    same = hn::And(same, hn::Eq(hn::Mul(hn::BitCast(d, bits), scale), q));
    hn::StoreU(hn::TruncateTo(half, hn::ShiftRight<16>(bits)), half, narrow + c);
  }
  return hn::AllTrue(d, same);
}

// DotRows by pairs, if rows, queries and processor allow it.
bool DotPacked(const RowList& list, const float* queries, int heads, float unit, float* out,
               int64_t ld) {
  constexpr int kMostDim = 1024, kMostHeads = 8;
  constexpr int kLeastRows = 8;  // fewer do not pay for narrowing the queries
  if (list.dtype != DType::kBF16 || unit == 0 || list.count < kLeastRows || list.dim > kMostDim ||
      list.dim % Pairs::kStep != 0 || heads > kMostHeads || !HasBf16()) {
    return false;
  }
  alignas(64) uint16_t narrow[kMostHeads * kMostDim];
  if (!NarrowQueries(queries, heads * list.dim, unit, narrow)) return false;
  DotForm<Pairs>(list, narrow, heads, out, ld);
  for (int g = 0; g < heads; ++g) {
    for (int i = 0; i < list.count; ++i) out[g * ld + i] *= unit;
  }
  return true;
}
#else
bool DotPacked(const RowList&, const float*, int, float, float*, int64_t) { return false; }
#endif

void DotRows(const RowList& list, const float* queries, int heads, float* out, int64_t ld,
             float unit) {
  if (DotPacked(list, queries, heads, unit, out, ld)) return;
  WithDType(list.dtype, [&](auto type) {
    DotForm<Widened<decltype(type)::value>>(list, queries, heads, out, ld);
  });
}

template <DType kType, int kHeads, int kVectors>
void AddChunk(const RowList& list, int c, const float* weights, int64_t ld, Soon& soon, float* sum,
              int64_t sum_ld) {
  const D d;
  V acc[kHeads][kVectors];
  for (int g = 0; g < kHeads; ++g) {
    for (int v = 0; v < kVectors; ++v) acc[g][v] = hn::LoadU(d, sum + g * sum_ld + c + v * kLanes);
  }
  for (int i = 0; i < list.count; ++i) {
    soon.Fetch();
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

// The same for kPairs times two vectors of bf16: even and odd elements are kept apart, as they lie
// in words of 32 bits.
template <int kHeads, int kPairs>
void AddPairs(const RowList& list, int c, const float* weights, int64_t ld, Soon& soon, float* sum,
              int64_t sum_ld) {
  const D d;
  const hn::RebindToUnsigned<D> du;
  const auto high = hn::Set(du, 0xFFFF0000u);
  V even[kHeads][kPairs], odd[kHeads][kPairs];
  for (int g = 0; g < kHeads; ++g) {
    for (int p = 0; p < kPairs; ++p) {
      hn::LoadInterleaved2(d, sum + g * sum_ld + c + p * 2 * kLanes, even[g][p], odd[g][p]);
    }
  }
  for (int i = 0; i < list.count; ++i) {
    soon.Fetch();
    const uint32_t* at = reinterpret_cast<const uint32_t*>(list.rows[i] + list.offset + 2 * c);
    V low[kPairs], up[kPairs];
    for (int p = 0; p < kPairs; ++p) {
      const auto words = hn::LoadU(du, at + p * kLanes);
      low[p] = hn::BitCast(d, hn::ShiftLeft<16>(words));
      up[p] = hn::BitCast(d, hn::And(words, high));
    }
    for (int g = 0; g < kHeads; ++g) {
      const V w = hn::Set(d, weights[g * ld + i]);
      for (int p = 0; p < kPairs; ++p) {
        even[g][p] = hn::MulAdd(low[p], w, even[g][p]);
        odd[g][p] = hn::MulAdd(up[p], w, odd[g][p]);
      }
    }
  }
  for (int g = 0; g < kHeads; ++g) {
    for (int p = 0; p < kPairs; ++p) {
      hn::StoreInterleaved2(even[g][p], odd[g][p], d, sum + g * sum_ld + c + p * 2 * kLanes);
    }
  }
}

template <DType kType, int kHeads>
void AddHeads(const RowList& list, const float* weights, int64_t ld, Soon& soon, float* sum,
              int64_t sum_ld) {
  int c = 0;
  if constexpr (kType == DType::kBF16) {
    for (; c + 4 * kLanes <= list.dim; c += 4 * kLanes) {
      AddPairs<kHeads, 2>(list, c, weights, ld, soon, sum, sum_ld);
    }
  }
  for (; c + 4 * kLanes <= list.dim; c += 4 * kLanes) {
    AddChunk<kType, kHeads, 4>(list, c, weights, ld, soon, sum, sum_ld);
  }
  for (; c < list.dim; c += kLanes)
    AddChunk<kType, kHeads, 1>(list, c, weights, ld, soon, sum, sum_ld);
}

void AddRows(const RowList& list, const float* weights, int64_t ld, int heads, float* sum,
             int64_t sum_ld) {
  WithDType(list.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    Soon soon(list, (heads / 4 + (heads % 4 + 1) / 2) * std::max(1, list.dim / (4 * kLanes)));
    int g = 0;
    for (; g + 4 <= heads; g += 4)
      AddHeads<kType, 4>(list, weights + g * ld, ld, soon, sum + g * sum_ld, sum_ld);
    if (g + 2 <= heads) {
      AddHeads<kType, 2>(list, weights + g * ld, ld, soon, sum + g * sum_ld, sum_ld);
      g += 2;
    }
    if (g < heads) AddHeads<kType, 1>(list, weights + g * ld, ld, soon, sum + g * sum_ld, sum_ld);
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
        for (int k = 0; k < 4; ++k)
          at[k] = list.rows[first + (r + k < rows ? r + k : 0)] + list.offset;
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
        acc = hn::MulAdd(Load<kType>(list.rows[i] + list.offset, c),
                         hn::LoadU(d, other + i * list.dim + c), acc);
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
    for (int c = 0; c < count; c += kLanes)
      hn::StoreU(hn::LoadU(d, values + c), d, static_cast<float*>(out) + c);
  } else if (dtype == DType::kF16) {
    const hn::Rebind<hwy::float16_t, D> half;
    for (int c = 0; c < count; c += kLanes) {
      hn::StoreU(hn::DemoteTo(half, hn::LoadU(d, values + c)), half,
                 static_cast<hwy::float16_t*>(out) + c);
    }
  } else {  // round to nearest even, by integer arithmetic: the same on every target
    const hn::RebindToUnsigned<D> du;
    const hn::Rebind<uint16_t, D> narrow;
    for (int c = 0; c < count; c += kLanes) {
      const V x = hn::LoadU(d, values + c);
      const auto bits = hn::BitCast(du, x);
      const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
      const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7FFFu))));
      const auto kept =
          hn::IfThenElse(hn::RebindMask(du, hn::Eq(x, x)), rounded, hn::Set(du, 0x7FC0u));
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

void DotRows(const RowList& list, const float* queries, int heads, float* out, int64_t ld,
             float unit) {
  HWY_DYNAMIC_DISPATCH(DotRows)(list, queries, heads, out, ld, unit);
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
