// First stage of a step: the new tokens' rows, queries packed for the scan, and attention over sinks
// and window. A group has kFixedParts thread blocks for its fixed rows and kPackParts for its
// queries, which share the segments of its index.
#include <cmath>
#include <type_traits>

#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/stages.h"
#include "kernels/cuda/values.h"
#include "kernels/sampling.h"

namespace vattn::cuda {
namespace {

constexpr int kPackParts = 8;  // thread blocks that share the segments of a group's index
constexpr int kPackHeads = 8;  // at a time

template <class E>
__device__ void ScaleQueries(const StepParams& p, const DeviceGroup& group, int first, int heads,
                             int most, float* out) {
  const int dim = p.storage.host.row.dim_k;
  const std::byte* q = static_cast<const std::byte*>(p.call.q);
  for (int i = threadIdx.x; i < most * dim; i += kThreads) {
    const int head = i / dim;
    const int64_t at = head < heads ? HeadPlace(p, group, first + head) * dim + i % dim : 0;
    out[i] = head < heads ? E::One(q + at * E::kBytes) * p.storage.host.scale : 0;
  }
}

// One head's query as kernels/cpu/scan.cc packs it, by a warp: int8 levels of y [dims] and what
// undoes them. The offset's sum has another order than there.
__device__ void PackHead(const CodeLayout& code, const float* y, float offset, PackedQueries& out,
                         int head) {
  const int dims = code.dims8 + code.dims4 + code.dims2, lane = threadIdx.x % kWarp;
  float most = 0;
  for (int j = lane; j < dims; j += kWarp) most = fmaxf(most, fabsf(y[j]));
  const float scale = fmaxf(__fdiv_rn(WarpMax(most), 127.f), kLeastDivisor);
  float sum = 0;
  for (int r = lane; r < dims / 4; r += kWarp) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float level = rintf(fmaxf(fminf(127.f, __fdiv_rn(y[4 * r + i], scale)), -127.f));
      word |= static_cast<uint32_t>(static_cast<uint8_t>(static_cast<int8_t>(level))) << (8 * i);
      sum += level * scale * code.middle(4 * r + i);
    }
    out.run[r][head] = static_cast<int32_t>(word);
  }
  sum = WarpSum(sum);
  if (lane > 0) return;
  out.scale[head] = scale;
  out.offset[head] = offset + sum;
}

// The same for codes that are signs, as PackSigns there.
__device__ void PackSigns(const CodeLayout& code, const float* y, float scale, float offset,
                          PackedQueries& out, int head) {
  const int lane = threadIdx.x % kWarp;
  float sum = 0;
  for (int r = lane; r < code.dims1 / 4; r += kWarp) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool positive = y[4 * r + i] >= 0;
      word |= (positive ? 0x01u : 0xffu) << (8 * i);
      sum -= positive ? .5f : -.5f;
    }
    out.run[r][head] = static_cast<int32_t>(word);
  }
  sum = WarpSum(sum);
  if (lane > 0) return;
  out.scale[head] = scale;
  out.offset[head] = offset + sum * scale;
}

// Standard deviation of s - s^ of a head over tokens, as NoiseOf there, by a warp: from products of
// the query, y [dims] with the directions of the code, one with the center, and [uncoded] with the
// noise of the others.
__device__ float NoiseOf(const IndexTables& index, int dims, int uncoded, const float* y) {
  const int lane = threadIdx.x % kWarp;
  float sum = 0;
  for (int j = lane; j < dims; j += kWarp) sum = fmaf(index.level_noise2[j] * y[j], y[j], sum);
  for (int j = dims + 1 + lane; j <= dims + uncoded; j += kWarp) sum = fmaf(y[j], y[j], sum);
  return sqrtf(WarpSum(sum));
}

// Sums over the warp of a number a head in each lane, in the order of WarpSum: lanes 4 h to 4 h + 3
// get that of head h.
__device__ float SumHeads(float (&x)[kPackHeads]) {
  static_assert(4 * kPackHeads == kWarp);
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = kPackHeads / 2; half > 0; half /= 2) {
    const bool upper = (lane & 4 * half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
      x[i] = kept + __shfl_xor_sync(kAllLanes, sent, 4 * half);
    }
  }
  float sum = x[0];
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  return sum;
}

// Products of a query that its packing in one segment of the index takes.
VATTN_HD inline int PackRows(const Storage& s) {
  const int dims = s.code.dims8 + s.code.dims4 + s.code.dims2 + s.code.dims1;
  return (s.code.kind == IndexKind::kBalanced ? s.row.dim_k : dims) + 1;
}

