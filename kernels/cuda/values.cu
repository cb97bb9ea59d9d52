// Value codes: encode, and the sum of e^ v^ over the whole middle (MakeBase of
// kernels/cpu/estimate.cc).
//
// The sum is a product of matrices: levels [dims][tokens] by estimates [tokens][heads], on tensor
// cores in fp16 with fp32 sums. Estimates are fp16 already; a level of b bits becomes the fp16
// number 1 + level / 2^b by putting its bits on top of the mantissa, which takes no conversion.
// What the 1 adds is the sum of the estimates, which is known.
#include <cmath>

#include "kernels/cuda/stages.h"
#include "kernels/cuda/values.h"
#include "kernels/cuda/vocabulary.cuh"

namespace vattn::cuda {
namespace {

constexpr int kEncodeThreads = 256;
constexpr int kEncodeWarps = kEncodeThreads / kWarp;

__device__ uint32_t ValueLevel(float x, int bits) {
  const int half = 1 << (bits - 1);
  const float level = floorf(x) + static_cast<float>(half);
  return static_cast<uint32_t>(
      fminf(fmaxf(0.f, level), static_cast<float>(2 * half - 1)));  // NaN: 0
}

// A warp takes a token: its V comes to shared memory in whole, then a lane makes a byte at a time.
template <DType kType>
__global__ void __launch_bounds__(kEncodeThreads)
    EncodeValuesKernel(DeviceStorage storage, const EncodeItem* items) {
  using E = Element<kType>;
  extern __shared__ __align__(16) std::byte memory[];
  const Storage& s = storage.host;
  const EncodeItem& item = items[blockIdx.y];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int dim = s.row.dim_v, bits = s.value_bits, chunk = 128 / bits, v_bytes = dim * E::kBytes;
  const float* const mean = item.index.value_mean;
  const float* const step = item.index.value_step;
  std::byte* value = memory + warp * v_bytes;
  for (int64_t token = item.begin + int64_t{blockIdx.x} * kEncodeWarps + warp; token < item.end;
       token += int64_t{gridDim.x} * kEncodeWarps) {
    const std::byte* from = HostRow(s, item.blocks, token) + s.row.v_offset;
    for (int i = lane; i < v_bytes / 16; i += kWarp) {
      reinterpret_cast<uint4*>(value)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
    __syncwarp();
    const int64_t block = item.blocks[token / kBlockTokens];
    const int64_t at = s.block.value_codes + token % kBlockTokens * s.value_code_bytes;
    std::byte* host = s.base + block * s.block.bytes + at;
    std::byte* device = storage.codes + block * storage.code_block_bytes + (at - s.block.codes);
    for (int b = lane; b < s.value_code_bytes; b += kWarp) {
      uint32_t byte = 0;
      for (int k = 0; k < 8 / bits; ++k) {
        const int j = b / 16 * chunk + 16 * k + b % 16;
        if (j >= dim) break;
        const float x = __fdiv_rn(__fsub_rn(E::One(value + j * E::kBytes), mean[j]), step[j]);
        byte |= ValueLevel(x, bits) << (k * bits);
      }
      host[b] = device[b] = static_cast<std::byte>(byte);
    }
    __syncwarp();  // before the next token's V
  }
}

template <DType kType>
int LaunchEncode(const DeviceStorage& storage, const EncodeItem* items, int count, int64_t most,
                 cudaStream_t stream) {
  // 32 KiB at most.
  const int bytes = kEncodeWarps * storage.host.row.dim_v * Element<kType>::kBytes;
  const int64_t turns = (most + kEncodeWarps - 1) / kEncodeWarps;
  constexpr int kMostItems = 65535;  // as many as the second grid dimension takes
  for (int first = 0; first < count; first += kMostItems) {
    const dim3 grid(static_cast<unsigned>(turns < 4096 ? turns : 4096),
                    static_cast<unsigned>(count - first < kMostItems ? count - first : kMostItems));
    EncodeValuesKernel<kType><<<grid, kEncodeThreads, bytes, stream>>>(storage, items + first);
  }
  return cudaGetLastError();
}

constexpr int kSumThreads = kItemHeads * kWarp;  // a warp for each head where heads are apart
constexpr int kSumWarps = kSumThreads / kWarp;
constexpr int kStepTokens = 16;  // of one product
constexpr int kBatch = 4;        // products whose operands are loaded at a time

// Products of one item. In each, rows are 16 dims, columns 8 heads, and the sum goes over 16
// tokens. Lane 4 g + t holds, of word g of the item's codes, the levels of tokens 4 t .. 4 t + 3:
// the order of tokens in the sum is free as long as levels and estimates agree, and this one loads
// whole words.
template <int kBits>
struct Products {
  static constexpr int kRuns = 8 / kBits;   // levels of a byte
  static constexpr int kTiles = 2 * kRuns;  // of 16 dims: 4 bytes a lane, two of them in a tile

  // Of sum c of tile m in lane 4 g + t: rows g and g + 8 of a tile are two bytes of word g, columns
  // 2 t and 2 t + 1 heads.
  static __device__ int Dim(int slice, int m, int c, int lane) {
    const int g = lane / 4, i = m / kRuns * 2 + c / 2, k = m % kRuns;
    return (slice * 2 + g / 4) * (128 / kBits) + 16 * k + g % 4 * 4 + i;
  }
  static __device__ int Head(int c, int lane) { return lane % 4 * 2 + c % 2; }

  // 1 + level / 2^kBits of byte i and run k of two tokens.
  static __device__ uint32_t Levels(uint32_t both, int k) {
    const uint32_t moved = both >> (kBits == 2 ? 2 * k : 2 + 4 * k);
    uint32_t levels;  // (moved & mask) | ones: the compiler makes two instructions of it
    asm("lop3.b32 %0, %1, %2, %3, 0xea;"
        : "=r"(levels)
        : "r"(moved), "r"(kBits == 2 ? 0x03000300u : 0x03c003c0u), "r"(0x3c003c00u));
    return levels;
  }

  // sum[m] += levels of 16 tokens by their estimates; word[i], estimate: of tokens 4 t + i.
  static __device__ void Add(const uint32_t (&word)[4], const uint2& estimate,
                             float (&sum)[kTiles][4]) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      // [byte of the pair][two tokens]: byte 1 is the first token's, byte 3 the second's.
      uint32_t both[2][2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const unsigned i = 2 * pair + j, selector = (4 + i) << 12 | i << 4;
        both[j][0] = __byte_perm(word[0], word[1], selector);
        both[j][1] = __byte_perm(word[2], word[3], selector);
      }
#pragma unroll
      for (int k = 0; k < kRuns; ++k) {
        float(&c)[4] = sum[pair * kRuns + k];
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(Levels(both[0][0], k)), "r"(Levels(both[1][0], k)), "r"(Levels(both[0][1], k)),
              "r"(Levels(both[1][1], k)), "r"(estimate.x), "r"(estimate.y));
      }
    }
  }
};

