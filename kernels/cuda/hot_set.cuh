// The hot set on the device: finds the row of a token, or claims a slot for it. Any number of thread
// blocks use it at a time. A slot that this call uses is never given away, because its use word holds
// the call's number. A claimed slot belongs to its row once the row has been written and slot_of says
// so (Publish), so that no other thread block reads a row before it is there.
#ifndef VATTN_KERNELS_CUDA_HOT_SET_CUH_
#define VATTN_KERNELS_CUDA_HOT_SET_CUH_

#include "kernels/cuda/team.cuh"

namespace vattn::cuda {

constexpr unsigned long long kTaken = ~0ull;  // a slot that is changing hands
constexpr int kClaimRounds = 4;               // of 32 slots each, before a row does without a slot

// The slot that holds `key`, marked as used by this call; -1 if there is none.
inline __device__ int32_t FindSlot(const HotSetRef& hot, unsigned long long call, int64_t key) {
  const int32_t slot = *static_cast<volatile int32_t*>(hot.slot_of + key);
  if (slot < 0) return -1;
  const unsigned long long before = atomicMax(hot.use + slot, call * 2 + 1);
  if (before == kTaken) return -1;
  if (before >> 1 < call) return slot;  // nobody can have claimed it in this call
  __threadfence();
  return *static_cast<volatile int64_t*>(hot.owner + slot) == key ? slot : -1;
}

// Claims slots for the lanes of the warp that want one, 32 slots of the clock at a time. A slot
// with its mark set gets a second chance: the mark is taken away.
inline __device__ int32_t ClaimSlot(const HotSetRef& hot, unsigned long long call, bool want,
                                    int64_t key) {
  const int lane = threadIdx.x % kWarp;
  int32_t mine = -1;
#pragma unroll 1
  for (int round = 0; round < kClaimRounds; ++round) {
    const unsigned wanting = __ballot_sync(kAllLanes, want && mine < 0);
    if (wanting == 0) break;
    unsigned long long from = 0;
    if (lane == 0) from = atomicAdd(hot.hand, static_cast<unsigned long long>(kWarp));
    from = __shfl_sync(kAllLanes, from, 0);
    const int32_t at =
        static_cast<int32_t>((from + lane) % static_cast<unsigned long long>(hot.slots));
    const unsigned long long seen = *static_cast<volatile unsigned long long*>(hot.use + at);
    const bool idle = seen != kTaken && seen >> 1 < call;
    bool got = idle && (seen & 1) == 0;
    // Only as many as are wanted are claimed, and marks go only where that is too few.
    const unsigned free = __ballot_sync(kAllLanes, got);
    if (idle && (seen & 1) != 0 && __popc(free) < __popc(wanting))
      atomicCAS(hot.use + at, seen, seen & ~1ull);
    got = got && __popc(free & ((1u << lane) - 1)) < __popc(wanting);
    got = got && atomicCAS(hot.use + at, seen, kTaken) == seen;
    const unsigned claimed = __ballot_sync(kAllLanes, got);
    // The n-th lane that wants one takes the n-th that was claimed.
    const int rank = __popc(wanting & ((1u << lane) - 1));
    const bool served = want && mine < 0 && rank < __popc(claimed);
    const int source = served ? __fns(claimed, 0, rank + 1) : 0;
    const int32_t slot = __shfl_sync(kAllLanes, at, source);
    if (!served) continue;
    mine = slot;
    const int64_t old = hot.owner[slot];
    if (old >= 0) atomicCAS(hot.slot_of + old, slot, -1);
    *static_cast<volatile int64_t*>(hot.owner + slot) = key;
    __threadfence();
    *static_cast<volatile unsigned long long*>(hot.use + slot) = call * 2 + 1;
  }
  return mine;
}

// Fills row and slot of place i of the list for the lanes with `in`, by a whole warp; the number of
// rows that are not in the hot set.
inline __device__ int Resolve(const StepParams& p, const DeviceGroup& group,
                              unsigned long long call, bool in, uint32_t token, int64_t i) {
  const GroupScratch& w = group.scratch;
  const HotSetRef& hot = p.hot;
  int64_t key = 0;
  int32_t slot = -1;
  if (in) {
    key = HotKey(p.storage.host, group, token);
    if (hot.slots > 0) slot = FindSlot(hot, call, key);
  }
  const bool miss = in && slot < 0;
  const int misses = __popc(__ballot_sync(kAllLanes, miss));
  const int32_t claimed = hot.slots > 0 && misses > 0 ? ClaimSlot(hot, call, miss, key) : -1;
  if (in) {
    w.slot[i] = claimed;
    w.row[i] =
        miss ? PoolRow(p.storage, group, token)
             : reinterpret_cast<uint64_t>(hot.rows + int64_t{slot} * p.storage.host.row.row_bytes);
  }
  return misses;
}

// Resolve for the places [first, first + count) of the list, whose tokens this thread block has
// written. Adds the rows that are not in the hot set to shared.fetched. Holds a barrier.
template <int kHeads>
__device__ void ResolveListed(Team<kHeads>& team, int64_t first, int64_t count) {
  const int lane = threadIdx.x % kWarp;
  const unsigned long long call = *team.p.hot.call;
  __syncthreads();
#pragma unroll 1
  for (int64_t i = threadIdx.x; i - lane < count; i += kThreads) {
    const bool in = i < count;
    const uint32_t token = in ? team.group.scratch.token[first + i] : 0;
    const int misses = Resolve(team.p, team.group, call, in, token, first + i);
    if (lane == 0 && misses > 0) atomicAdd(&team.shared.fetched, misses);
  }
}

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_HOT_SET_CUH_
