// What a team answers for its group: outputs, verdicts and counts.
#ifndef VATTN_KERNELS_CUDA_REPORT_CUH_
#define VATTN_KERNELS_CUDA_REPORT_CUH_

#include "kernels/cuda/team.cuh"

namespace vattn::cuda {

struct Report {
  int64_t selected = 0, fetched = 0;
  int32_t looks = 0;
  bool noisy = false;  // codes are too coarse for the queries: nothing was verified
};

// Output of this block's heads for which write(h), with their verdict and error.
template <int kHeads, class Write, class Judge>
__device__ void WriteHeads(Team<kHeads>& team, Write&& write, Judge&& judge) {
  const CallArrays& call = team.p.call;
  const int dim = team.p.storage.host.row.dim_v, heads = team.heads();
  for (int h = team.rank; h < heads; h += team.size) {
    // Of query tokens that are answered again, one is enough.
    if (!write(h) || h / (team.p.group_heads / team.p.num_tokens) >= team.group.num_queries)
      continue;
    const int64_t place = HeadPlace(team.p, team.group, h);
    for (int j = threadIdx.x; j < dim; j += kThreads) {
      StoreOutput(call.out, place * dim + j, call.out_dtype,
                  LoadL2(team.group.scratch.output + static_cast<int64_t>(h) * dim + j));
    }
    if (threadIdx.x > 0) continue;
    const HeadWork& work = team.shared.head[h];
    const float2 judged = judge(h);  // verdict and error
    const int32_t verdict = static_cast<int32_t>(judged.x);
    if (call.lse != nullptr) call.lse[place] = logf(work.denominator) + work.shift;
    if (call.verdict != nullptr) call.verdict[place] = verdict;
    if (call.error != nullptr) call.error[place] = judged.y;
    atomicAdd(&team.p.counters->verdicts[verdict], 1ull);
  }
}

template <int kHeads>
__device__ void WriteReport(Team<kHeads>& team, const Report& report) {
  if (team.rank > 0 || threadIdx.x > 0) return;
  const CallArrays& call = team.p.call;
  const int64_t at = int64_t{team.group.slot} * team.p.kv_heads + team.group.kv_head;
  if (call.selected != nullptr) call.selected[at] = static_cast<int32_t>(report.selected);
  if (call.fetched != nullptr) call.fetched[at] = static_cast<int32_t>(report.fetched);
  if (call.looks != nullptr) call.looks[at] = report.looks;
  if (call.middle != nullptr) call.middle[at] = team.middle();
  DeviceCounters& c = *team.p.counters;
  atomicAdd(&c.middle, static_cast<unsigned long long>(team.middle()));
  atomicAdd(&c.selected, static_cast<unsigned long long>(report.selected));
  atomicAdd(&c.fetched, static_cast<unsigned long long>(report.fetched));
  atomicAdd(&c.looks, static_cast<unsigned long long>(report.looks));
  if (report.noisy)
    atomicAdd(&c.noisy, static_cast<unsigned long long>(team.group.num_queries *
                                                        (team.p.group_heads / team.p.num_tokens)));
}

}  // namespace vattn::cuda

#endif  // VATTN_KERNELS_CUDA_REPORT_CUH_