// Queries q [kPackHeads][dim] of heads [first, first + heads) in the coordinates of one segment's
// codes. y: shared memory, [kPackHeads][PackRows]. Holds barriers.
__device__ void PackSegment(const Storage& s, const DeviceGroup& group, int segment, int first,
                            int heads, int group_heads, const float* q, float* y) {
  const CodeLayout& code = s.code;
  const IndexTables& index = TablesOf(group, segment);
  const int dim = s.row.dim_k, dims = code.dims8 + code.dims4 + code.dims2 + code.dims1,
            rows = PackRows(s);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int j = warp; j < rows; j += kThreads / kWarp) {
    const float* row = j < dims    ? index.project + int64_t{j} * dim
                       : j == dims ? index.center
                                   : index.noise + int64_t{j - dims - 1} * dim;
    float sum[kPackHeads] = {};
    for (int c = lane; c < dim; c += kWarp) {
      const float x = row[c];
#pragma unroll
      for (int h = 0; h < kPackHeads; ++h) sum[h] = fmaf(x, q[h * dim + c], sum[h]);
    }
    const float own = SumHeads(sum);
    if (lane % 4 == 0) y[lane / 4 * rows + j] = own;
  }
  __syncthreads();
  // Heads that are not there are packed as zeros.
  if (warp < kPackHeads) {
    const float* at = y + warp * rows;
    PackedQueries& out =
        group.scratch.packed[segment * ((group_heads + 7) / 8) + first / kPackHeads];
    if (code.dims1 == 0) {
      PackHead(code, at, at[dims], out, warp);
    } else {
      float norm2 = 0;
      for (int c = lane; c < dim; c += kWarp)
        norm2 = fmaf(q[warp * dim + c], q[warp * dim + c], norm2);
      const float norm = sqrtf(WarpSum(norm2));
      PackSigns(code, at, index.slope * norm, at[dims] + index.intercept * norm, out, warp);
    }
    if (group.scratch.noise != nullptr && warp < heads) {
      const float noise = NoiseOf(index, dims, rows - dims - 1, at);
      if (lane == 0) group.scratch.noise[segment * group_heads + first + warp] = noise;
    }
  }
  __syncthreads();
}

// Thread block `part` of kPackParts: segments part, part + kPackParts, ... of the index; the first
// one brings the scaled queries to scratch too.
template <class E>
__device__ void PackQueries(const StepParams& p, const DeviceGroup& group, int part,
                            float* memory) {
  const int dim = p.storage.host.row.dim_k;
  // A pool of an engine's may have no tables.
  const bool coded = group.num_segments > 0 || group.index.center != nullptr;
  const int segments = coded && group.middle_end > group.middle_begin ? IndexSegments(group) : 0;
  if (part > 0 && part >= segments) return;
  float* q = memory;                     // [kPackHeads][dim]
  float* y = memory + kPackHeads * dim;  // [kPackHeads][PackRows]
  for (int first = 0; first < p.group_heads; first += kPackHeads) {
    const int heads = min(kPackHeads, p.group_heads - first);
    __syncthreads();
    ScaleQueries<E>(p, group, first, heads, kPackHeads, q);
    __syncthreads();
    for (int i = threadIdx.x; part == 0 && i < heads * dim; i += kThreads) {
      group.scratch.query[first * dim + i] = q[i];
    }
    for (int k = part; k < segments; k += kPackParts) {
      PackSegment(p.storage.host, group, k, first, heads, p.group_heads, q, y);
    }
  }
}

// The last token's queries, as they are, to those from which tables may be learnt later.
template <class E>
__device__ void KeepQueries(const StepParams& p, const DeviceGroup& group) {
  using Bits = std::conditional_t<E::kBytes == 2, uint16_t, uint32_t>;
  const int heads = p.group_heads / p.num_tokens, dim = p.storage.host.row.dim_k,
            count = heads * dim;
  const Bits* from =
      static_cast<const Bits*>(p.call.q) + HeadPlace(p, group, p.group_heads - heads) * dim;
  for (int i = threadIdx.x; i < count; i += kThreads)
    reinterpret_cast<Bits*>(group.recent)[i] = from[i];
}

