// The baseline policies: top-k by index score, and vAttention (top-k plus a uniform sample, arXiv
// 2510.05688) as METHOD.md, "Policies", states it. Written plainly: they are yardsticks.
#ifndef VATTN_KERNELS_CPU_TOPK_H_
#define VATTN_KERNELS_CPU_TOPK_H_

#include "kernels/params.h"

namespace vattn::cpu {

class Workers;

void DecodeTopK(const Storage& storage, const Promise& promise, Group& group, Workers* workers);

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_TOPK_H_