// Sums part `part` of `parts` of an item, to `out`. The function is long because it is one pass over
// blocks whose sums are in registers while a block lasts.
template <int kBits>
__device__ void SumPart(const StepParams& p, const DeviceGroup& group, int item, int part,
                        int parts, ValuePart& out) {
  using P = Products<kBits>;
  // Each warp's sums in units of its heads. In registers they would leave no room for loads ahead.
  __shared__ float sums[kSumWarps][P::kTiles * 4][kWarp];
  __shared__ float units[kItemHeads], masses[kItemHeads];
  const Storage& s = p.storage.host;
  const GroupScratch& w = group.scratch;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int slice = item % ValueSlices(s), first = item / ValueSlices(s) * kItemHeads;
  const int heads = min(kItemHeads, p.group_heads - first);
  const int64_t blocks = NumBlocks(group);
  const int64_t begin = blocks * part / parts, end = blocks * (part + 1) / parts;
  // Unit and mass of each head, one warp a head. The shift of a block without mass means nothing.
  if (warp < heads) {
    const float* const shift = w.shift + first + warp;
    const float* const mass = w.mass + first + warp;
    float unit = -INFINITY, sum = 0;
    for (int64_t b = begin + lane; b < end; b += kWarp)
      unit = fmaxf(unit, shift[b * p.group_heads]);
    unit = WarpMax(unit);
    for (int64_t b = begin + lane; b < end; b += kWarp) {
      const float m = mass[b * p.group_heads];
      if (m != 0) sum = fmaf(m, expf(shift[b * p.group_heads] - unit), sum);
    }
    sum = WarpSum(sum);
    if (lane == 0) units[warp] = unit, masses[warp] = sum;
  } else if (lane == 0) {
    units[warp] = -INFINITY, masses[warp] = 0;
  }
  __syncthreads();
  // A slice may end before its last word, an item before its last head: what those lanes make of
  // another's is not used.
  const int bytes = s.value_code_bytes, word_at = slice * kItemBytes + g * 4;
  const int64_t codes_at =
      s.block.value_codes - s.block.codes + (word_at < bytes ? word_at : 0) + 4 * t * bytes;
  const float unit0 = units[2 * t], unit1 = units[2 * t + 1];
#pragma unroll
  for (int i = 0; i < P::kTiles * 4; ++i) sums[warp][i][lane] = 0;
  for (int64_t b = begin + warp; b < end; b += kSumWarps) {
    const std::byte* code = p.storage.codes +
                            group.blocks[FirstBlock(group) + b] * p.storage.code_block_bytes +
                            codes_at;
    const uint16_t* const estimate =
        w.estimate + (b * p.group_heads + first + min(g, heads - 1)) * kBlockTokens + 4 * t;
    float sum[P::kTiles][4] = {};
#pragma unroll 1
    for (int token = 0; token < kBlockTokens; token += kBatch * kStepTokens) {
      uint32_t word[kBatch][4];
      uint2 e[kBatch];
#pragma unroll
      for (int step = 0; step < kBatch; ++step, code += kStepTokens * bytes) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          word[step][i] = __ldg(reinterpret_cast<const uint32_t*>(code + i * bytes));
        }
        e[step] = __ldg(reinterpret_cast<const uint2*>(estimate + token + step * kStepTokens));
      }
#pragma unroll
      for (int step = 0; step < kBatch; ++step) P::Add(word[step], e[step], sum);
    }
    const auto factor = [&](int h, float unit) {
      const int64_t at = b * p.group_heads + first + h;
      return h < heads && w.mass[at] != 0 ? expf(w.shift[at] - unit) : 0;
    };
    const float factor0 = factor(2 * t, unit0), factor1 = factor(2 * t + 1, unit1);
