// Steps over an engine's pool: rows written to slots, and the groups of a step made on the device from
// the engine's arrays, so that a captured step serves other requests.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/scratch.cuh"

namespace vattn::cuda {
namespace {

constexpr int kPagedThreads = 256;

// How a request of a step was found.
enum class Found : int32_t {
  kNone,  // no request, or none of its tokens is a query
  kGood,
  kRefused,   // out of range; there is a place for its answers
  kHomeless,  // out of range, as that place is
};

__global__ void WriteSlotsKernel(const __grid_constant__ DeviceStorage storage,
                                 const __grid_constant__ WriteSlotsParams p,
                                 const __grid_constant__ HotSetRef hot, int64_t hot_key,
                                 uint32_t* writes) {
  const Storage& s = storage.host;
  const int element = s.row.dtype == DType::kF32 ? 4 : 2;
  const int k_parts = s.row.dim_k * element / 16,
            v_parts = s.row.shared_kv ? 0 : s.row.dim_v * element / 16;
  const int parts = p.k == nullptr ? 1 : k_parts + v_parts;
  const int64_t all = p.count * p.kv_heads * parts;
  for (int64_t i = int64_t{blockIdx.x} * kPagedThreads + threadIdx.x; i < all;
       i += int64_t{gridDim.x} * kPagedThreads) {
    const int64_t item = i / parts, part = i - item * parts, t = item / p.kv_heads,
                  h = item - t * p.kv_heads;
    const int64_t slot = p.slots[t];
    if (slot < 0 || slot >= p.num_slots) continue;
    if (part == 0) {
      if (hot.slots > 0) hot.slot_of[hot_key + h * p.num_slots + slot] = -1;
      if (h == 0) ++writes[slot];
    }
    if (p.k == nullptr) continue;
    const bool key = part < k_parts;
    const std::byte* const from =
        key ? static_cast<const std::byte*>(p.k) +
                  (t * p.k_token_stride + h * p.k_head_stride) * element + part * 16
            : static_cast<const std::byte*>(p.v) +
                  (t * p.v_token_stride + h * p.v_head_stride) * element + (part - k_parts) * 16;
    std::byte* const to =
        RowInBlock(s, slot / s.block.tokens, slot % s.block.tokens, static_cast<int>(h)) +
        (key ? part * 16 : storage.pool_v_offset + (part - k_parts) * 16);
    CopyGiven(to, from);
  }
}

// KV head blockIdx.y.
__global__ void FetchRowsKernel(const __grid_constant__ DeviceStorage storage,
                                const int32_t* blocks, int64_t begin, int64_t tokens, std::byte* to,
                                int64_t to_stride) {
  const Storage& s = storage.host;
  const TileShape shape = OfRows(storage, MakeTileShape(s.row.row_bytes));
  const int64_t parts = int64_t{shape.used_parts}, head = blockIdx.y;
  for (int64_t i = int64_t{blockIdx.x} * kPagedThreads + threadIdx.x; i < tokens * parts;
       i += int64_t{gridDim.x} * kPagedThreads) {
    const int64_t token = i / parts, part = i - token * parts;
    const std::byte* const from = RowAt(s, blocks, static_cast<int>(head), begin + token);
    *reinterpret_cast<uint4*>(to + head * to_stride + token * s.row.row_bytes + part * 16) =
        *reinterpret_cast<const uint4*>(from + part * 16 +
                                        (part < shape.key_parts ? 0 : shape.gap));
  }
}

__device__ bool IsAsked(const PagedStepParams& p, int r) {
  return p.lengths[r] != 0 && p.query_starts[r + 1] != p.query_starts[r];
}

// Thread block r: request r.
__global__ void CheckRequestsKernel(const __grid_constant__ PagedStepParams p) {
  const int r = blockIdx.x;
  const int64_t start = p.query_starts[r], end = p.query_starts[r + 1], length = p.lengths[r];
  const int row = IsAsked(p, r) ? p.request_rows[r] : -1;
  bool good = length >= 0 && length <= p.max_tokens && end - start <= p.num_tokens &&
              end - start <= length && row >= 0 && row < p.max_requests;
  const bool home = start >= 0 && end > start && end <= p.num_query_tokens;
  good = good && home;
  // Others of the step are to have other rows.
  for (int i = threadIdx.x; good && i < r; i += kPagedThreads)
    good = !IsAsked(p, i) || p.request_rows[i] != row;
  const int64_t blocks =
      length > 0 && length <= p.max_tokens
          ? (length + p.storage.host.block.tokens - 1) / p.storage.host.block.tokens
          : 0;
  for (int64_t b = threadIdx.x; good && b < blocks; b += kPagedThreads) {
    const int32_t id = p.block_table[r * p.block_table_stride + b];
    good = id >= 0 && id < p.num_blocks;
  }
  good = __syncthreads_and(good);
  if (threadIdx.x > 0) return;
  const Found found = !IsAsked(p, r) ? Found::kNone
                      : good         ? Found::kGood
                      : home         ? Found::kRefused
                                     : Found::kHomeless;
  p.verdicts[r] = static_cast<int32_t>(found);
}

__device__ Found FoundAs(const PagedStepParams& p, int r) {
  return static_cast<Found>(p.verdicts[r]);
}

__device__ size_t RequestBytes(const PagedStepParams& p, const PagedLayer& layer, int64_t length,
                               std::byte* memory, GroupScratch& w) {
  return CarveGroup(p.storage.host, p.promise, length, p.num_tokens * layer.group_heads, kMostTeam,
                    memory, w);
}

// One warp: refuses requests, from the first ones on, that working memory has no room for; then rows
// count their steps. Lanes take layers.
__global__ void FitRequestsKernel(const __grid_constant__ PagedStepParams p) {
  const int lane = threadIdx.x;
  constexpr int kLayersEach = 8;
  int64_t bytes[kLayersEach] = {};
  int64_t tokens = 0;
  for (int r = 0; r < p.num_requests; ++r) {
    Found found = FoundAs(p, r);
    if (found == Found::kGood) {
      const int64_t length = p.lengths[r];
      bool fits = tokens + length <= p.max_step_tokens;
      int64_t own[kLayersEach];
#pragma unroll
      for (int k = 0; k < kLayersEach; ++k) {
        const int l = lane + k * kWarp;
        own[k] = 0;
        if (l >= p.num_layers || p.layers[l].kv_heads == 0) continue;
        GroupScratch none;
        own[k] = p.layers[l].kv_heads *
                 static_cast<int64_t>(RequestBytes(p, p.layers[l], length, nullptr, none));
        fits = fits && bytes[k] + own[k] <= p.scratch_bytes;
      }
      fits = __all_sync(kAllLanes, fits);
      if (fits) {
        tokens += length;
#pragma unroll
        for (int k = 0; k < kLayersEach; ++k) bytes[k] += own[k];
      } else {
        found = Found::kRefused;
      }
    }
    __syncwarp();
    if (lane > 0) continue;
    p.verdicts[r] = static_cast<int32_t>(found);
    if (found == Found::kRefused || found == Found::kHomeless)
      atomicAdd(&p.counters->refused, 1ull);
    if (found != Found::kGood) continue;
    PagedRow& row = p.rows[p.request_rows[r]];
    if (p.resets != nullptr && p.resets[r] != 0) row = {row.requests_before + 1, 0};
    ++row.step;
  }
}

// Thread block (r, l): the groups of request r in layer l.
__global__ void MakeGroupsKernel(const __grid_constant__ PagedStepParams p) {
  const int r = blockIdx.x, l = blockIdx.y;
  const PagedLayer& layer = p.layers[l];
  if (layer.kv_heads == 0) return;
  __shared__ unsigned long long before[2];  // bytes of working memory, and blocks of the scan
  if (threadIdx.x < 2) before[threadIdx.x] = 0;
  __syncthreads();
  const auto middle_of = [&](int i) {
    return MiddleOfStep(p.sets, p.lengths[i], p.query_starts[i + 1] - p.query_starts[i]);
  };
  const auto blocks_of = [](const Middle& m) {
    return m.end <= m.begin ? 0 : BlocksFor(m.end) - m.begin / kBlockTokens;
  };
  for (int i = threadIdx.x; i < r; i += kPagedThreads) {
    if (FoundAs(p, i) != Found::kGood) continue;
    GroupScratch none;
    atomicAdd(&before[0], layer.kv_heads * static_cast<unsigned long long>(RequestBytes(
                                               p, layer, p.lengths[i], nullptr, none)));
    atomicAdd(&before[1],
              static_cast<unsigned long long>(layer.kv_heads * blocks_of(middle_of(i))));
  }
  __syncthreads();
  const Found found = FoundAs(p, r);
  const bool good = found == Found::kGood;
  const Middle middle = good ? middle_of(r) : Middle{};
  const int64_t blocks = blocks_of(middle);
  const int row = good ? p.request_rows[r] : 0, heads = layer.group_heads;
  const bool resets = good && p.resets != nullptr && p.resets[r] != 0;
  HeadState* const states = layer.states + int64_t{row} * layer.kv_heads * heads;
  for (int i = threadIdx.x; resets && i < layer.kv_heads * heads; i += kPagedThreads)
    states[i] = HeadState();
  for (int h = threadIdx.x; h < layer.kv_heads; h += kPagedThreads) {
    DeviceGroup g;
    g.slot = r;
    g.kv_head = h;
    g.first_block = static_cast<int64_t>(before[1]) + h * blocks;
    g.refused = found == Found::kRefused;
    if (good || g.refused) {
      g.first_query = p.query_starts[r];
      g.num_queries = p.query_starts[r + 1] - p.query_starts[r];
    }
    if (good) {
      const int64_t fixed_rows = p.storage.sinks + p.storage.ring_tokens,
                    place = int64_t{row} * layer.kv_heads + h;
      g.blocks = p.block_table + r * p.block_table_stride;
      g.fixed = layer.fixed + place * fixed_rows * p.storage.host.row.row_bytes;
      g.fixed_tag = layer.fixed_tag + place * fixed_rows;
      g.writes = layer.writes;
      g.state = states + h * heads;
      if (layer.index != nullptr) g.index = layer.index[h];
      const PagedRow& of = p.rows[row];
      g.key = MakeRandomKey(p.seed, of.requests_before << 16 | static_cast<unsigned>(row),
                            static_cast<uint32_t>(l), p.first_kv_head + static_cast<uint32_t>(h));
      g.step = of.step;
      g.hot_key = layer.hot_key + h * p.num_blocks * p.storage.host.block.tokens;
      g.tokens = p.lengths[r];
      g.middle_begin = middle.begin;
      g.middle_end = middle.end;
      g.ring_begin = g.tokens - p.storage.ring_tokens;
      if (g.ring_begin < middle.end) g.ring_begin = middle.end;
      GroupScratch none;
      const size_t bytes = RequestBytes(p, layer, g.tokens, nullptr, none);
      RequestBytes(p, layer, g.tokens, p.scratch + before[0] + h * bytes, g.scratch);
      if (p.num_tokens > 1) {
        g.carried = g.state;
        g.state = g.scratch.state_of_token;
      }
    }
    layer.groups[int64_t{r} * layer.kv_heads + h] = g;
  }
  if (r + 1 == p.num_requests && threadIdx.x == 0) {
    *layer.header = {.scan_blocks = static_cast<int64_t>(before[1]) + layer.kv_heads * blocks,
                     .num_groups = p.num_requests * layer.kv_heads,
                     .num_tokens = p.num_tokens};
  }
}

// The step has no requests.
__global__ void EmptyStepKernel(const PagedLayer* layers, int32_t num_tokens) {
  if (layers[blockIdx.x].kv_heads > 0) *layers[blockIdx.x].header = {.num_tokens = num_tokens};
}

}  // namespace

int WriteSlots(const DeviceStorage& storage, const WriteSlotsParams& params, const HotSetRef& hot,
               int64_t hot_key, uint32_t* writes, Stream stream) {
  const int64_t parts = params.k == nullptr ? 1 : int64_t{storage.host.row.row_bytes} / 16;
  const int64_t blocks =
      (params.count * params.kv_heads * parts + kPagedThreads - 1) / kPagedThreads;
  WriteSlotsKernel<<<static_cast<unsigned>(blocks < 4096 ? blocks : 4096), kPagedThreads, 0,
                     static_cast<cudaStream_t>(stream.handle)>>>(storage, params, hot, hot_key,
                                                                 writes);
  return cudaGetLastError();
}

int FetchRows(const DeviceStorage& storage, const int32_t* blocks, int32_t kv_heads, int64_t begin,
              int64_t tokens, std::byte* to, int64_t to_stride, Stream stream) {
  FetchRowsKernel<<<dim3(64, static_cast<unsigned>(kv_heads)), kPagedThreads, 0,
                    static_cast<cudaStream_t>(stream.handle)>>>(storage, blocks, begin, tokens, to,
                                                                to_stride);
  return cudaGetLastError();
}

int BeginPagedStep(const PagedStepParams& p, Stream stream) {
  const cudaStream_t on_stream = static_cast<cudaStream_t>(stream.handle);
  if (p.num_requests == 0) {
    EmptyStepKernel<<<p.num_layers, 1, 0, on_stream>>>(p.layers, p.num_tokens);
    return cudaGetLastError();
  }
  CheckRequestsKernel<<<p.num_requests, kPagedThreads, 0, on_stream>>>(p);
  FitRequestsKernel<<<1, kWarp, 0, on_stream>>>(p);
  MakeGroupsKernel<<<dim3(p.num_requests, p.num_layers), kPagedThreads, 0, on_stream>>>(p);
  return cudaGetLastError();
}

}  // namespace vattn::cuda