// The row of new token t of the step into the ring and into the host pool.
template <class E>
__device__ void WriteRow(const StepParams& p, const DeviceGroup& group, int t) {
  const RowLayout& row = p.storage.host.row;
  const int64_t token = group.tokens - p.num_tokens + t,
                head = (int64_t{group.slot} * p.num_tokens + t) * p.kv_heads + group.kv_head;
  std::byte* ring = reinterpret_cast<std::byte*>(RowAddress(p.storage, group, token));
  std::byte* host = const_cast<std::byte*>(HostRow(p.storage.host, group.blocks, token));
  const int k_bytes = row.dim_k * E::kBytes, v_bytes = row.shared_kv ? 0 : row.dim_v * E::kBytes;
  const std::byte* k = static_cast<const std::byte*>(p.call.k_new) + head * k_bytes;
  const std::byte* v = static_cast<const std::byte*>(p.call.v_new) + head * v_bytes;
  for (int i = threadIdx.x; i < (k_bytes + v_bytes) / 16; i += kThreads) {
    const int at = i * 16;
    const uint4 x = *reinterpret_cast<const uint4*>(at < k_bytes ? k + at : v + (at - k_bytes));
    *reinterpret_cast<uint4*>(ring + at) = x;
    *reinterpret_cast<uint4*>(host + at) = x;
  }
}

// What a place of DeviceGroup::fixed holds: a row of an engine's pool, as it was written last.
__device__ unsigned long long FixedTag(const DeviceGroup& group, int64_t slot) {
  return static_cast<unsigned long long>(slot + 1) << 32 | group.writes[slot];
}

// Brings the row of a token of an engine's pool to its place on the device, unless it is there. By a
// warp.
__device__ void LoadFixedRow(const StepParams& p, const DeviceGroup& group, int64_t token,
                             const TileShape& shape) {
  const DeviceStorage& s = p.storage;
  const int lane = threadIdx.x % kWarp;
  if (token >= s.sinks && token < group.ring_begin) return;
  const int64_t place = token < s.sinks ? token : s.sinks + token % s.ring_tokens;
  const unsigned long long tag = FixedTag(group, SlotOf(s.host, group, token));
  if (group.fixed_tag[place] == tag) return;
  const std::byte* const from = RowAt(s.host, group.blocks, group.kv_head, token);
  std::byte* const to = group.fixed + place * shape.row_bytes;
  for (int part = lane; part < shape.used_parts; part += kWarp) {
    const int64_t gap = part < shape.key_parts ? 0 : shape.gap;
    *reinterpret_cast<uint4*>(to + part * 16) =
        *reinterpret_cast<const uint4*>(from + part * 16 + gap);
  }
  __syncwarp();
  if (lane == 0) group.fixed_tag[place] = tag;
}

// NaN for the query tokens of a group whose arguments were out of range.
__device__ void RefuseHeads(const StepParams& p, const DeviceGroup& group) {
  const int heads = group.num_queries * (p.group_heads / p.num_tokens),
            dim = p.storage.host.row.dim_v;
  for (int i = threadIdx.x; i < heads * dim; i += kThreads) {
    const int64_t place = HeadPlace(p, group, i / dim);
    StoreOutput(p.call.out, place * dim + i % dim, p.call.out_dtype, NAN);
    if (i % dim > 0) continue;
    if (p.call.lse != nullptr) p.call.lse[place] = NAN;
    if (p.call.error != nullptr) p.call.error[place] = NAN;
    if (p.call.verdict != nullptr)
      p.call.verdict[place] = static_cast<int32_t>(Verdict::kBestEffort);
  }
}

