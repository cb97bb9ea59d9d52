#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "kernels/cuda/rank.cuh"
#include "tests/cuda/cuda_rank.h"

namespace vattn::test {
namespace {

using cuda::StepParams, cuda::DeviceGroup, cuda::kThreads, cuda::kWarps, cuda::Team,
    cuda::TeamShared;

// What a launch is asked for and what it leaves.
struct RankCall {
  uint32_t k = 0, base = 0;
  const uint32_t* budget = nullptr;          // [heads]
  uint32_t* list[RankOutput::kLists] = {};   // [capacity]
  uint32_t* masks[RankOutput::kLists] = {};  // as GroupScratch::top
  int64_t count[RankOutput::kLists] = {};    // of the lists
  int64_t distinct = 0;
};

template <int kHeads>
__device__ void Keep(Team<kHeads>& team, RankCall& call, int i, int64_t count,
                     const uint32_t* masks) {
  const cuda::GroupScratch& w = team.group.scratch;
  team.Sync();
  const int64_t words = NumBlocks(team.group) * team.heads() * cuda::kMaskWords;
  for (int64_t at = threadIdx.x; team.rank == 0 && at < words; at += kThreads) {
    call.masks[i][at] = cuda::LoadL2(masks + at);
  }
  for (int64_t at = threadIdx.x; team.rank == 0 && at < count; at += kThreads) {
    call.list[i][at] = cuda::LoadL2(w.token + at);
  }
  if (team.rank == 0 && threadIdx.x == 0) call.count[i] = count;
  team.Sync();
}

// Dynamic shared memory: what ranking needs, then TeamShared.
template <int kHeads>
VATTN_HD int MemoryBytes(const StepParams& p) {
  return cuda::RowsBytes<kHeads>(p.storage.host.row, p.storage.tiles_in_flight);
}

template <int kHeads>
__global__ void __launch_bounds__(kThreads, 1) RankKernel(StepParams p, int size, RankCall* call) {
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<TeamShared<kHeads>*>(memory + MemoryBytes<kHeads>(p));
  Team<kHeads> team{p, p.groups[0], shared, memory, static_cast<int>(blockIdx.x), size};
  const cuda::GroupScratch& w = team.group.scratch;
  cuda::Ranks& ranks = RanksOf(team);
  const int heads = team.heads();
  if (threadIdx.x == 0) shared.fetched = shared.count = 0;
  const auto want = [&](auto&& of) {
    __syncthreads();
    for (int h = threadIdx.x; h < heads; h += kThreads) ranks.want[h] = of(h);
    __syncthreads();
  };
  if (call->k > 0) {
    want([&](int) { return call->k; });
    cuda::ScoreKeys keys(team.group, heads);
    FindLast(team, keys);
    SelectBest(team, keys, w.top, false);
    Keep(team, *call, 0, ListMasked(team, w.top, true), w.top);
  }
  cuda::UniformKeys keys(team.group, heads, p.promise.refresh, call->k > 0 ? w.top : nullptr);
  want([&](int) { return call->base; });
  FindLast(team, keys);
  SelectBest(team, keys, w.drawn, false);
  Keep(team, *call, 1, ListMasked(team, w.drawn, call->k == 0), w.drawn);
  want([&](int h) { return call->budget[h]; });
  FindLast(team, keys);
  SelectBest(team, keys, w.drawn, true);
  Keep(team, *call, 2, ListMasked(team, w.drawn, false), w.drawn);
  if (threadIdx.x == 0) shared.total[0] = shared.count;
  team.Add(1);
  if (team.rank == 0 && threadIdx.x == 0) call->distinct = static_cast<int64_t>(shared.total[0]);
}

void Check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Memory that both sides read and write, freed together.
class Shared {
 public:
  ~Shared() {
    for (void* each : all_) cudaFree(each);
  }
  template <class T>
  T* Take(size_t count, int fill = 0xa5) {
    void* memory = nullptr;
    const size_t bytes = std::max(count * sizeof(T), size_t{16});
    Check(cudaMallocManaged(&memory, bytes), "allocating");
    all_.push_back(memory);
    std::memset(memory, fill, bytes);
    return static_cast<T*>(memory);
  }
  template <class T>
  T* Copy(const std::vector<T>& from) {
    T* to = Take<T>(from.size());
    std::copy(from.begin(), from.end(), to);
    return to;
  }

