// Exact attention of many query tokens at once: those of a prompt, chunk by chunk.
#ifndef VATTN_KERNELS_CPU_PREFILL_H_
#define VATTN_KERNELS_CPU_PREFILL_H_

#include "kernels/params.h"

namespace vattn::cpu {

class Workers;

// Products and softmax run over a tile of query tokens of a KV head and a block of keys at a time
// (FlashAttention-2, arXiv 2307.08691): memory beside the arrays does not grow with the tokens.
// Products are fp32 whatever the dtype of the rows is.
void Prefill(const PrefillParams& params, Workers* workers);

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_PREFILL_H_