#pragma unroll
    for (int m = 0; m < P::kTiles; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float& to = sums[warp][m * 4 + c][lane];
        to = fmaf(sum[m][c], c % 2 == 0 ? factor0 : factor1, to);
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < P::kTiles * 4 * kWarp; i += kSumThreads) {
    float all = 0;
#pragma unroll
    for (int j = 0; j < kSumWarps; ++j) all += (&sums[j][0][0])[i];
    out.sum[i] = all;
  }
  if (threadIdx.x < kItemHeads) {
    out.unit[threadIdx.x] = units[threadIdx.x], out.mass[threadIdx.x] = masses[threadIdx.x];
  }
}

// Parts of an item as softmax states of its heads, by the thread block that came last.
template <int kBits>
__device__ void MergeParts(const StepParams& p, const DeviceGroup& group, int item, int parts,
                           const ValuePart* from) {
  using P = Products<kBits>;
  __shared__ float factors[kMostParts][kItemHeads], units[kItemHeads], masses[kItemHeads];
  const Storage& s = p.storage.host;
  const int tid = threadIdx.x, dim = s.row.dim_v;
  const int slice = item % ValueSlices(s), first = item / ValueSlices(s) * kItemHeads;
  const int heads = min(kItemHeads, p.group_heads - first);
  if (tid < heads) {
    float unit = -INFINITY, mass = 0;
    for (int r = 0; r < parts; ++r) unit = fmaxf(unit, LoadL2(&from[r].unit[tid]));
    for (int r = 0; r < parts; ++r) {
      const float m = LoadL2(&from[r].mass[tid]);
      factors[r][tid] = MergeFactor(LoadL2(&from[r].unit[tid]), m, unit);
      mass = fmaf(m, factors[r][tid], mass);
    }
    units[tid] = unit, masses[tid] = mass;
  }
  __syncthreads();
  // e^ (1 + level / 2^b) undone: v^ = mean + (level + middle) step.
  constexpr float kLevels = 1 << kBits, kMiddle = .5f - kLevels / 2;
  float* const state = group.scratch.coded + static_cast<int64_t>(first) * StateFloats(dim);
  for (int i = tid; i < P::kTiles * 4 * kWarp; i += kSumThreads) {
    const int m = i / kWarp / 4, c = i / kWarp % 4, lane = i % kWarp;
    const int h = P::Head(c, lane), j = P::Dim(slice, m, c, lane);
    if (h >= heads || j >= dim) continue;
    float sum = 0;
    for (int r = 0; r < parts; ++r) sum = fmaf(LoadL2(from[r].sum + i), factors[r][h], sum);
    const float levels = fmaf(kLevels, sum, (kMiddle - kLevels) * masses[h]);
    state[h * StateFloats(dim) + j] =
        fmaf(masses[h], group.index.value_mean[j], levels * group.index.value_step[j]);
  }
  if (slice == 0 && tid < heads) {
    const SoftmaxState out(state + tid * StateFloats(dim), dim);
    out.max() = units[tid], out.denominator() = masses[tid], out.value_norm2() = 0;
  }
}

