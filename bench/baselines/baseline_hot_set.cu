#include "bench/baselines/baseline_hot_set.h"

namespace vattn::bench {
namespace {

constexpr int kWarpLanes = 32;
constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpLanes;

int TableSize(int k) {  // a power of two, at most half full
  int size = 64;
  while (size < 2 * k) size *= 2;
  return size;
}

// Dynamic shared memory of a block.
struct Shared {
  int32_t* key;        // [table] token or -1
  int16_t* place;      // [table] its place in the list
  int16_t* evictable;  // [slots] slots whose token is not in the list, the oldest first
  int16_t* hit;        // [k] slots whose token is, the oldest first
  int16_t* found;      // [k] slot of each token in the list or -1
  int16_t* missing;    // [k] places of the list that were not found

  static size_t Bytes(int table, int slots, int k) {
    return size_t{6} * table + size_t{2} * slots + size_t{6} * k;
  }
  __device__ Shared(int table, int slots, int k) {
    extern __shared__ __align__(16) char memory[];
    key = reinterpret_cast<int32_t*>(memory);
    place = reinterpret_cast<int16_t*>(key + table);
    evictable = place + table;
    hit = evictable + slots;
    found = hit + k;
    missing = found + k;
  }
};

__device__ int Hash(int32_t token, int table) {
  return static_cast<int>(token * 2654435761u >> 7) & (table - 1);
}

__device__ void Insert(const Shared& shared, int table, int32_t token, int place) {
  int at = Hash(token, table);
  while (atomicCAS(&shared.key[at], -1, token) != -1) at = (at + 1) & (table - 1);
  shared.place[at] = static_cast<int16_t>(place);
}

__device__ int Find(const Shared& shared, int table, int32_t token) {
  if (token < 0) return -1;
  for (int at = Hash(token, table);; at = (at + 1) & (table - 1)) {
    if (shared.key[at] == token) return shared.place[at];
    if (shared.key[at] == -1) return -1;
  }
}

// How many threads before this one have the flag set, and how many in all. For the whole block.
__device__ int Rank(bool flag, int* total) {
  __shared__ int counts[kWarps];
  const uint32_t all = __ballot_sync(~0u, flag);
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  __syncthreads();  // counts of the last call have been read
  if (lane == 0) counts[warp] = __popc(all);
  __syncthreads();
  int before = __popc(all & ((1u << lane) - 1)), sum = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before += sum;
    sum += counts[w];
  }
  *total = sum;
  return before;
}

__device__ void CopyRow(const std::byte* from, std::byte* to, int row_bytes) {
  for (int i = threadIdx.x % kWarpLanes * 16; i < row_bytes; i += kWarpLanes * 16) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from + i));
    *reinterpret_cast<uint4*>(to + i) = v;
  }
}

// One block a unit.
__global__ void __launch_bounds__(kThreads)
    ResolveAndFetchKernel(const HotSetParams params, int table) {
  const Shared shared(table, params.slots, params.k);
  const int64_t unit = blockIdx.x;
  const int count = params.counts[unit], tid = threadIdx.x;
  const int32_t* tokens = params.tokens + unit * params.k;
  int32_t* slot_token = params.slot_token + unit * params.slots;
  int16_t* order = params.order + unit * params.slots;

  for (int i = tid; i < table; i += kThreads) shared.key[i] = -1;
  for (int i = tid; i < count; i += kThreads) shared.found[i] = -1;
  __syncthreads();
  for (int i = tid; i < count; i += kThreads) Insert(shared, table, tokens[i], i);
  __syncthreads();

  int hits = 0, evictables = 0;
  for (int first = 0; first < params.slots; first += kThreads) {
    const int i = first + tid;
    const bool inside = i < params.slots;
    const int16_t slot = inside ? order[i] : 0;
    const int place = inside ? Find(shared, table, slot_token[slot]) : -1;
    int found = 0;
    const int rank = Rank(place >= 0, &found);
    if (place >= 0) {
      shared.found[place] = slot;
      shared.hit[hits + rank] = slot;
    } else if (inside) {
      shared.evictable[evictables + tid - rank] = slot;
    }
    hits += found;
    evictables += min(kThreads, params.slots - first) - found;
  }
  __syncthreads();

  int misses = 0;
  for (int first = 0; first < count; first += kThreads) {
    const int i = first + tid;
    const bool miss = i < count && shared.found[i] < 0;
    int found = 0;
    const int rank = Rank(miss, &found);
    if (miss) {
      const int16_t slot = shared.evictable[misses + rank];
      shared.missing[misses + rank] = static_cast<int16_t>(i);
      shared.found[i] = slot;
      slot_token[slot] = tokens[i];
    }
    misses += found;
  }
  __syncthreads();

  const int kept = params.slots - count;  // slots that this step does not use
  for (int i = tid; i < params.slots; i += kThreads) {
    order[i] = i < kept          ? shared.evictable[misses + i]
               : i < kept + hits ? shared.hit[i - kept]
                                 : shared.evictable[i - kept - hits];
  }
  for (int i = tid; i < count; i += kThreads) params.slot_of[unit * params.k + i] = shared.found[i];
  const auto* host = reinterpret_cast<const std::byte*>(params.host_rows[unit]);
  std::byte* hot = params.hot_rows + unit * params.slots * params.row_bytes;
  for (int j = tid / kWarpLanes; j < misses; j += kWarps) {
    const int i = shared.missing[j];
    CopyRow(host + int64_t{tokens[i]} * params.row_bytes,
            hot + int64_t{shared.found[i]} * params.row_bytes, params.row_bytes);
  }
  if (tid == 0) atomicAdd(params.missed, static_cast<unsigned long long>(misses));
}

}  // namespace

int ResolveAndFetch(const HotSetParams& params, cudaStream_t stream) {
  if (params.k < 1 || params.k > kMaxHotSetList || params.k > params.slots ||
      params.slots > kMaxHotSetSlots) {
    return cudaErrorInvalidValue;
  }
  const int table = TableSize(params.k);
  const size_t bytes = Shared::Bytes(table, params.slots, params.k);
  const cudaError_t error = cudaFuncSetAttribute(
      ResolveAndFetchKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  ResolveAndFetchKernel<<<params.units, kThreads, bytes, stream>>>(params, table);
  return cudaGetLastError();
}

}  // namespace vattn::bench