 private:
  std::vector<void*> all_;
};

template <int kHeads>
void Launch(StepParams p, int team, RankCall* call) {
  const auto kernel = RankKernel<kHeads>;
  const int bytes = MemoryBytes<kHeads>(p) + static_cast<int>(sizeof(TeamShared<kHeads>));
  Check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "asking for memory");
  void* arguments[] = {&p, &team, &call};
  Check(cudaLaunchCooperativeKernel(kernel, dim3(team), dim3(kThreads), arguments, bytes, nullptr),
        "launching");
  Check(cudaDeviceSynchronize(), "ranking");
}

}  // namespace

RankOutput RankOnDevice(const RankInput& in) {
  const int64_t n = in.end - in.begin, first = in.begin / kBlockTokens;
  const int64_t blocks = (in.end + kBlockTokens - 1) / kBlockTokens - first;
  const size_t heads = static_cast<size_t>(in.heads),
               words = static_cast<size_t>(blocks) * heads * cuda::kMaskWords;
  Shared memory;
  std::vector<int32_t> ids(static_cast<size_t>(blocks + first));
  std::vector<float> score(static_cast<size_t>(blocks) * heads * kBlockTokens,
                           HUGE_VALF);  // outside: the best
  for (int64_t t = in.begin; t < in.end; ++t) {
    for (int h = 0; h < in.heads; ++h) {
      score[static_cast<size_t>(((t / kBlockTokens - first) * in.heads + h) * kBlockTokens +
                                t % kBlockTokens)] =
          in.score[static_cast<size_t>(h * n + t - in.begin)];
    }
  }
  StepParams p;
  p.storage.host.row = MakeRowLayout(DType::kF16, 16, 16, false);  // the least memory
  p.storage.tiles_in_flight = cuda::kLeastTiles;
  p.promise.refresh = in.refresh;
  p.group_heads = in.heads;
  p.hot.call = memory.Take<unsigned long long>(1, 0);
  DeviceGroup* group = memory.Take<DeviceGroup>(1, 0);
  *group = {};
  group->blocks = memory.Copy(ids);
  group->key = in.key;
  group->step = in.step;
  group->middle_begin = in.begin, group->middle_end = in.end;
  cuda::GroupScratch& w = group->scratch;
  w.score = memory.Copy(score);
  w.token = memory.Take<uint32_t>(static_cast<size_t>(n));
  w.row = memory.Take<uint64_t>(static_cast<size_t>(n));
  w.slot = memory.Take<int32_t>(static_cast<size_t>(n));
  w.top = memory.Take<uint32_t>(words);
  w.drawn = memory.Take<uint32_t>(words);
  w.seen = memory.Take<uint32_t>(static_cast<size_t>(blocks) * cuda::kMaskWords);
  w.histogram = memory.Take<uint32_t>(heads * cuda::kDigits * cuda::kDigitBins);
  w.ties = memory.Take<uint32_t>(heads * static_cast<size_t>(in.team * kWarps));
  w.partial = memory.Take<double>(static_cast<size_t>(2 * in.team * cuda::MostTotals(in.heads)));
  w.barrier = memory.Take<uint32_t>(1, 0);
  p.groups = group;
  RankCall* call = memory.Take<RankCall>(1, 0);
  *call = {.k = in.k, .base = in.base, .budget = memory.Copy(in.budget)};
  for (int i = 0; i < RankOutput::kLists; ++i) {
    call->list[i] = memory.Take<uint32_t>(static_cast<size_t>(n));
    call->masks[i] = memory.Take<uint32_t>(words, 0);
  }
  in.heads <= 4 ? Launch<4>(p, in.team, call) : Launch<8>(p, in.team, call);
  RankOutput out;
  out.distinct = call->distinct;
  for (int i = 0; i < RankOutput::kLists; ++i) {
    out.list[i].assign(call->list[i], call->list[i] + call->count[i]);
    out.marked[i].resize(heads * static_cast<size_t>(n));
    for (int64_t b = 0; b < blocks; ++b) {
      for (int h = 0; h < in.heads; ++h) {
        for (int t = 0; t < kBlockTokens; ++t) {
          const int64_t token = (first + b) * kBlockTokens + t;
          const uint32_t word = call->masks[i][(b * in.heads + h) * cuda::kMaskWords + t / 32];
          if ((word >> t % 32 & 1) == 0) continue;
          if (token < in.begin || token >= in.end)
            throw std::runtime_error("a token outside the middle is marked");
          out.marked[i][static_cast<size_t>(h * n + token - in.begin)] = 1;
        }
      }
    }
  }
  return out;
}

}  // namespace vattn::test