template <DType kType, int kHeads>
__device__ void AttendFixed(const StepParams& p, const DeviceGroup& group, int part,
                            std::byte* memory, RowsShared<kHeads>& shared) {
  using E = Element<kType>;
  const RowLayout& row = p.storage.host.row;
  const TileShape shape = OfRows(p.storage, MakeTileShape(row.row_bytes));
  const int64_t count = group.middle_begin + group.tokens - group.middle_end;
  const int all = static_cast<int>((count + shape.rows - 1) / shape.rows);
  const int tiles = all > part ? (all - part + kFixedParts - 1) / kFixedParts : 0;
  // A new row is written by the thread block that reads it.
  for (int t = 0; p.call.k_new != nullptr && t < p.num_tokens; ++t) {
    if ((count - p.num_tokens + t) / shape.rows % kFixedParts != part) continue;
    WriteRow<E>(p, group, t);
    __threadfence();
  }
  const auto token_at = [&](int64_t i) {
    return i < group.middle_begin ? i : group.middle_end + (i - group.middle_begin);
  };
  if (group.fixed_tag != nullptr) {
    const int warp = threadIdx.x / kWarp, rows = shape.rows;
    for (int i = warp; i < tiles * rows; i += kThreads / kWarp) {
      const int64_t at = int64_t{part + i / rows * kFixedParts} * rows + i % rows;
      if (at < count) LoadFixedRow(p, group, token_at(at), shape);
    }
    __threadfence();
    __syncthreads();
  }
  float* queries =
      reinterpret_cast<float*>(memory + RowsBytes<kHeads>(row, kLeastTiles)) - kHeads * row.dim_k;
  const auto first_of = [&](int k) { return int64_t{part + k * kFixedParts} * shape.rows; };
  for (int first = 0; first < p.group_heads; first += kHeads) {
    const int heads = min(kHeads, p.group_heads - first);
    __syncthreads();
    ScaleQueries<E>(p, group, first, heads, kHeads, queries);
    if (threadIdx.x < kHeads) shared.most[threadIdx.x] = LeastLogit(p);
    float* state =
        group.scratch.fixed + (int64_t{part} * p.group_heads + first) * StateFloats(row.dim_v);
    AttendTiles<kType, kHeads>(
        row, shape, kLeastTiles, tiles, heads, queries, memory, shared, state,
        [&](int k, int r) -> uint64_t {
          const int64_t i = first_of(k) + r;
          if (i >= count) return 0;
          return RowAddress(p.storage, group, token_at(i));
        },
        [&](int k) { return static_cast<int>(min(int64_t{shape.rows}, count - first_of(k))); },
        WeighOnce{},
        [&](int k, int r, int h, float& logit) {
          if (p.num_tokens > 1 && token_at(first_of(k) + r) >= VisibleEnd(p, group, first + h))
            logit = -INFINITY;
        });
  }
}

template <DType kType, int kHeads>
__global__ void __launch_bounds__(kThreads) PrepareKernel(const __grid_constant__ StepParams p) {
  extern __shared__ __align__(16) std::byte memory[];
  __shared__ RowsShared<kHeads> shared;
  const bool first = blockIdx.x == 0 && blockIdx.y == kFixedParts && threadIdx.x == 0;
  if (first) {
    StampTime(p, TimelinePoint::kStart);
    ++*p.hot.call;
  }
  if (static_cast<int>(blockIdx.x) >= NumGroups(p)) return;
  const DeviceGroup& group = p.groups[blockIdx.x];
  if (group.tokens == 0) {
    if (group.refused && blockIdx.y == 0) RefuseHeads(p, group);
    return;
  }
  if (blockIdx.y < kFixedParts) {
    AttendFixed<kType, kHeads>(p, group, blockIdx.y, memory, shared);
    return;
  }
  const int part = blockIdx.y - kFixedParts;
  if (part == 0) {
    if (threadIdx.x == 0) *group.scratch.barrier = 0;
    for (int i = threadIdx.x; i < ValueItems(p.storage.host, p.group_heads); i += kThreads) {
      group.scratch.value_parts_done[i] = 0;
    }
    for (int i = threadIdx.x; group.carried != nullptr && i < p.group_heads; i += kThreads)
      group.state[i] = group.carried[i % (p.group_heads / p.num_tokens)];
    if (group.recent != nullptr && p.task != Task::kSelect) KeepQueries<Element<kType>>(p, group);
  }
  PackQueries<Element<kType>>(p, group, part, reinterpret_cast<float*>(memory));
}

template <DType kType, int kHeads>
int Launch(const StepParams& p, Stream stream) {
  const RowLayout& row = p.storage.host.row;
  const int pack = kPackHeads * (row.dim_k + PackRows(p.storage.host)) * 4;
  const int rows = RowsBytes<kHeads>(row, kLeastTiles), bytes = rows > pack ? rows : pack;
  const auto kernel = PrepareKernel<kType, kHeads>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const int parts =
      kFixedParts + (p.storage.host.code.kind == IndexKind::kBalanced ? kPackParts : 1);
  kernel<<<dim3(p.most_groups, parts), kThreads, bytes, static_cast<cudaStream_t>(stream.handle)>>>(
      p);
  return cudaGetLastError();
}

}  // namespace

int Prepare(const StepParams& p, Stream stream) {
  return DispatchRows(p.storage.host.row.dtype, p.group_heads,
                      [&]<DType kType, int kHeads>() { return Launch<kType, kHeads>(p, stream); });
}

}  // namespace vattn::cuda