// Grid: parts of all groups by items.
template <int kBits>
__global__ void __launch_bounds__(kSumThreads, 2)
    SumValuesKernel(const __grid_constant__ StepParams p) {
  __shared__ bool last;
  const int index = blockIdx.x / kMostParts, part = blockIdx.x % kMostParts, item = blockIdx.y;
  if (index >= NumGroups(p)) return;
  const DeviceGroup& group = p.groups[index];
  if (group.tokens == 0 || group.middle_end == group.middle_begin) return;
  const int parts = ValueParts(NumBlocks(group));
  if (part >= parts) return;
  ValuePart* const all = group.scratch.value_part + static_cast<int64_t>(item) * kMostParts;
  SumPart<kBits>(p, group, item, part, parts, all[part]);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(group.scratch.value_parts_done + item, 1u) == static_cast<uint32_t>(parts) - 1;
    __threadfence();
  }
  __syncthreads();
  if (last) MergeParts<kBits>(p, group, item, parts, all);
}

}  // namespace

int EncodeValues(const DeviceStorage& storage, const EncodeItem* items, int count, int64_t most,
                 Stream stream) {
  if (count == 0 || most == 0 || storage.host.value_bits == 0) return cudaSuccess;
  const cudaStream_t s = static_cast<cudaStream_t>(stream.handle);
  return DispatchDType(storage.host.row.dtype, [&]<DType kType>() {
    return LaunchEncode<kType>(storage, items, count, most, s);
  });
}

int SumValues(const StepParams& p, Stream stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream.handle);
  const dim3 grid(static_cast<unsigned>(p.most_groups) * kMostParts,
                  ValueItems(p.storage.host, p.group_heads));
  if (p.storage.host.value_bits == 2) {
    SumValuesKernel<2><<<grid, kSumThreads, 0, s>>>(p);  // on the caller's stream
  } else {
    SumValuesKernel<4><<<grid, kSumThreads, 0, s>>>(p);  // on the caller's stream
  }
  return cudaGetLastError();
}

}  // namespace vattn::cuda
